"""Whose 4-bit kernel writes text fastest on a CPU?

Makes a random Llama of about 1B parameters, far larger than any cache, and decodes with it: in bfloat16, with
our int4 kernel, with GPTQModel's and with the other auto-round's best CPU kernels on our folders, and with
llama.cpp on Q4_0. Each runs in a process and a Python of its own, all are loaded at once, and they take turns
of a few tokens, so that a noisy machine slows all alike. The head stays at 16 bits everywhere.

    PEER_GPTQMODEL=... PEER_AUTO_ROUND=... PEER_LLAMA_CPP=... python benchmarks/cpu_decode_peers.py

The variables name Pythons with gptqmodel, with auto-round 0.16.1 and auto-round-lib, and with
llama-cpp-python and gguf; who is not named is left out. Prints one JSON line a round and one with the
medians: tokens a second, ratios to bfloat16, and the cosine of each one's logits after the prompt with those
of bfloat16, which shows that what was measured does multiply by the model.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

LAYERS, HIDDEN, INTERMEDIATE, HEADS, KV_HEADS, VOCABULARY = 16, 2048, 5632, 32, 8, 32000
GGUF_NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
PAUSE = 0.2
"""Seconds before each turn: threads of the one before spin that long at most."""


def make_model(folder: Path, layers: int) -> None:
    """A random bfloat16 model on disk."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from auto_round.testing.tiny_models import tiny_tokenizer

    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        intermediate_size=INTERMEDIATE,
        num_hidden_layers=layers,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        max_position_embeddings=4096,
        rms_norm_eps=1e-5,
        tie_word_embeddings=False,
        dtype=torch.bfloat16,
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(config).to(torch.bfloat16)
    generator = torch.Generator().manual_seed(0)
    state = {}
    for name, p in model.named_parameters():
        if p.dim() == 1:
            state[name] = torch.ones(p.shape, dtype=torch.bfloat16)
        else:
            state[name] = (torch.randn(p.shape, generator=generator) * p.shape[1] ** -0.5).bfloat16()
    model.load_state_dict(state, assign=True)
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)  # GPTQModel wants to see one


def quantize(model: Path, out: Path, group_size: int) -> dict[str, Path]:
    """The model rounded to 4 bits, in the formats that the peers read."""
    from auto_round import AutoRound

    rounded = AutoRound(model, bits=4, group_size=group_size, iters=0, disable_opt_rtn=True, device_map="cpu")
    _, folders = rounded.quantize_and_save(out, format="auto_round,auto_gptq", load=False)
    return dict(zip(("auto_round", "auto_gptq"), folders, strict=True))


def transformers_stepper(model):
    """Prompt or token ids -> logits of the last position, as a list of float."""
    import torch
    from transformers import DynamicCache

    cache = DynamicCache(config=model.config)

    def step(ids):
        with torch.inference_mode():
            return (
                model(torch.tensor([ids]), past_key_values=cache, logits_to_keep=1)
                .logits[0, -1]
                .float()
                .numpy()
            )

    return step


def load_transformers(folder: str, threads: int):
    """bfloat16, or whatever the auto_round package of this Python chooses."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(threads)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
    layer = model.model.layers[0].mlp.up_proj
    kernel = getattr(layer, "kernel", None)
    return transformers_stepper(
        model
    ), f"{type(layer).__module__}.{getattr(kernel, 'name', type(layer).__name__)}"


def load_gptqmodel(folder: str, threads: int):
    """The kernel that GPTQModel prefers on this CPU."""
    import torch
    from gptqmodel import BACKEND, GPTQModel

    torch.set_num_threads(threads)
    backend = BACKEND(os.environ.get("GPTQMODEL_BACKEND", "auto"))
    model = GPTQModel.load(folder, device="cpu", backend=backend, dtype=torch.bfloat16).model.eval()
    return transformers_stepper(model), type(model.model.layers[0].mlp.up_proj).__name__


def read_bfloat16(path: Path):
    """Names and float32 arrays of a safetensors file of bfloat16 tensors, one after the other."""
    import numpy as np

    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
        for name, entry in header.items():
            if name == "__metadata__":
                continue
            start, end = entry["data_offsets"]
            file.seek(8 + size + start)
            words = np.frombuffer(file.read(end - start), dtype="<u2").astype(np.uint32)
            yield name, (words << 16).view(np.float32).reshape(entry["shape"])


def write_gguf(folder: Path, out: Path, layers: int) -> None:
    """The model as llama.cpp reads it: blocks in Q4_0, embedding and head in F16, no vocabulary."""
    import gguf
    import numpy as np

    writer = gguf.GGUFWriter(out, "llama")
    writer.add_block_count(layers)
    writer.add_context_length(4096)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(INTERMEDIATE)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(VOCABULARY)
    writer.add_tokenizer_model("no_vocab")
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q4_0)
    outside = {
        "model.embed_tokens.weight": "token_embd",
        "model.norm.weight": "output_norm",
        "lm_head.weight": "output",
    }
    for path in sorted(folder.glob("*.safetensors")):
        for name, w in read_bfloat16(path):
            if name in outside:
                writer.add_tensor(
                    f"{outside[name]}.weight", w.astype(np.float16 if w.ndim > 1 else np.float32)
                )
                continue
            _, _, index, part = name.removesuffix(".weight").split(".", 3)
            if part in ("self_attn.q_proj", "self_attn.k_proj"):  # pairs of rotated numbers lie side by side
                heads = HEADS if part == "self_attn.q_proj" else KV_HEADS
                w = w.reshape(heads, 2, -1, w.shape[1]).swapaxes(1, 2).reshape(w.shape)
            target = f"blk.{index}.{GGUF_NAMES[part]}.weight"
            if w.ndim == 1:
                writer.add_tensor(target, w)
            else:
                kind = gguf.GGMLQuantizationType.Q4_0
                writer.add_tensor(target, gguf.quants.quantize(w, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def load_llama_cpp(folder: str, threads: int):
    """llama.cpp on Q4_0; the file is made here, since its packages are here."""
    import llama_cpp
    import numpy as np

    path = Path(folder)
    file = path.parent / "q4_0.gguf"
    write_gguf(path, file, json.loads((path / "config.json").read_text())["num_hidden_layers"])
    llama_cpp.llama_backend_init()
    model = llama_cpp.llama_model_load_from_file(str(file).encode(), llama_cpp.llama_model_default_params())
    parameters = llama_cpp.llama_context_default_params()
    parameters.n_ctx = 4096
    parameters.n_batch = parameters.n_ubatch = 512
    parameters.n_threads = parameters.n_threads_batch = threads
    context = llama_cpp.llama_init_from_model(model, parameters)

    def step(ids):
        tokens = (llama_cpp.llama_token * len(ids))(*ids)  # the batch points to it
        batch = llama_cpp.llama_batch_get_one(tokens, len(ids))
        if llama_cpp.llama_decode(context, batch):
            raise RuntimeError("llama_decode failed")
        return np.ctypeslib.as_array(llama_cpp.llama_get_logits_ith(context, -1), (VOCABULARY,)).copy()

    return step, f"llama_cpp {llama_cpp.__version__} Q4_0"


LOADERS = {"transformers": load_transformers, "gptqmodel": load_gptqmodel, "llama_cpp": load_llama_cpp}


def work(loader: str, folder: str, threads: int, prompt: int) -> None:
    """A worker: load, read the prompt, then write as many tokens as each line of standard input says."""
    import numpy as np

    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer
    step, kernel = LOADERS[loader](folder, threads)
    ids = [3 + (i * 7919) % (VOCABULARY - 3) for i in range(prompt)]
    begin = time.perf_counter()
    logits = step(ids)
    seconds = time.perf_counter() - begin
    np.save(sys.argv[-1], logits)
    print(json.dumps({"kernel": kernel, "prompt_s": seconds}), file=answers, flush=True)
    for line in sys.stdin:
        begin = time.perf_counter()
        for _ in range(int(line)):
            logits = step([int(logits.argmax())])
        print(json.dumps({"s": time.perf_counter() - begin}), file=answers, flush=True)


class Worker:
    """One contestant, waiting for its turn."""

    def __init__(self, name: str, python: str, arguments: list[str], threads: int, scratch: Path) -> None:
        own = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON") or python == sys.executable}
        own |= {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
        self.name, self.log, self.logits = name, scratch / f"{name}.log", scratch / f"{name}.npy"
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [python, __file__, "--work", *arguments, str(self.logits)],
                env=own,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
            )
        self.about = self.hear()

    def hear(self) -> dict:
        """The next answer."""
        line = self.process.stdout.readline()
        if not line:
            sys.exit(f"{self.name} failed:\n" + self.log.read_text()[-3000:])
        return json.loads(line)

    def turn(self, tokens: int) -> float:
        """Tokens a second."""
        time.sleep(PAUSE)
        self.process.stdin.write(f"{tokens}\n")
        self.process.stdin.flush()
        return tokens / self.hear()["s"]


def contestants(model: Path, scratch: Path, args: argparse.Namespace) -> list[Worker]:
    """Load everybody who is there, one after the other."""
    folders = quantize(model, scratch / "quantized", args.group_size)
    ours, theirs = sys.executable, os.environ.get
    table = [
        ("bf16", ours, "transformers", model),
        ("ours", ours, "transformers", folders["auto_round"]),
        ("gptqmodel", theirs("PEER_GPTQMODEL"), "gptqmodel", folders["auto_gptq"]),
        ("auto_round_0.16.1", theirs("PEER_AUTO_ROUND"), "transformers", folders["auto_round"]),
        ("llama_cpp", theirs("PEER_LLAMA_CPP"), "llama_cpp", model),
    ]
    found = []
    for name, python, loader, folder in table:
        if not python:
            print(json.dumps({"what": "absent", "name": name}), flush=True)
            continue
        arguments = [loader, str(folder), str(args.threads), str(args.prompt)]
        found.append(Worker(name, python, arguments, args.threads, scratch))
        print(json.dumps({"what": "loaded", "name": name, **found[-1].about}), flush=True)
    return found


def cosines(workers: list[Worker]) -> dict[str, float]:
    """Of each one's logits after the prompt with those of the first."""
    import numpy as np

    first, *_ = logits = [np.load(w.logits).astype(np.float64) for w in workers]
    norms = [float(np.linalg.norm(x)) for x in logits]
    return {w.name: float(first @ x) / (norms[0] * n) for w, x, n in zip(workers, logits, norms, strict=True)}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--layers", type=int, default=LAYERS)
    parser.add_argument("--group-size", type=int, default=128, help="of ours; that of Q4_0 is 32")
    parser.add_argument("--prompt", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--tokens", type=int, default=8, help="tokens that each writes in a round")
    parser.add_argument("--folder", type=Path, default=None, help="where there are 5 GB of room")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        scratch = Path(name)
        make_model(scratch / "model", args.layers)
        workers = contestants(scratch / "model", scratch, args)
        rounds = []
        for index in range(args.rounds + 1):
            speeds = {worker.name: worker.turn(args.tokens) for worker in workers}
            if index:  # the first round warms up
                rounds.append(speeds)
                print(
                    json.dumps(
                        {"what": "round", "tokens_per_s": {k: round(v, 2) for k, v in speeds.items()}}
                    ),
                    flush=True,
                )
        summary = {
            "what": "cpu_decode_peers",
            "tokens_per_s": {n: round(statistics.median(r[n] for r in rounds), 2) for n in rounds[0]},
            "ratio_to_bf16": {
                n: round(statistics.median(r[n] / r["bf16"] for r in rounds), 3) for n in rounds[0]
            },
            "ours_to_each": {
                n: round(statistics.median(r["ours"] / r[n] for r in rounds), 3) for n in rounds[0]
            },
            "prompt_tokens_per_s": {w.name: round(args.prompt / w.about["prompt_s"], 1) for w in workers},
            "cosine_of_logits": {n: round(c, 4) for n, c in cosines(workers).items()},
            "kernels": {w.name: w.about["kernel"] for w in workers},
            "threads": args.threads,
            "layers": args.layers,
            "group_size": args.group_size,
        }
        print(json.dumps(summary))
        for worker in workers:
            worker.process.stdin.close()
            worker.process.wait()


if __name__ == "__main__":
    if sys.argv[1:2] == ["--work"]:
        work(sys.argv[2], sys.argv[3], int(sys.argv[4]), int(sys.argv[5]))
    else:
        main()
