"""Options of a run by groups; flags, Python arguments and the manual come from here and the files beside."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from auto_round.config import values
from auto_round.config.option import Spec, option, settle
from auto_round.errors import ConfigError

_DTYPES = ("bf16", "bfloat16", "fp16", "float16", "fp32", "float32")
DTYPES = ("auto", *_DTYPES)
"""Dtypes of weights that may be asked for; "auto" for the checkpoint's own."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelOptions:
    """Which model, from where, and on which device."""

    model: str = option(
        "",
        Spec(
            "folder or hub name of the model to make small",
            flags=("model", "model_name", "model_name_or_path"),
            paths="read",
        ),
    )
    tokenizer: str | None = option(
        None, Spec("folder or hub name of the tokenizer; the model's own when not given", paths="read")
    )
    processor: str | None = option(
        None,
        Spec("folder or hub name of the processor for images; the model's own when not given", paths="read"),
    )
    image_processor: str | None = option(
        None, Spec("folder or hub name of another image processor than the processor's own", paths="read")
    )
    platform: str = option("hf", Spec("hub to download from", choices=("hf", "model_scope")))
    model_dtype: str | None = option(
        None,
        Spec("dtype the weights are cast to when read; the checkpoint's own when not given", choices=DTYPES),
    )
    trust_remote_code: bool = option(
        False,
        Spec(
            "run Python code that comes with the model; off unless asked", off=("disable_trust_remote_code",)
        ),
    )
    device_map: str | Mapping[str, str] = option(
        "auto",
        Spec(
            'where to tune: "auto", "cpu", "0", "cuda:0"; over several ("0,1") matrices are spread, or '
            "placed by names and patterns (from Python {name: device})",
            flags=("device_map", "device", "devices"),
            aliases=("device",),
            convert=values.device,
        ),
    )

    dist_backend: str = option(
        "auto",
        Spec(
            "how processes that torchrun started talk: a backend of torch.distributed; auto is nccl on CUDA, "
            "gloo elsewhere"
        ),
    )

    def __post_init__(self) -> None:
        settle(self)


_OF_LAYERS = (
    "scheme",
    "layer_config",
    "ignore_layers",
    "quant_lm_head",
    "quant_nontext_module",
    "quant_mtp",
    "to_quant_block_names",
)
"""Options of `SchemeOptions` that are no fields of a scheme: all others are called as the field is."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SchemeOptions:
    """How many bits, in which groups, and for which layers."""

    scheme: str | Mapping[str, Any] = option(
        "W4A16",
        Spec("preset name (auto-round list scheme); from Python also a dict or a QuantizationScheme"),
    )
    layer_config: Mapping[str, Any] | None = option(
        None,
        Spec(
            "schemes of layers by name, part of it or pattern: {k_proj:{bits:8}}, JSON or a .json file",
            convert=values.layer_rules,
        ),
    )
    bits: int | None = option(None, Spec("bits per weight, instead of the scheme's", low=1, high=32))
    group_size: int | None = option(
        None,
        Spec(
            "weights that share a scale; -1 one per output channel, 0 one per tensor; when not given the "
            "preset's, or 64 or 32 where that does not divide a row",
            low=-1,
        ),
    )
    sym: bool | None = option(
        None, Spec("symmetric grid, no zero points", off=("asym",), off_help="grid with zero points")
    )
    data_type: str | None = option(None, Spec("number type of the weights", flags=("data_type", "dtype")))
    act_bits: int | None = option(None, Spec("bits per activation", low=1, high=32))
    act_group_size: int | None = option(None, Spec("activations that share a scale", low=-1))
    act_sym: bool | None = option(None, Spec("symmetric grid for activations", off=("act_asym",)))
    act_data_type: str | None = option(
        None, Spec("number type of the activations", flags=("act_data_type", "act_dtype"))
    )
    act_dynamic: bool | None = option(
        None,
        Spec(
            "activation scales measured at run time",
            off=("disable_act_dynamic",),
            off_help="activation scales fixed at calibration",
        ),
    )
    super_bits: int | None = option(None, Spec("bits of the scales of two-level formats", low=1, high=32))
    super_group_size: int | None = option(None, Spec("groups in a super-block of two-level formats", low=1))
    scale_dtype: str | None = option(
        None,
        Spec(
            "dtype the scales are stored in; when not given fp16, of floating numbers and for "
            "llm_compressor the model's",
            choices=_DTYPES,
        ),
    )
    ignore_layers: tuple[str, ...] = option(
        (),
        Spec(
            "layers kept at 16 bits: comma list of names, partial names or patterns",
            flags=("ignore_layers", "fp_layers"),
            aliases=("fp_layers",),
            convert=values.names,
        ),
    )
    quant_lm_head: bool = option(False, Spec("quantize the output head too"))
    quant_nontext_module: bool = option(
        False, Spec("quantize the blocks of encoders for images and sound too, by data with images")
    )
    quant_mtp: bool = option(
        False,
        Spec("round layers for multi-token prediction too, which Transformers does not run: without data"),
    )
    to_quant_block_names: tuple[str, ...] = option(
        (), Spec("quantize only these blocks: comma list of names or prefixes", convert=values.names)
    )

    def __post_init__(self) -> None:
        settle(self)

    def overrides(self) -> dict[str, Any]:
        """Return the single scheme fields that the user set, ready for `parse_scheme`."""
        given = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in _OF_LAYERS}
        if self.scale_dtype:
            given["scale_dtype"] = long_dtype(self.scale_dtype)
        return {name: value for name, value in given.items() if value is not None}


@dataclass(frozen=True, slots=True, kw_only=True)
class CalibrationOptions:
    """The text that shows what the model's inputs look like."""

    dataset: str = option(
        "NeelNanda/pile-10k",
        Spec(
            'data sets, comma separated, each "name:key=value:..." (split, num, concat, apply_chat_template, '
            'system_prompt); "python-docs" and "self" need no network; .json, .jsonl, .txt and .parquet '
            "files work too",
            paths="data sets",
        ),
    )
    extra_data_dir: str | None = option(
        None,
        Spec(
            "folder of the images that calibration data name, also as image=FOLDER; beside the data when not "
            "given",
            paths="folders",
        ),
    )
    template: str | None = option(
        None,
        Spec(
            "chat template for rows with images, a .jinja file; the processor's own when not given",
            paths="read",
        ),
    )
    imatrix: str | None = option(
        None,
        Spec(
            "importances by llama-imatrix (.gguf, .dat) that steer rounding instead of data; GGUF, iters 0",
            paths="read",
        ),
    )
    nsamples: int = option(128, Spec("calibration rows", flags=("nsamples", "nsample"), low=1))
    seqlen: int = option(2048, Spec("tokens per row", flags=("seqlen", "seq_len"), low=2))
    expert_rows: int = option(
        0,
        Spec(
            "tokens that each expert should see: rows are added until it has, or the data end; 0 adds none",
            low=0,
        ),
    )
    seed: int = option(42, Spec("seed of every random choice", low=0, high=2**63 - 1))
    act_percentile: float = option(
        100.0,
        Spec(
            "percent of the calibration tokens whose activations fit into a scale that is fixed; the "
            "others saturate",
            low=1,
            high=100,
        ),
    )

    def __post_init__(self) -> None:
        settle(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class OutputOptions:
    """What is written, where, and what happens around the writing."""

    output_dir: str = option("tmp_autoround", Spec("folder the quantized model goes under", paths="written"))
    format: str = option(
        "auto_round",
        Spec(
            "comma list of file formats (auto-round list format)",
            flags=("format", "formats"),
            aliases=("formats",),
            convert=values.comma_list,
        ),
    )
    gguf_template: str | None = option(
        None,
        Spec(
            "16-bit GGUF file of the same model by llama.cpp's converter: names, metadata and tokenizer are "
            "taken from it",
            paths="read",
        ),
    )
    mmproj: str | None = option(
        None,
        Spec(
            "GGUF of a model that reads images: also write its encoder and projector, as a file of this type",
            choices=("f16", "q8_0"),
        ),
    )
    save_imatrix: str | None = option(
        None,
        Spec(
            "GGUF: file for the importances that this run measures, which llama.cpp and --imatrix read",
            paths="written",
        ),
    )
    max_shard_size: int = option(
        "5GB", Spec('largest weight file, for example "5GB" or "512MiB"', convert=values.size_bytes)
    )
    overwrite: bool = option(
        False, Spec("do again what is finished, and replace an older output that does not say what it is")
    )
    verify: bool = option(
        True,
        Spec(
            "reload what was written and compare it with the model in memory",
            off=("no_verify",),
            off_help="do not reload what was written to compare it",
        ),
    )
    resume: bool = option(
        True,
        Spec(
            "continue an interrupted run of the same job on this machine",
            off=("no_resume",),
            off_help="begin anew where a run of the same job was interrupted",
        ),
    )
    report: bool = option(
        False,
        Spec("draw report.html: plan, losses, size and quality, time and memory on one page"),
    )
    dry_run: bool = option(False, Spec("print plan, memory, disk and time, then stop"))

    def __post_init__(self) -> None:
        settle(self)
        if not self.formats:
            raise ConfigError('option "format" is empty: expected a comma list such as "auto_round"')

    @property
    def formats(self) -> tuple[str, ...]:
        """Format names in the order given, lower case, with `_` between words, each once."""
        return tuple(dict.fromkeys(name.casefold().replace("-", "_") for name in values.names(self.format)))


def long_dtype(name: str) -> str:
    """Return `"float16"` for `"fp16"` and so on; long names stay."""
    return {"fp16": "float16", "bf16": "bfloat16", "fp32": "float32"}.get(name, name)
