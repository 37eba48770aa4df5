"""Names of models, against a stand-in for the hub on this machine."""

from __future__ import annotations

import hashlib
import http.server
import json
import os
import subprocess
import sys
import threading
import types

import pytest

from auto_round.errors import ConfigError
from auto_round.models.hub import resolve_model

FILES = {
    "config.json": b"{}",
    "model.safetensors": b"weights",
    "tokenizer.json": b"{}",
    "tokenizer.model": b"pieces",
    "chat_template.jinja": b"{{ x }}",
    "modeling_toy.py": b"x = 1",
    "pytorch_model.bin": b"pickle",
    "original/model.safetensors": b"again",
    "consolidated.safetensors": b"again",
    "README.md": b"# toy",
}
COMMIT = "0123456789abcdef0123456789abcdef01234567"
REFUSED = {"/api/models/toy/gated": (403, "GatedRepo"), "/api/models/toy/none": (404, "RepoNotFound")}


class Hub(http.server.BaseHTTPRequestHandler):
    """As much of the hub's interface as a snapshot needs: listing, head and body of files."""

    def answer(self, status: int, body: bytes, **headers: str) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_GET(self) -> None:
        path = self.path.split("?")[0]
        for start, (status, code) in REFUSED.items():
            if path.startswith(start):
                return self.answer(status, b"", X_Error_Code=code)
        if path.startswith("/api/models/toy/model/tree/"):
            files = [{"type": "file", "path": n, "size": len(b), "oid": "0" * 40} for n, b in FILES.items()]
            return self.answer(200, json.dumps(files).encode(), Content_Type="application/json")
        if path.startswith("/api/models/toy/model"):
            listing = {
                "id": "toy/model",
                "sha": COMMIT,
                "siblings": [{"rfilename": n} for n in FILES],
                "tags": [],
                "downloads": 0,
                "likes": 0,
                "private": False,
            }
            return self.answer(200, json.dumps(listing).encode(), Content_Type="application/json")
        body = FILES.get(path.partition(f"/resolve/{COMMIT}/")[2])
        if body is None:
            return self.answer(404, b"", X_Error_Code="EntryNotFound")
        return self.answer(200, body, ETag=f'"{hashlib.sha1(body).hexdigest()}"', X_Repo_Commit=COMMIT)

    do_HEAD = do_GET  # noqa: N815

    def log_message(self, *args: object) -> None:
        pass


SCRIPT = """
import json, sys
from auto_round.errors import ConfigError
from auto_round.models.hub import resolve_model
out = {}
for name, trust in [("toy/model", False), ("toy/model", True), ("toy/gated", False), ("toy/none", False)]:
    try:
        folder = resolve_model(name, trust_remote_code=trust)
        files = (p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())
        out[f"{name} {trust}"] = sorted(files)
    except ConfigError as error:
        out[f"{name} {trust}"] = str(error)
print(json.dumps(out))
"""


def look_up(endpoint: str, home, **more: str) -> dict:
    kept = {
        k: v for k, v in os.environ.items() if not k.startswith("HF_") and not k.lower().endswith("_proxy")
    }
    environment = {
        **kept,
        "HF_ENDPOINT": endpoint,
        "HF_HOME": str(home),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "PYTHONPATH": os.pathsep.join(sys.path),
        **more,
    }
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        env=environment,
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.strip().splitlines()[-1])


def test_names_on_hugging_face(tmp_path):
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        endpoint = f"http://127.0.0.1:{server.server_port}"
        got = look_up(endpoint, tmp_path / "home")
        server.shutdown()
    plain = ["chat_template.jinja", "config.json", "model.safetensors", "tokenizer.json", "tokenizer.model"]
    assert got["toy/model False"] == plain
    assert got["toy/model True"] == sorted([*plain, "modeling_toy.py"])
    assert "restricted" in got["toy/gated False"]
    assert "hf auth login" in got["toy/gated False"]
    assert 'no Hugging Face model "toy/none"' in got["toy/none False"]

    offline = look_up(endpoint, tmp_path / "home", HF_HUB_OFFLINE="1")
    assert offline["toy/model False"] == sorted([*plain, "modeling_toy.py"])  # from the cache
    assert "cannot be reached" in offline["toy/none False"]
    assert "give a local folder" in offline["toy/none False"]


def test_folders_are_taken_as_they_are(tmp_path):
    assert resolve_model(tmp_path) == tmp_path
    assert resolve_model(str(tmp_path)) == tmp_path


@pytest.mark.parametrize("name", ["./nothing", "/nothing/here", "~/nothing", "a/b/c", "with space", ""])
def test_what_cannot_be_a_name(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match="no folder"):
        resolve_model(name)


def test_a_file_is_a_model_only_when_it_holds_one(tmp_path):
    for name in ("model.safetensors", "model.gguf"):
        (tmp_path / name).write_bytes(b"")
    with pytest.raises(ConfigError, match="is a file"):
        resolve_model(tmp_path / "model.safetensors")
    assert resolve_model(tmp_path / "model.gguf") == tmp_path / "model.gguf"


def test_unknown_platform():
    with pytest.raises(ConfigError, match='did you mean "model_scope"'):
        resolve_model("a/b", platform="modelscope")


def stand_in(monkeypatch, download) -> None:
    """A ModelScope package whose download is `download`."""
    root, hub, errors = (
        types.ModuleType(n) for n in ("modelscope", "modelscope.hub", "modelscope.hub.errors")
    )
    root.snapshot_download = download
    for name in ("FileDownloadError", "NotExistError", "RequestError"):
        setattr(errors, name, type(name, (Exception,), {}))
    for module in (root, hub, errors):
        monkeypatch.setitem(sys.modules, module.__name__, module)


def test_names_on_model_scope(monkeypatch, tmp_path):
    asked = []

    def download(name, *, revision, allow_patterns, ignore_patterns):
        asked.append((name, revision, allow_patterns))
        return str(tmp_path)

    stand_in(monkeypatch, download)
    assert resolve_model("a/b", platform="model_scope", revision="v1") == tmp_path
    assert asked[0][:2] == ("a/b", "v1")
    assert "*.safetensors" in asked[0][2]
    assert "*.py" not in asked[0][2]


def test_model_scope_out_of_reach(monkeypatch):
    def download(name, **options):
        raise ConnectionError("no route to host")

    stand_in(monkeypatch, download)
    with pytest.raises(ConfigError, match="no route to host"):
        resolve_model("a/b", platform="model_scope")


def test_model_scope_not_installed(monkeypatch):
    monkeypatch.setitem(sys.modules, "modelscope", None)
    with pytest.raises(ConfigError, match=r"auto-round\[modelscope\]"):
        resolve_model("a/b", platform="model_scope")
