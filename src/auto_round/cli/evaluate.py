"""`auto-round eval`: how good a model is, and how far from its original."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import redirect_stdout

from auto_round.cli import exit_codes
from auto_round.cli.evaluate_words import eval_parser, read_words
from auto_round.cli.measured import evaluated
from auto_round.cli.progress import drawn_progress
from auto_round.cli.quantize import quiet_harness, quiet_transformers, set_threads
from auto_round.config import read_environment


def evaluate(words: Sequence[str]) -> int:
    """Do what the words say and print what came of it.

    Returns:
        An exit code: whether a task failed, or the model is further from its original than `--max_kl` allows.

    Raises:
        AutoRoundError: wrong words, or the evaluation is not possible.
    """
    parser = eval_parser()
    if {"-h", "--help"} & set(words) or not words:
        print(parser.format_help().rstrip())
        return exit_codes.OK
    request = read_words(parser, words)
    if request.output is not None:
        from auto_round.checkpoint.disk import refuse_file

        refuse_file(request.output)
    set_threads(read_environment().num_threads)
    quiet_transformers()
    quiet_harness()
    from auto_round.evaluate import evaluation

    with redirect_stdout(sys.stderr):
        plan = evaluation.plan_evaluation(request.model, request.evaluation, request.fidelity)
    with drawn_progress() as progress, redirect_stdout(sys.stderr):  # the harness prints
        found = evaluation.evaluate(plan, progress)
    print(evaluation.as_json(found) if request.json else evaluated(found))
    if request.output is not None:
        evaluation.write_json(found, request.output)
    if evaluation.failed_tasks(found):
        return exit_codes.FAILED
    return exit_codes.OK if found.get("gate", {"passed": True})["passed"] else exit_codes.TOO_FAR
