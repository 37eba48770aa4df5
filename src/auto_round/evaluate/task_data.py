"""Data of tasks, which the harness fetches: before any long work, and what is said where there are none."""

from __future__ import annotations

from collections.abc import Mapping

from auto_round.errors import ConfigError
from auto_round.evaluate.task_names import Tasks
from auto_round.log import logger


def fetch_data(tasks: Tasks) -> None:
    """Have the harness read the data of all tasks; they stay in its cache.

    With task by task, what is missing is a warning as long as anything is there: the others are run.

    Raises:
        ConfigError: data of some tasks cannot be fetched or read.
    """
    from lm_eval.tasks import get_task_dict

    failed: dict[str, Exception] = {}
    for name in tasks.names:
        try:
            get_task_dict([name], tasks.manager)
        except Exception as error:  # noqa: BLE001  a task's data and code are other people's
            failed[name] = error
    if not failed:
        return
    refusal = no_data(failed, several=len(tasks.names) > 1 and not tasks.options.eval_task_by_task)
    if not tasks.options.eval_task_by_task or len(failed) == len(tasks.names):
        raise refusal from next(iter(failed.values()))
    logger.warning("%s", refusal)


def no_data(failed: Mapping[str, Exception], *, several: bool) -> ConfigError:
    """The error for tasks whose data cannot be had.

    Args:
        failed: task -> why.
        several: there are other tasks, which can be run without them.
    """
    others = "; or run the others (--eval_task_by_task)" if several else ""
    hubs = [error for error in failed.values() if isinstance(error, ConnectionError)]
    remedy = (
        ": ask once where there is a network, then set HF_HOME to that cache and HF_DATASETS_OFFLINE=1"
        if hubs
        else ""
    )
    reasons = dict.fromkeys(_words(error) for error in failed.values())
    return ConfigError(
        f"data of {', '.join(failed)} cannot be fetched ({'; '.join(reasons)}){remedy}{others}"
    )


def _words(error: BaseException) -> str:
    """What went wrong, with the cause where the library says no more than that it failed."""
    text = " ".join(str(error).split())[:300]
    said = text if isinstance(error, ConnectionError) else f"{type(error).__name__}: {text}"
    return said if error.__cause__ is None else f"{said}; {_words(error.__cause__)}"
