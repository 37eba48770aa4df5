"""What the commands print: units, progress lines, summary, folder names."""

from __future__ import annotations

import io
import shlex
from pathlib import Path

import pytest

from auto_round.cli.arguments import parse
from auto_round.cli.output_folder import folder_name, with_named_folder
from auto_round.cli.progress import drawn_progress, event_line
from auto_round.cli.summary import summary
from auto_round.config import build_options
from auto_round.log import Progress
from auto_round.pipeline.result import Result
from auto_round.schemes import parse_scheme
from auto_round.schemes.plan import Plan
from auto_round.units import duration, gain, rough_duration, size


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0 B"), (999, "999 B"), (4096, "4.1 kB"), (5e9, "5 GB"), (2.5e12, "2.5 TB")]
)
def test_size(count, text):
    assert size(count) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.04, "0.0 s"),
        (9.94, "9.9 s"),
        (42, "42 s"),
        (59.6, "1 min 00 s"),
        (185, "3 min 05 s"),
        (7620, "2 h 07 min"),
    ],
)
def test_duration(seconds, text):
    assert duration(seconds) == text


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.04, "1 s"), (89.4, "89 s"), (185, "3 min"), (5399, "90 min"), (7620, "2.1 h")]
)
def test_rough_duration(seconds, text):
    assert rough_duration(seconds) == text


def test_gain():
    assert gain(2.0, 1.0) == "2 -> 1 (-50 %)"
    assert gain(0.0, 1.0) == "0 -> 1"


EVENT = Progress("tune", 3, 28, "model.layers.2", 0.5, 1.0, 60.0, 125.0, 1_500_000_000)


def test_describe_says_block_loss_time_and_memory():
    text = event_line(EVENT)
    for part in ("tuning 3/28", "model.layers.2", "1 -> 0.5 (-50 %)", "2 min 05 s left", "peak 1.5 GB"):
        assert part in text


def test_a_run_without_steps_does_not_say_that_it_tunes():
    assert event_line(Progress("tune", 1, 6, "model.layers.0")).startswith("rounding 1/6")


def test_plain_lines_show_every_block_and_thin_out_the_rest():
    stream = io.StringIO()
    with drawn_progress(stream) as show:
        for done in range(1, 101):
            show(Progress("calibrate", done, 100, seconds=done / 10))
        for done in range(1, 4):
            show(Progress("tune", done, 3, f"b{done}", 0.5, 1.0, 10 + done / 10))
    lines = stream.getvalue().splitlines()
    assert [line for line in lines if line.startswith("tuning")] == [
        f"tuning {n}/3  b{n}  loss 1 -> 0.5 (-50 %)" for n in (1, 2, 3)
    ]
    assert 2 <= len(lines) - 3 <= 4
    assert lines[-4].startswith("calibrating 100/100")


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_terminal_gets_a_bar_and_a_line_per_block():
    stream = Terminal()
    with drawn_progress(stream) as show:
        show(Progress("load", 1, 1))
        show(EVENT)
    assert "model.layers.2" in stream.getvalue()


def result(folders, **report):
    return Result(folders, Plan(parse_scheme("W4A16"), {}), report, 61.0, 10**9)


def test_a_folder_that_grew_is_not_called_smaller(tmp_path):
    grown = result((tmp_path,), bytes_before=95_000, bytes_after={"auto_round": 97_000})
    assert "95 kB -> 97 kB (1.02 times as large)" in summary(grown)


def test_summary_holds_what_the_report_holds(tmp_path):
    full = summary(
        result(
            (tmp_path,),
            bytes_before=4_000_000,
            bytes_after={"auto_round": 1_000_000},
            held_out={"perplexity_before": 10.0, "perplexity_after": 11.0, "kl": 0.02},
            distillation={"steps": 20, "kept_step": 18, "kl_before": 0.04, "kl_best": 0.02},
            verified={"auto_round": {"kl": 1e-6, "sample": "a line\nand more"}},
        )
    )
    for part in (
        str(tmp_path),
        "4 MB -> 1 MB (4.00 times smaller)",
        "10 -> 11 (+10.00 %)",
        "0.02 nats",
        "KL 0.04 -> 0.02 (-50 %) by step 18 of 20 of all blocks",
        "auto_round: KL 1e-06",
        "'a line\\nand more'",
        "1 min 01 s, peak memory 1 GB",
    ):
        assert part in full
    bare = summary(result((tmp_path, tmp_path), bytes_before=2, bytes_after={"a": 1, "b": 2}))
    assert bare.count("written") == 2
    assert "not measured" in bare


def summary_of_one_far_off(folder, **more):
    far = {"bound": 0.3, "largest_errors": {"up": 0.2, "down": 0.1}}
    held_out = {"perplexity_before": 1.0, "perplexity_after": 2.0, "kl": 0.5}
    report = {"bytes_before": 2, "bytes_after": {"a": 1}, "bits_per_quantized_weight": 2.25} | more
    hard = {"far_from_the_original": far}
    return summary(result((folder,), held_out=held_out, hard_cases=hard, **report))


@pytest.mark.parametrize(
    ("more", "remedy"),
    [
        ({}, "--layer_config '{up: {bits: 4}}'"),
        ({"bits_per_quantized_weight": 4.25}, "--layer_config '{up: {bits: 8}}'"),
        ({"auto_scheme": {"reached": "3 bits"}}, "give AutoScheme a larger budget"),
    ],
)
def test_the_remedy_of_a_model_far_off_is_one_of_its_run(tmp_path, more, remedy):
    text = summary_of_one_far_off(tmp_path, **more)
    assert remedy in text
    assert "--distill_steps" in text


def test_a_run_that_tuned_all_blocks_together_is_not_told_to(tmp_path):
    together = {"steps": 20, "kept_step": 18, "kl_before": 0.04, "kl_best": 0.02}
    text = summary_of_one_far_off(tmp_path, distillation=together)
    assert "far off" in text
    assert "--distill_steps" not in text


@pytest.mark.parametrize(
    ("model", "given", "wanted"),
    [
        ("Qwen/Qwen3-0.6B", {}, "Qwen3-0.6B-w4g128"),
        ("Qwen/Qwen3-0.6B/", {"bits": 2, "group_size": 64}, "Qwen3-0.6B-w2g64"),
        ("m", {"scheme": "W8A16", "group_size": -1}, "m-w8a16"),
        ("m", {"scheme": {"bits": 4, "group_size": 0, "act_bits": 8, "act_data_type": "fp"}}, "m-w4afp8"),
        ("m", {"format": "gguf:q4_k_m"}, "m-gguf"),
        ("m", {"scheme": "BF16"}, "m-w16a16"),
        ("m", {"bits": 16}, "m-w16a16"),
    ],
)
def test_folder_names(model, given, wanted, tmp_path):
    options = with_named_folder(build_options({"model": model, "output_dir": str(tmp_path), **given}))
    assert options.output.output_dir == str(tmp_path / wanted)


def test_folder_of_a_local_model(tmp_path, monkeypatch):
    (tmp_path / "tiny").mkdir()
    monkeypatch.chdir(tmp_path / "tiny")
    assert folder_name(".", parse_scheme("W4A16")) == "tiny-w4g128"


def test_commands_of_the_readme_name_the_folder_that_the_first_one_writes():
    readme = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
    shown = readme.split("## Use it")[1].split("```bash\n")[1].split("```")[0]
    lines = [line for line in shown.splitlines() if line.startswith("auto-round")]
    commands = [parse(shlex.split(line, comments=True)[1:]) for line in lines]
    made = with_named_folder(build_options(commands[0].given)).output.output_dir
    assert lines[0].endswith(f"# ./{made}")
    assert [c.verb for c in commands if c.verb != "quantize"] == ["inspect", "convert", "eval", "report"]
    assert all(c.verb == "quantize" or c.topics[0] == Path(made).name for c in commands)
