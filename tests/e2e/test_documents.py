"""What the user documents show, in an environment that holds just what `pip install .` brings.

Every call and command stands for one of theirs, with a small local model under the name of theirs. The
environment is made once; `PLAIN_PYTHON` may name the Python of one that is there already.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from auto_round.testing.tiny_models import save_tiny_model
from export.gguf.small_models import save_small_model

pytestmark = [pytest.mark.slow, pytest.mark.net]

ROOT = Path(__file__).parents[2]
STAND_IN = Path(__file__).parent / "documents"
SECONDS = 3600
SIZES = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "max_position_embeddings": 64,
    "num_key_value_heads": 4,
}
GENERATE = """
words = tokenizer("One who likes to learn,", return_tensors="pt").to(model.device)
print(tokenizer.decode(model.generate(**words, max_new_tokens=20, do_sample=False)[0]))
"""
LOAD = """
from transformers import AutoModelForCausalLM, AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained(folder)
"""
QUANTIZER = "from auto_round import AutoRound\n"
ALL = "auto_gptq,auto_awq,auto_round"
PILE = "NeelNanda/pile-10k"


@pytest.fixture(scope="session")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the commands of an environment with this package and what it asks for, nothing else."""
    named = os.environ.get("PLAIN_PYTHON")
    if named:
        python = Path(named)
        subprocess.run([python, "-m", "pip", "install", "-q", "--no-deps", str(ROOT)], check=True)
    else:
        home = tmp_path_factory.mktemp("plain") / "venv"
        subprocess.run([sys.executable, "-m", "venv", str(home)], check=True)
        python = home / "bin" / "python"
        subprocess.run(
            [python, "-m", "pip", "install", "-q", "-c", ROOT / "constraints.txt", str(ROOT)], check=True
        )
    code = "import importlib.util as u; print([n for n in ('pytest', 'triton', 'peft') if u.find_spec(n)])"
    found = subprocess.run([python, "-c", code], check=True, capture_output=True, text=True).stdout
    assert found.strip() == "[]", "a plain install has none of the tests' packages"
    return python.parent


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Small models under names of the documents."""
    root = tmp_path_factory.mktemp("models")
    one = {"head_dim": 32, "tie_word_embeddings": True, "num_hidden_layers": 1}
    save_small_model("qwen3", root / "Qwen3-0.6B", **one, **SIZES)
    untied = {"head_dim": 64, "tie_word_embeddings": False, "num_hidden_layers": 1}
    whole_blocks = {"hidden_size": 256, "intermediate_size": 512}  # llama.cpp's have 256 weights of a row
    save_small_model("qwen3", root / "Qwen3-8B", **untied, **{**SIZES, **whole_blocks})
    opt = {"ffn_dim": 256, "word_embed_proj_dim": 128, "num_hidden_layers": 7}
    save_tiny_model("opt", root / "opt-125m", **opt, **SIZES)
    experts = {"moe_intermediate_size": 128, "shared_expert_intermediate_size": 128}
    save_small_model("qwen2_moe", root / "DeepSeek-R1-bf16", **experts, **SIZES)
    return root


class Reader:
    """A user in an empty folder who types what the documents say."""

    def __init__(self, place: Path, commands: Path, models: Path) -> None:
        self.place, self.commands, self.models = place, commands, models

    def run(self, *words: str | Path) -> str:
        keep = {k: v for k, v in os.environ.items() if not k.startswith(("AR_", "PYTHON"))}
        own = {"PATH": f"{self.commands}:{os.environ['PATH']}", "PYTHONPATH": str(STAND_IN)}
        own |= {"HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
        done = subprocess.run(
            [str(word) for word in words],
            cwd=self.place,
            env=keep | own,
            capture_output=True,
            text=True,
            timeout=SECONDS,
            check=False,
        )
        assert done.returncode == 0, f"{words}\n{done.stdout[-3000:]}\n{done.stderr[-6000:]}"
        return done.stdout + done.stderr

    def command(self, line: str) -> str:
        return self.run(*line.replace("MODEL", str(self.models / "Qwen3-0.6B")).split())

    def snippet(self, code: str, **names: str | Path) -> str:
        given = {"name": self.models / "Qwen3-0.6B", "out": "./tmp_autoround", **names}
        head = "".join(f"{name} = {str(value)!r}\n" for name, value in given.items())
        return self.run(self.commands / "python", "-c", head + code)

    def finished(self, pattern: str = "**/") -> list[str]:
        return sorted(
            p.parent.relative_to(self.place).as_posix() for p in self.place.glob(pattern + "report.json")
        )


@pytest.fixture
def reader(tmp_path: Path, plain: Path, models: Path) -> Reader:
    return Reader(tmp_path, plain, models)


COMMANDS = {
    "readme": f"auto-round --model MODEL --bits 4 --group_size 128 --output_dir tmp_autoround --format {ALL}",
    "readme best": "auto-round-best --model MODEL --bits 4 --group_size 128 --low_gpu_mem_usage",
    "readme light": "auto-round-light --model MODEL --bits 4 --group_size 128",
    "guide": f"auto-round --model MODEL --scheme W4A16 --format {ALL}",
    "guide best": f"auto-round-best --model MODEL --scheme W4A16 --format {ALL}",
    "guide light": f"auto-round-light --model MODEL --scheme W4A16 --format {ALL}",
    "two bits": "auto-round --model MODEL --bits 2 --group_size 64 --enable_alg_ext --iters 20",
    "no tuning": "auto-round --model MODEL --iters 0 --group_size 32",
    "plain rounding": "auto-round --model MODEL --iters 0 --disable_opt_rtn",
    "gguf": "auto-round --model MODEL --format gguf:q4_k_m --iters 0",
    "gguf of two bits": "auto-round --model MODEL --format gguf:q2_k_s --iters 0 --disable_opt_rtn",
    "head": "auto-round --model_name MODEL --scheme W4A16 --quant_lm_head --format auto_round --iters 20",
    "devices": "auto-round --model MODEL --scheme W4A16 --device_map auto --iters 20",
    "memory": "auto-round --model MODEL --bs 1 --gradient_accumulate_steps 8 --seqlen 32 --iters 20",
    "least memory": "auto-round --model MODEL --memory lowest --iters 20",
    "all blocks together": "auto-round --model MODEL --bits 2 --iters 20 --distill_steps 20",
    "scales together": "auto-round --model MODEL --bits 2 --iters 20 --distill_steps 20 --distill_scales_only"
    " --distill_nsamples 40",
    "less memory": "auto-round --model MODEL --low_cpu_mem_usage --low_gpu_mem_usage --iters 20",
    "adam": "auto-round --model MODEL --adam --iters 20",
    "compiled": "auto-round --model MODEL --enable_torch_compile --iters 20",
    "exact again": "auto-round --model MODEL --enable_deterministic_algorithms --iters 20",
    "a scheme for each layer": "auto_round --model_name MODEL --avg_bits 6 --options mxfp4,mxfp8"
    " --ignore_scale_zp_bits --iters 0 --format fake",
    "floats": "auto-round --model MODEL --scheme MXFP8 --format auto_round --iters 0",
    "data mixed": f"auto-round --model MODEL --iters 20 --dataset ./tmp.json,{PILE}:num=256,mbpp:num=128",
    "data joined": f"auto-round --model MODEL --iters 20 --dataset {PILE}:concat=True",
    "data split": f"auto-round --model MODEL --iters 20 --dataset {PILE}:train,mbpp:split=train+test",
}


@pytest.mark.parametrize("line", COMMANDS.values(), ids=COMMANDS)
def test_commands(reader: Reader, line: str) -> None:
    (reader.place / "tmp.json").write_text('[{"text": "' + "low bits " * 60 + '"}]')
    reader.command(line)
    formats = line.partition("--format ")[2].split()[:1]
    assert len(reader.finished("tmp_autoround/*/")) == 1
    assert len(reader.finished("tmp_autoround/*/*/")) == (3 if formats == [ALL] else 0)


def test_words_about_the_commands(reader: Reader) -> None:
    assert "--scheme" in reader.command("auto-round -h")
    assert "gguf:q4_k_m" in reader.command("auto_round list format")


def test_several_processes(reader: Reader) -> None:
    """As a command and as a script, to the same bytes as one process where that is asked for."""
    short = "--iters 5 --nsamples 16 --seqlen 32 --deterministic"
    reader.command(f"torchrun --nproc-per-node 2 -m auto_round MODEL --output_dir two {short}")
    reader.command(f"env OMP_NUM_THREADS=1 auto_round MODEL --output_dir one {short}")
    one, two = (next((reader.place / name).rglob("model.safetensors")) for name in ("one", "two"))
    assert one.read_bytes() == two.read_bytes()
    (reader.place / "my_script.py").write_text(
        f"""{QUANTIZER}
name = {str(reader.models / "Qwen3-0.6B")!r}
AutoRound(name, iters=5, nsamples=16, seqlen=32).quantize_and_save("script")
"""
    )
    reader.command("torchrun --nproc-per-node 2 my_script.py")
    assert [folder.partition("/")[0] for folder in reader.finished()] == ["one", "script", "two"]


def test_machines_that_are_not_at_hand(reader: Reader) -> None:
    assert "H100" in reader.command("auto-round MODEL --dry_run --devices 8xH100")
    assert reader.finished() == []


def test_chat_template(reader: Reader) -> None:
    template = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] }}{% endfor %}"
    model = reader.place / "chat"
    save_small_model("qwen3", model, head_dim=32, **SIZES)
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.chat_template = template
    tokenizer.save_pretrained(model)
    for data in ("apply_chat_template", 'apply_chat_template:system_prompt="You help."'):
        words = f"NeelNanda/pile-10k:{data}"
        reader.run("auto-round", "--model", model, "--dataset", words, "--iters", "5", "--overwrite")


def test_the_quick_start_in_python_and_loading(reader: Reader) -> None:
    made = """
from transformers import AutoModelForCausalLM, AutoTokenizer
from auto_round import AutoRound
model = AutoModelForCausalLM.from_pretrained(name, torch_dtype="auto")
tokenizer = AutoTokenizer.from_pretrained(name)
AutoRound(model, tokenizer, bits=4, group_size=128, sym=True).quantize_and_save(out, format="auto_round")
"""
    reader.snippet(made)
    assert "finished already" in reader.snippet(made)
    for place in ("auto", "cpu"):
        load = (
            f'model = AutoModelForCausalLM.from_pretrained(folder, device_map="{place}", torch_dtype="auto")'
        )
        reader.snippet(LOAD + load + GENERATE, folder="./tmp_autoround")


@pytest.mark.parametrize(
    "arguments",
    [
        "nsamples=512, iters=1000, low_gpu_mem_usage=True, bits=4, group_size=128, sym=True",
        "nsamples=128, iters=50, lr=5e-3, bits=4, group_size=128, sym=True",
    ],
)
def test_other_recipes_in_python(reader: Reader, arguments: str) -> None:
    reader.snippet(
        f"""
from transformers import AutoModelForCausalLM, AutoTokenizer
from auto_round import AutoRound
model = AutoModelForCausalLM.from_pretrained(name, torch_dtype="auto")
AutoRound(model, AutoTokenizer.from_pretrained(name), {arguments}).quantize_and_save(out)
"""
    )
    assert reader.finished() == ["tmp_autoround"]


SNIPPETS = {
    "three formats": f'AutoRound(name, scheme="W4A16").quantize_and_save(out, format="{ALL}")',
    "best": 'AutoRound(model=name, scheme="W4A16", nsamples=512, iters=1000, low_gpu_mem_usage=True)'
    '.quantize_and_save(out, format="auto_round")',
    "light": 'AutoRound(model=name, scheme="W4A16", iters=50, lr=5e-3)'
    '.quantize_and_save(out, format="auto_round")',
    "no tuning": 'AutoRound(model=name, scheme="W4A16", iters=0).quantize_and_save(out, format="auto_round")',
    "gguf": 'AutoRound(model=name).quantize_and_save(out, format="gguf:q4_k_m")',
    "compiled": 'AutoRound(name, scheme="W4A16", enable_torch_compile=True, iters=20).quantize_and_save(out)',
    "texts": """
def texts():
    return ["A weight is rounded up or down, and which way is learned. " * 240]
AutoRound(name, dataset=texts(), iters=20).quantize_and_save(out)
""",
    "token ids": """
from transformers import AutoTokenizer
def tokens(tokenizer, seqlen=2048):
    texts = ["A weight is rounded up or down, and which way is learned. " * 240]
    return [tokenizer(t, truncation=True, max_length=seqlen, return_tensors="pt").data for t in texts]
AutoRound(name, dataset=tokens(AutoTokenizer.from_pretrained(name)), iters=20).quantize_and_save(out)
""",
    "registered data": 'AutoRound(name, dataset="NeelNanda/pile-10k:train", iters=20).quantize_and_save(out)',
    "two steps": """
rounder = AutoRound(name, iters=20)
rounder.quantize()
rounder.save_quantized(out, format="auto_round", inplace=True)
""",
    "deterministic": "AutoRound(name, enable_deterministic_algorithms=True, iters=20).quantize_and_save(out)",
}


@pytest.mark.parametrize("code", SNIPPETS.values(), ids=SNIPPETS)
def test_snippets(reader: Reader, code: str) -> None:
    reader.snippet(QUANTIZER + code)
    assert "tmp_autoround" in reader.finished()


def test_snippets_one_after_another_in_one_folder(reader: Reader) -> None:
    reader.command(COMMANDS["plain rounding"])
    for name in ("no tuning", "three formats", "gguf", "gguf", "no tuning"):
        reader.snippet(QUANTIZER + SNIPPETS[name])
        assert "tmp_autoround" in reader.finished()
    reader.command(COMMANDS["plain rounding"])
    assert len(reader.finished()) == 2


def test_a_scheme_for_each_layer(reader: Reader) -> None:
    begin = "from auto_round import AutoRound, AutoScheme\n"
    reader.snippet(
        begin
        + """
scheme = AutoScheme(avg_bits=3.0, options=("W2A16G64", "W4A16", "W8A16"))
AutoRound(model=name, scheme=scheme, iters=0, nsamples=1).quantize_and_save(out)
scheme = AutoScheme(avg_bits=3.0, options=("GGUF:Q2_K_S", "GGUF:Q4_K_S"), ignore_scale_zp_bits=True)
rules = {"lm_head": "GGUF:Q6_K"}
AutoRound(model=large, scheme=scheme, layer_config=rules, iters=0).quantize_and_save("second")
""",
        large=reader.models / "Qwen3-8B",
    )
    assert reader.finished() == ["second", "tmp_autoround"]
    reader.snippet(
        begin
        + """
shared_layers = [
    ["*.self_attn.k_proj", "v_proj", "q_proj", "out_proj"],
    ("model.decoder.layers.6.fc1", "model.decoder.layers.6.fc2"),
    ("fc1", "fc2"),
]
scheme = AutoScheme(avg_bits=5.0, options=("W4A16", "MXFP8"), shared_layers=shared_layers)
model, layer_config = AutoRound(model=name, scheme=scheme, iters=0, nsamples=1).quantize()
parts = [layer_config[f"model.decoder.layers.6.self_attn.{p}_proj"]["bits"] for p in ("q", "k", "v", "out")]
assert len(set(parts)) == 1
""",
        name=reader.models / "opt-125m",
    )


def test_mixed_bits(reader: Reader) -> None:
    reader.snippet(
        QUANTIZER
        + """
rules = {
    "model.decoder.layers.6.self_attn.out_proj": {"bits": 8, "group_size": 32},
    "model.decoder.layers.*k_proj": {"bits": 2, "group_size": 32},
}
rounder = AutoRound(name, layer_config=rules, iters=20)
rounder.quantize_and_save(out, format="auto_round")
assert rounder.layer_config["model.decoder.layers.6.self_attn.out_proj"]["bits"] == 8
assert rounder.layer_config["model.decoder.layers.3.self_attn.k_proj"]["group_size"] == 32
""",
        name=reader.models / "opt-125m",
    )


def test_devices_by_name_and_by_module(reader: Reader) -> None:
    """Without an accelerator: 0 is the CPU with a warning, others are not there; modules may be named."""
    said = reader.snippet(
        QUANTIZER
        + """
from auto_round.errors import ConfigError
AutoRound(model=name, device_map="0", iters=0, disable_opt_rtn=True).quantize()
try:
    AutoRound(model=name, device_map="0,1,2,3").quantize()
except ConfigError as error:
    print("refused:", error)
"""
    )
    assert "device 0: PyTorch sees no accelerator" in said
    assert 'refused: device "1" is not there: PyTorch sees no accelerator; use --device auto, or cpu' in said
    reader.snippet(
        """
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from auto_round import AutoRound
model = AutoModelForCausalLM.from_pretrained(name, torch_dtype="auto")
places = {n[2:]: "cpu" for n, m in model.model.layers.named_modules() if type(m) == torch.nn.Linear}
words = AutoTokenizer.from_pretrained(name)
rounder = AutoRound(
    model=model, tokenizer=words, device_map=places, nsamples=32, batch_size=4, low_gpu_mem_usage=True,
    seqlen=2048, iters=10,
)
rounder.quantize()
rounder.save_quantized(format="auto_awq", output_dir="tmp_autoround")
""",
        name=reader.models / "DeepSeek-R1-bf16",
    )
    assert reader.finished() == ["tmp_autoround"]


def test_inference_with_a_chosen_backend_and_of_other_formats(reader: Reader) -> None:
    reader.snippet(QUANTIZER + SNIPPETS["three formats"].replace('"W4A16"', '"W4A16", iters=0'))
    for folder in ("auto_gptq", "auto_awq"):
        for settings in ("", 'backend="ipex"', 'backend="torch"'):
            reader.snippet(
                LOAD
                + f"""
from transformers import AutoRoundConfig
model = AutoModelForCausalLM.from_pretrained(
    folder, device_map="cpu", quantization_config=AutoRoundConfig({settings}), torch_dtype="auto"
)
"""
                + GENERATE,
                folder=f"./tmp_autoround/{folder}",
            )
