"""Tasks of the harness: what is checked before work, what it is asked, and what is made of its answers."""

from __future__ import annotations

import importlib.util
import json
import sys

import pytest
import torch

from auto_round.cli import exit_codes
from auto_round.cli import main as cli
from auto_round.config import EvaluationOptions, FidelityOptions, ModelOptions
from auto_round.config.evaluation import DEFAULT_TASKS
from auto_round.errors import AutoRoundError, ConfigError, UnsupportedError
from auto_round.evaluate.evaluation import evaluate, failed_tasks, plan_evaluation
from auto_round.evaluate.task_names import find_tasks, match_tasks
from evaluate.stand_in_harness import KNOWN, stand_in
from export.gguf.small_models import save_small_model
from pipeline.runs import quantize


@pytest.fixture
def harness(monkeypatch):
    return stand_in(monkeypatch)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_small_model("llama", tmp_path_factory.mktemp("tasks") / "model")


def run(model, *, original=None, **given):
    plan = plan_evaluation(
        ModelOptions(model=str(model), device_map="cpu"),
        EvaluationOptions(**given),
        FidelityOptions(original=None if original is None else str(original)),
    )
    return evaluate(plan)


# --- before work


def test_a_missing_harness_is_said_with_the_line_that_installs_it(monkeypatch, model):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r'pip install "auto-round\[eval\]"'):
        run(model, tasks="piqa")


def test_a_missing_vllm_is_said(monkeypatch, model):
    stand_in(monkeypatch, vllm=False)
    true = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda n: None if n == "vllm" else true(n))
    with pytest.raises(ConfigError, match=r"vllm backend need vllm: pip install vllm$"):
        run(model, tasks="piqa", eval_backend="vllm")


def test_unknown_tasks_come_with_the_nearest_names(harness, model):
    with pytest.raises(ConfigError, match=r'unknown task "arc_eazy": did you mean "arc_easy"'):
        run(model, tasks="piqa,arc_eazy")
    assert not harness.calls


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"vllm_args": "a=1"}, "add --eval_backend vllm"),
        ({"eval_backend": "vllm", "eval_task_by_task": True}, "for the hf backend"),
        ({"eval_backend": "vllm", "vllm_args": "tensor"}, "expected name=value"),
        ({"eval_gen_kwargs": "=1"}, "expected name=value"),
        ({"include_path": "no-such"}, "no folder no-such"),
        ({"limit": "few"}, "number of questions"),
        ({"num_fewshot": -1}, "at least 0"),
        ({"eval_backend": "tgi"}, "hf, vllm"),
    ],
)
def test_wrong_requests(harness, model, given, words):
    with pytest.raises(ConfigError, match=words):
        run(model, tasks="piqa", **given)


def test_an_original_alone_is_nothing_to_do(harness, model):
    with pytest.raises(ConfigError, match="name --text FILE or --tasks"):
        run(model, original=model)


def test_vllm_and_gguf_files(harness, tmp_path):
    (tmp_path / "a.gguf").write_bytes(b"GGUF")
    with pytest.raises(UnsupportedError, match="by the hf backend"):
        run(tmp_path / "a.gguf", tasks="piqa", eval_backend="vllm")


def test_names_patterns_and_files(tmp_path):
    path = tmp_path / "own.yaml"
    path.touch()
    found, unknown = match_tasks(["mmlu_*", "piqa", str(path), "piqa", "nothing_*"], KNOWN)
    assert found == ("mmlu_law", "mmlu_logic", "piqa", str(path))
    assert unknown == ["nothing_*"]


def test_paths_begin_where_the_program_stood_when_it_gave_them(harness, model, tmp_path, monkeypatch):
    """Task files, the model, its original and a tokenizer, read when the program stands elsewhere."""
    there = tmp_path / "there"
    there.mkdir()
    (there / "own.yaml").touch()
    (there / "m").symlink_to(model)
    monkeypatch.chdir(there)
    plan = plan_evaluation(
        ModelOptions(model="m", tokenizer="m", device_map="cpu"),
        EvaluationOptions(tasks="own.yaml"),
        FidelityOptions(original="m"),
    )
    monkeypatch.chdir(tmp_path)
    evaluate(plan)
    asked = [call["tasks"] for call in harness.calls]
    assert asked == [[str(there / "own.yaml")]] * 2


def test_own_tasks_spare_the_reading_of_all_others(harness, tmp_path):
    options = EvaluationOptions(tasks="mine", include_path=str(tmp_path))
    assert find_tasks(options).names == ("mine",)
    assert [scan["include_defaults"] for scan in harness.scanned] == [False]
    find_tasks(EvaluationOptions(tasks="mine,piqa", include_path=str(tmp_path)))
    assert [scan["include_defaults"] for scan in harness.scanned[1:]] == [False, True]


def test_tasks_that_are_not_named_are_the_usual_ones():
    assert EvaluationOptions(tasks=[]).tasks == DEFAULT_TASKS
    assert EvaluationOptions(tasks="").tasks == DEFAULT_TASKS
    assert EvaluationOptions(tasks=["a,b", "c"]).tasks == ("a", "b", "c")
    assert EvaluationOptions().tasks is None


def test_nothing_asked_for_means_the_usual_tasks(harness, model):
    with pytest.raises(ConfigError, match=r"unknown task .*hellaswag"):
        run(model)


# --- what the harness is asked


def test_every_setting_reaches_the_harness(harness, model):
    run(
        model,
        tasks="piqa,arc_easy",
        limit=3,
        num_fewshot=2,
        eval_gen_kwargs="temperature=0",
        fewshot_as_multiturn=True,
        eval_bs=5,
        add_bos_token=True,
        eval_model_dtype="bf16",
    )
    (call,) = harness.calls
    assert call["tasks"] == ["piqa", "arc_easy"]
    assert (call["limit"], call["num_fewshot"], call["gen_kwargs"]) == (3, 2, "temperature=0")
    assert call["fewshot_as_multiturn"] is call["apply_chat_template"] is True
    made = call["model"]
    assert (made.batch_size, made.add_bos_token) == (5, True)
    assert made.pretrained.dtype is torch.bfloat16
    assert made.tokenizer.vocab_size


def test_on_a_cpu_the_number_of_questions_is_not_searched(harness, model):
    run(model, tasks="piqa")
    assert harness.calls[0]["model"].batch_size == 8
    assert harness.calls[0]["model"].pretrained.dtype is torch.float32


def test_quantized_folders_and_gguf_files_are_loaded(harness, model, tmp_path):
    plain = {"iters": 0, "disable_opt_rtn": True, "dataset": None, "verify": False}
    packed = quantize(model, tmp_path / "packed", format="auto_round", **plain).folders[0]
    file = quantize(model, tmp_path / "gguf", format="gguf:q8_0", group_size=None, **plain).folders[0]
    run(packed, tasks="piqa")
    run(file, tasks="piqa", original=model)
    loaded = [call["model"].pretrained for call in harness.calls]
    assert [type(m).__name__ for m in loaded] == ["LlamaForCausalLM"] * 3
    first, file_weights, original = (m.model.embed_tokens.weight.float() for m in loaded)
    assert torch.equal(first, original)
    assert 0 < (file_weights - original).abs().max() < 0.01


def test_vllm_gets_the_folder_and_its_arguments(harness, model, monkeypatch):
    for name in ("CUDA_VISIBLE_DEVICES", "ZE_AFFINITY_MASK", "HABANA_VISIBLE_MODULES"):
        monkeypatch.setenv(name, "4,5,6" if name.startswith("CUDA") else "")
    plan = plan_evaluation(
        ModelOptions(model=str(model), device_map="0,2"),
        EvaluationOptions(tasks="piqa", eval_backend="vllm", vllm_args="max_model_len=64", eval_bs=4),
        FidelityOptions(),
    )
    evaluate(plan)
    (engine,) = harness.engines
    assert engine["pretrained"] == str(model)
    assert engine["tensor_parallel_size"] == 2
    assert engine["max_model_len"] == "64"
    assert engine["batch_size"] == 4
    import os

    assert os.environ["CUDA_VISIBLE_DEVICES"] == "4,6"
    assert os.environ["ZE_AFFINITY_MASK"] == "0,2"


def test_vllm_args_win(harness, model):
    given = {"eval_backend": "vllm", "vllm_args": "tensor_parallel_size=1,dtype=float16"}
    run(model, tasks="piqa", eval_model_dtype="bf16", **given)
    assert harness.engines[0]["dtype"] == "float16"
    assert harness.engines[0]["tensor_parallel_size"] == "1"


# --- memory and failures


def test_smaller_batches_are_tried_for_a_task_that_has_no_room(harness, model):
    no_room = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")
    harness.fails = {("piqa", size): no_room for size in (16, 8)}
    found = run(model, tasks="arc_easy,piqa", eval_task_by_task=True, eval_bs=16)
    asked = [(call["tasks"], call["model"].batch_size) for call in harness.calls]
    assert asked == [(["arc_easy"], 16), (["piqa"], 16), (["piqa"], 8), (["piqa"], 4)]
    assert set(found["tasks"]) == {"arc_easy", "piqa"}


def test_a_task_that_fails_does_not_stop_the_others(harness, model):
    harness.fails = {
        ("piqa", 8): ValueError("no data"),
        **{("arc_easy", n): MemoryError() for n in (8, 4, 2, 1)},
    }
    found = run(model, tasks="piqa,arc_easy,mmlu_law", eval_task_by_task=True)
    assert failed_tasks(found) == ("piqa", "arc_easy")
    assert found["tasks"]["failed"]["piqa"] == "ValueError: no data"
    assert "one question at a time" in found["tasks"]["failed"]["arc_easy"]
    assert "mmlu_law" in found["tasks"]


@pytest.mark.parametrize("backend", ["hf", "vllm"])
def test_data_out_of_reach_are_said_with_a_remedy(harness, model, backend):
    """It was an unexpected error."""
    size = 8 if backend == "hf" else "auto"
    harness.fails = {("piqa", size): ConnectionError("Couldn't reach 'a/b' on the Hub")}
    with pytest.raises(ConfigError, match=r"data of piqa cannot be fetched .*'a/b'.*HF_DATASETS_OFFLINE"):
        run(model, tasks="piqa", eval_backend=backend)


def test_data_are_fetched_before_a_model_is_touched(harness, tmp_path, model):
    """They were after the model was loaded, and behind a run after hours of work."""
    harness.no_data = {"piqa": ConnectionError("Couldn't reach 'a/b' on the Hub")}
    with pytest.raises(ConfigError, match=r"data of piqa cannot be fetched .*OFFLINE=1; or run the others"):
        run(model, tasks="arc_easy,piqa")
    command = [str(model), "--output_dir", str(tmp_path / "out"), "--iters", "0", "--group_size", "32"]
    assert cli.main([*command, "--disable_opt_rtn", "--tasks", "piqa"]) == exit_codes.REQUEST
    assert not (tmp_path / "out").exists()
    assert harness.fetched == ["arc_easy", "piqa", "piqa"]
    assert not harness.calls


def test_a_library_that_only_says_that_it_failed_is_asked_why(harness, model):
    harness.no_data = {"piqa": RuntimeError("An error occurred")}
    harness.no_data["piqa"].__cause__ = ValueError("line 1 is no JSON")
    with pytest.raises(ConfigError, match=r"RuntimeError: An error occurred; ValueError: line 1 is no JSON"):
        run(model, tasks="piqa")


def test_task_by_task_the_others_are_run_as_long_as_there_are_some(harness, model, caplog, monkeypatch):
    monkeypatch.setattr("auto_round.log.logger.propagate", True)
    harness.no_data = {"piqa": FileNotFoundError("no questions.jsonl")}
    assert "arc_easy" in run(model, tasks="piqa,arc_easy", eval_task_by_task=True)["tasks"]
    assert "data of piqa cannot be fetched (FileNotFoundError: no questions.jsonl)" in caplog.text
    with pytest.raises(ConfigError, match="data of piqa"):
        run(model, tasks="piqa", eval_task_by_task=True)


def test_memory_that_ends_in_a_run_of_all_tasks(harness, model):
    harness.fails = {("piqa", 8): RuntimeError("DefaultCPUAllocator: can't allocate memory")}
    with pytest.raises(AutoRoundError, match="--eval_task_by_task"):
        run(model, tasks="piqa")


# --- answers


def test_results_are_plain_numbers(harness, model):
    harness.right = [{"piqa": [1.0, 1.0, 0.0, 1.0]}]
    found = run(model, tasks="piqa")
    assert found["tasks"] == {
        "piqa": {
            "name": "piqa",
            "version": 2,
            "num_fewshot": 0,
            "samples": 4,
            "metrics": {"acc": {"value": 0.75, "error": None}},
        }
    }
    json.dumps(found)


def test_flips_are_seen_where_the_share_of_right_answers_is_equal(harness, model):
    harness.right = [{"piqa": [1.0, 0.0, 1.0, 0.0]}, {"piqa": [0.0, 1.0, 1.0, 0.0]}]
    found = run(model, tasks="piqa", original=model)
    assert found["tasks"]["piqa"]["metrics"] == found["tasks_of_original"]["piqa"]["metrics"]
    assert found["flips"]["piqa"]["acc"] == {
        "right_to_wrong": 1,
        "wrong_to_right": 1,
        "samples": 4,
        "share": 0.5,
    }


# --- commands


def test_the_command_prints_a_table(harness, model, capsys):
    assert cli.main(["eval", str(model), "--tasks", "piqa", "arc_easy", "--device", "cpu"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[2].split() == ["task", "questions", "shots", "metric", "model"]
    assert lines[3].split() == ["piqa", "2", "0", "acc", "0.5000"]
    harness.right = [{"piqa": [0.0, 1.0]}, {"piqa": [1.0, 0.0]}]
    words = ["--model", str(model), "--eval", "--tasks=piqa", "--original", str(model), "--device", "cpu"]
    assert cli.main(words) == 0
    assert "100.0 % (1 lost, 1 won)" in capsys.readouterr().out


def test_a_failed_task_is_an_exit_code(harness, model, capsys):
    harness.fails = {("piqa", 8): ValueError("no data")}
    words = ["eval", str(model), "--tasks", "piqa", "--eval_task_by_task", "--device", "cpu"]
    assert cli.main(words) == 1
    assert "piqa gave nothing: ValueError: no data" in capsys.readouterr().out


RUN = ["--iters", "0", "--disable_opt_rtn", "--group_size", "32", "--no_verify", "--device", "cpu"]


def test_after_a_run_the_last_format_is_evaluated(harness, model, tmp_path, capsys):
    words = [
        str(model),
        *RUN,
        "--format",
        "fake,auto_round",
        "--output_dir",
        str(tmp_path),
        "--tasks",
        "piqa",
    ]
    assert cli.main(words) == 0
    folder = next(path.parent for path in tmp_path.rglob("auto_round/config.json"))
    loaded = harness.calls[0]["model"].pretrained
    assert loaded.config.quantization_config.quant_method == "auto-round"
    written = json.loads(folder.with_name("auto_round.evaluation.json").read_text())
    assert written["model"] == str(folder)
    assert written["tasks"]["piqa"]["metrics"]["acc"]["value"] == 0.5
    assert "0.5000" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("formats", "evaluated"),
    [
        ("gguf:q4_0,auto_round", "auto_round"),  # a run of its own, which is the second
        ("fake,gguf:q4_0", "gguf-q4_0"),  # one run, in which a file with a plan of its own is the first
        ("auto_round:gptq,auto_round", "auto_round"),
        ("auto_round,auto_round:gptq", "auto_round-auto_gptq"),
    ],
)
def test_the_last_format_is_evaluated_wherever_it_is_written(harness, model, tmp_path, formats, evaluated):
    given = [] if "gguf" in formats else ["--group_size", "32"]
    words = [str(model), *RUN[:3], *given, "--format", formats, "--output_dir", str(tmp_path)]
    assert cli.main([*words, "--device", "cpu", "--no_verify", "--tasks", "piqa"]) == 0
    (written,) = tmp_path.rglob("*.evaluation.json")
    assert written.name == f"{evaluated}.evaluation.json"


@pytest.mark.parametrize(
    "asked",
    [["--format", "gguf:q4_0"], ["--scheme", "GGUF:Q4_0"], ["--format", "gguf", "--scheme", "GGUF:Q4_0"]],
)
def test_after_a_run_a_gguf_file_is_evaluated(harness, model, tmp_path, asked):
    words = [str(model), *RUN[:3], *asked, "--output_dir", str(tmp_path), "--tasks", "piqa"]
    assert cli.main([*words, "--device", "cpu", "--no_verify"]) == 0
    assert type(harness.calls[0]["model"].pretrained).__name__ == "LlamaForCausalLM"


def test_unknown_tasks_are_refused_before_a_run(harness, model, tmp_path, capsys):
    words = [str(model), *RUN, "--output_dir", str(tmp_path / "out"), "--tasks", "pica"]
    assert cli.main(words) == 2
    assert 'did you mean "piqa"' in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert cli.main([*words, "--dry_run"]) == 2


def test_vllm_and_gguf_are_refused_before_a_run(harness, model, tmp_path, capsys):
    words = [str(model), "--iters", "0", "--format", "gguf:q4_0", "--output_dir", str(tmp_path / "out")]
    assert cli.main([*words, "--tasks", "piqa", "--eval_backend", "vllm"]) == 2
    assert "evaluated by the hf backend only" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_settings_without_tasks_are_said_to_do_nothing(harness, model, tmp_path, capsys):
    words = [str(model), *RUN, "--output_dir", str(tmp_path), "--eval_bs", "4", "--dry_run"]
    assert cli.main(words) == 0
    assert "--eval_bs: no effect without --tasks" in capsys.readouterr().err


def test_the_harness_is_imported_only_where_it_is_used(model, tmp_path, capsys):
    assert "lm_eval" not in sys.modules
    words = [str(model), *RUN, "--output_dir", str(tmp_path), "--dry_run"]
    assert cli.main(words) == 0
    assert "lm_eval" not in sys.modules
