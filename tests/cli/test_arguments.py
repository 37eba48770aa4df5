"""The command line: every flag that users know is understood or answered plainly."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from auto_round.cli.arguments import build_parser, parse
from auto_round.cli.evaluate_words import eval_parser, read_words
from auto_round.cli.main import main
from auto_round.config import RECIPES, EvaluationOptions, all_settings, build_options
from auto_round.errors import ConfigError, UnsupportedError

PLAIN = """
--model_dtype bf16 | --platform hf | --platform model_scope | --scheme W4A16 | --batch_size 4
--train_bs 4 | --bs 4 | --iters 5 | --iter 5 | --seqlen 512 | --seq_len 512 | --nsamples 3 | --nsample 3
--device_map 0 | --device cpu | --devices 0,1 | --dataset x.jsonl,mbpp:num=3 | --seed 1 | --adam
--enable_adam | --low_gpu_mem_usage | --low_cpu_mem_usage | --disable_low_cpu_mem_usage
--format auto_round | --formats fake | --output_dir out | --not_use_best_mse | --enable_torch_compile
--disable_torch_compile | --disable_trust_remote_code | --trust_remote_code | --lr 0.1 | --minmax_lr 1e-3
--momentum 0.9 | --gradient_accumulate_steps 2 | --nblocks 2 | --scale_dtype fp32
--scale_dtype bfloat16 | --disable_amp | --disable_minmax_tuning | --enable_norm_bias_tuning
--disable_quanted_input | --to_quant_block_names a,b | --disable_deterministic_algorithms
--enable_deterministic_algorithms | --disable_opt_rtn | --enable_opt_rtn | --bits 3 | --group_size 64
--group_size -1 | --act_bits 16 | --act_group_size 0 | --super_bits 6 | --super_group_size 8
--data_type int | --dtype int | --act_data_type int | --act_dtype int | --asym | --sym
--disable_act_dynamic | --act_asym | --quant_lm_head | --ignore_layers a,b | --fp_layers a
--dynamic_max_gap 5 | --layer_config {k_proj:{bits:8}} | --dry_run | --no_verify | --no_resume
--overwrite | --max_shard_size 2GB | --model_free | --disable_model_free | --tokenizer t | --recipe best
--no_amp | --no_low_gpu_mem_usage | --enable_alg_ext | --enable_lfq
--static_kv_dtype fp8 --static_kv_granularity head | --static_attention_dtype float8_e4m3fn
--static_attention_dtype fp8 --static_attention_granularity tensor
--mllm | --quant_nontext_module | --extra_data_dir d | --template t | --processor p | --image_processor p
"""
EVALUATION = """
--tasks | --tasks mmlu,piqa | --task a b | --eval_bs 4 | --limit 0.5 | --eval_task_by_task
--eval_backend vllm | --eval_backend vllm --vllm_args=tensor_parallel_size=2,gpu_memory_utilization=0.8
--eval_model_dtype bf16 | --add_bos_token | --num_fewshot 2 | --eval_gen_kwargs a=1 | --eval_bs auto:8
--fewshot_as_multiturn | --include_path d | --no_eval_task_by_task
"""
LATER = """
--vlmeval
--lmms | --algorithm awq
--alg awq+signround | --awq_duo_scaling True | --awq_n_grid 20 | --awq_seqlen 3
--awq_smooth_batch_size 3 | --awq_apply_clip | --awq_clip_as_init | --svdquant-rank 32
--enable-svdquant-smooth | --svdquant-smooth-num-grids 20 | --svdquant-low-rank-dtype bf16
--svdquant-smooth-max-calibration-calls 128 | --svdquant-residual-iters 1
--enable-svdquant-residual-early-stop | --svdquant-target-modules a | --svdquant-exclude-modules b
--svdquant-model-adapter flux | --rotation_type hadamard | --rotation_backend auto
--rotation_block_size 32 | --no-fuse_online_to_weight | --fuse-online-to-weight | --allow_online_rotation
--no-allow-online-rotation
"""


GUIDE = """
--model Qwen/Qwen3-0.6B --scheme W4A16 --format auto_gptq,auto_awq,auto_round
--model Qwen/Qwen3-0.6B --bits 4 --group_size 128 --format auto_gptq,auto_round --output_dir ./out
--model Qwen/Qwen3-0.6B --bits 4 --group_size 128 --low_gpu_mem_usage
--model Qwen/Qwen3-0.6B --scheme W4A16 --device_map auto
--model_name Qwen/Qwen3-0.6B --scheme W4A16 --quant_lm_head --format auto_round
--model Qwen/Qwen3-0.6B --dataset ./tmp.json,NeelNanda/pile-10k:num=256,mbpp:num=128
Qwen/Qwen3-0.6B --bs 1 --gradient_accumulate_steps 8
--model_name m --avg_bits 6 --options mxfp4,mxfp8 --ignore_scale_zp_bits --iters 0 --format fake
m --target_bits 5 --options W4A16,W8A16 --shared_layers fc1 fc2 --shared-layers a b,c
m --target_size 4.2GB --options gguf:q2_k_s,gguf:q4_k_s --score_method kl
m --target_kl 0.02 --options W4A16,BF16 --score_nsamples 4
"""
GUIDE_EVALUATION = """
--model Qwen/Qwen3-0.6B --bits 4 --format auto_round,auto_gptq --tasks mmlu
--model Qwen/Qwen3-0.6B --bits 4 --format auto_round,auto_gptq --tasks mmlu --eval_backend vllm
"""
GUIDE_EVAL = """
--model=your_model_path --eval --device_map 0,1 --tasks lambada_openai --eval_bs 16
your_model_path --eval --device_map 0,1 --tasks lambada_openai --eval_backend vllm
your_model_path --eval --tasks lambada_openai --eval_backend vllm --vllm_args=gpu_memory_utilization=0.8
quantize your_model_path --eval
"""


@pytest.mark.parametrize("line", GUIDE_EVALUATION.strip().splitlines())
def test_a_run_with_tasks_behind_it(line):
    command = parse(line.split())
    build_options(command.given, command.recipe)
    assert EvaluationOptions(**command.evaluation).tasks == ("mmlu",)


@pytest.mark.parametrize("line", GUIDE_EVAL.strip().splitlines())
def test_eval_flag_is_the_eval_command(line):
    command = parse(line.split())
    assert command.verb == "eval"
    request = read_words(eval_parser(), command.topics)
    assert request.model.model == "your_model_path"


@pytest.mark.parametrize(
    "flags", [part.strip() for part in EVALUATION.replace("\n", "|").split("|") if part.strip()]
)
def test_every_flag_of_evaluation(flags):
    words = flags.split()
    command = parse(["--model", "m", *words])
    assert command.evaluation
    assert command.given == {"model": "m"}
    EvaluationOptions(**command.evaluation)
    read_words(eval_parser(), ["--model", "m", *words])


@pytest.mark.parametrize("line", GUIDE.strip().splitlines())
def test_command_lines_of_the_guide(line):
    command = parse(line.split())
    build_options(command.given, command.recipe)


def lines(table: str) -> list[list[str]]:
    return [
        entry.split() for line in table.strip().splitlines() for entry in line.split("|") if entry.strip()
    ]


def dashed(words: list[str]) -> list[str]:
    flag, equals, value = words[0].partition("=")
    return ["--" + flag[2:].replace("_", "-") + equals + value, *words[1:]]


@pytest.mark.parametrize("words", lines(PLAIN), ids=" ".join)
def test_flags_in_both_spellings(words):
    first = parse(["m", *words])
    assert first.verb == "quantize"
    assert first == parse([*dashed(words), "m"])
    assert first == parse(["quantize", *words, "--model=m"])
    build_options(first.given, first.recipe)


@pytest.mark.parametrize("words", lines(LATER), ids=" ".join)
def test_flags_of_later_work_say_so(words):
    for spelled in (words, dashed(words)):
        with pytest.raises(UnsupportedError, match="not there yet") as caught:
            parse(["--model", "m", *spelled])
        assert words[0].partition("=")[0].replace("-", "_")[2:] in str(caught.value)


@pytest.mark.parametrize("flag", ["--model", "--model_name", "--model-name-or-path"])
def test_the_model_may_be_bare_or_named(flag):
    assert parse([flag, "a/b"]) == parse(["a/b"]) == parse([f"{flag}=a/b", "a/b"])


def test_every_switch_has_a_no_form_and_every_option_is_in_the_help():
    text = build_parser().format_help()
    for setting in all_settings():
        if not setting.spec.cli:
            continue
        if setting.kind == "flag":
            assert parse(["m", f"--no-{setting.flags[0]}"]).given[setting.name] is False
            assert parse(["m", f"--{setting.flags[0]}"]).given[setting.name] is True
        shown = {*setting.flags[:1], *setting.spec.off[:1]}
        assert any(f"--{flag}" in text for flag in shown)


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["m", "--iterss", "5"], '"--iters"'),
        (["m", "--grupsize=64"], '"--group_size"'),
        (["m", "-z"], "unknown flag -z"),
        (["m", "n"], "one model at a time"),
        (["m", "--format", "auto_round", "auto_gptq"], "commas between them"),
        (["--model", "m", "--options", "mxfp4", "mxfp8"], "commas between them"),
        (["m", "--sym", "true"], "a switch takes no value"),
        (["--model", "m", "--low_gpu_mem_usage", "False"], "a switch takes no value"),
        (["m", "--model", "n"], "two models"),
        (["--iters", "5"], "no model"),
        (["m", "--iters"], "--iters"),
        (["m", "--iters", "many"], "whole number"),
        (["m", "--iters", "-4"], "at least 0"),
        (["m", "--bits", "4.5"], "whole number"),
        (["m", "--lr", "fast"], "a number"),
        (["m", "--platform", "modelscope"], "model_scope"),
        (["m", "--scale_dtype", "fp8"], "fp16"),
        (["m", "--sym", "--asym"], "not allowed with"),
        (["m", "--enable_opt_rtn", "--disable_opt_rtn"], "not allowed with"),
        (["m", "--recipe", "worst"], "best"),
        (["m", "--max_shard_size", "big"], "5GB"),
    ],
)
def test_errors(words, text):
    with pytest.raises(ConfigError) as caught:
        parse(words)
    assert text in str(caught.value)


@pytest.mark.parametrize("recipe", RECIPES)
def test_recipe_by_command_or_by_flag(recipe):
    assert parse(["m"], recipe).recipe == recipe
    assert parse(["m", "--recipe", recipe]).recipe == recipe


@pytest.mark.parametrize(
    ("words", "verb", "topics"),
    [
        (["list"], "list", ()),
        (["list", "formats"], "list", ("formats",)),
        (["--list", "format"], "list", ("format",)),
        (["--list"], "list", ()),
        (["help"], "help", ()),
        (["help", "quantize"], "help", ()),
        (["help", "list"], "list", ("--help",)),
        (["list", "--help"], "list", ("--help",)),
        (["list", "format", "-h"], "list", ("format", "-h")),
        (["help", "inspect"], "inspect", ("--help",)),
        (["help", "convert"], "convert", ("--help",)),
        (["quantize", "-h"], "help", ()),
        ([], "help", ()),
        (["--version"], "version", ()),
    ],
)
def test_other_commands(words, verb, topics):
    command = parse(words)
    assert (command.verb, command.topics) == (verb, topics)


def test_values_keep_their_dashes():
    given = parse(["some-model", "--dataset=a-b.jsonl:num=3", "--output-dir", "x-y"]).given
    assert given == {"model": "some-model", "dataset": "a-b.jsonl:num=3", "output_dir": "x-y"}


@settings(deadline=None)
@given(
    st.lists(
        st.text(alphabet="-_abim= 4{", max_size=8) | st.sampled_from(["--bits", "--iters", "m", "4"]),
        max_size=4,
    )
)
def test_any_words_are_read_or_refused(words):
    try:
        command = parse(words)
    except (ConfigError, UnsupportedError):
        return
    assert command.verb in {"quantize", "list", "help", "version"}


def test_reading_the_command_line_loads_nothing_heavy():
    code = (
        "import sys; from auto_round.cli.main import main; assert main(['--help']) == 0; "
        "assert main(['m', '--iters', 'x']) == 2; import auto_round; "
        "heavy = {'torch', 'transformers', 'datasets', 'rich', 'numpy', 'safetensors'} & set(sys.modules); "
        "sys.exit(', '.join(sorted(heavy)) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("words", [["list", "--help"], ["help", "list"], ["list", "format", "-h"]])
def test_help_of_list_says_what_there_is_to_list(words, capsys):
    """It was the help of the main command."""
    assert main(words) == 0
    assert capsys.readouterr().out.startswith("usage: auto-round list [format | scheme | dataset | backend]")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("help evl", 'no command "evl": did you mean "eval"'),
        ("evaluate some-model", 'no command "evaluate": did you mean "eval"'),
        ("inspct folder --json", "unknown flag --json"),
        ("inspct folder", 'no command "inspct": did you mean "inspect"'),
        ("inspect folder --jsn", r'unknown flag --jsn: did you mean "--json"\?.*inspect --help'),
        ("inspect folder other", 'unexpected "other"'),
        ("convert folder --fromat x", 'did you mean "--format"'),
        ("report folder --out x", 'did you mean "--output"'),
        ("m --memory tiny", "expected one of auto, low, lowest$"),
    ],
)
def test_misspelt_commands_and_their_flags(words, said, capsys):
    assert main(words.split()) == 2
    assert re.search(said, capsys.readouterr().err)
