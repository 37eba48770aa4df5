"""The commands of the package: they read the words, do the work, and turn errors into one clear message."""

from __future__ import annotations

import atexit
import gc
import logging
import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from auto_round.cli import exit_codes
from auto_round.collector import quiet_collector
from auto_round.config import read_environment, unknown_variables
from auto_round.config.env import wait_shortly
from auto_round.errors import (
    AutoRoundError,
    ConfigError,
    InternalError,
    NothingQuantizedError,
    UnsupportedError,
    is_out_of_memory,
)
from auto_round.log import logger
from auto_round.ranks.place import Place, place


def main(argv: Sequence[str] | None = None) -> int:
    """Run `auto-round`; return the exit code."""
    return _run(argv, "default")


def main_best(argv: Sequence[str] | None = None) -> int:
    """Run `auto-round-best`."""
    return _run(argv, "best")


def main_light(argv: Sequence[str] | None = None) -> int:
    """Run `auto-round-light`."""
    return _run(argv, "light")


def main_distill(argv: Sequence[str] | None = None) -> int:
    """Run `auto-round-distill`."""
    return _run(argv, "distill")


def main_rtn(argv: Sequence[str] | None = None) -> int:
    """Run `auto-round-rtn`."""
    return _run(argv, "rtn")


def main_opt_rtn(argv: Sequence[str] | None = None) -> int:
    """Run `auto-round-opt-rtn`."""
    return _run(argv, "opt_rtn")


def main_eval(argv: Sequence[str] | None = None) -> int:
    """Run `auto-round-eval`."""
    return _run(["eval", *(sys.argv[1:] if argv is None else argv)], "default")


def _run(argv: Sequence[str] | None, recipe: str) -> int:
    """Run one command; no exception leaves, except the interpreter's own."""
    debug = False
    wait_shortly()
    try:
        level = read_environment().log_level
        debug = level in {"TRACE", "DEBUG"}
        with _log_on_stderr(level, place()), quiet_collector():
            atexit.register(_spare_the_last_collection)
            return _dispatch(sys.argv[1:] if argv is None else argv, recipe)
    except KeyboardInterrupt:
        _say("interrupted")
        return exit_codes.INTERRUPTED
    except BrokenPipeError:
        sys.stderr.close()
        return exit_codes.FAILED
    except Exception as error:  # noqa: BLE001  the one place where every failure becomes a message
        if debug:
            traceback.print_exc()
        _say(_message(error, debug=debug))
        if isinstance(error, NothingQuantizedError):
            return exit_codes.FAILED
        return exit_codes.REQUEST if isinstance(error, (ConfigError, UnsupportedError)) else exit_codes.FAILED


def _dispatch(argv: Sequence[str], recipe: str) -> int:
    from auto_round.cli import arguments

    command = arguments.parse(argv, recipe)
    if command.verb == "help":
        print(arguments.build_parser().format_help(), end="")
    elif command.verb == "version":
        from auto_round.version import __version__

        print(f"auto-round {__version__}")
    elif command.verb == "list":
        from auto_round.cli.listing import listing

        print(listing(command.topics))
    elif command.verb == "inspect":
        from auto_round.cli.inspect import inspect

        print(inspect(command.topics))
    elif command.verb == "convert":
        from auto_round.cli.convert import convert

        print(convert(command.topics))
    elif command.verb == "eval":
        from auto_round.cli.evaluate import evaluate

        return evaluate(command.topics)
    elif command.verb == "report":
        from auto_round.cli.report import report

        print(report(command.topics))
    else:
        from auto_round.cli.quantize import quantize

        _warn_of_unknown_variables()
        for note in command.notes:
            logger.warning(note)
        quantize(command.given, command.recipe, command.evaluation)
    return 0


def _spare_the_last_collection() -> None:
    """Skip the garbage collection at exit, unless a library would complain.

    The system frees all memory anyway. Libraries made with nanobind (Triton) check for leaks at exit and
    would print a page about them. They are found by the metaclass of their classes.
    """
    if all(kind.__module__ != "nanobind" for kind in type.__subclasses__(type)):
        gc.freeze()


@contextmanager
def _log_on_stderr(level: str, here: Place | None) -> Iterator[None]:
    """Show the log's lines while a command runs; a program that calls `main` has its own settings back.

    Of several processes only the first one says more than its errors.
    """
    before = logger.handlers, logger.propagate, logger.level
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter(f"{_who(here)}%(levelname)s: %(message)s"))
    logger.handlers, logger.propagate = [handler], False
    quiet = here is not None and here.rank and level not in {"TRACE", "DEBUG"}
    logger.setLevel("ERROR" if quiet else "DEBUG" if level == "TRACE" else level)
    try:
        yield
    finally:
        logger.handlers, logger.propagate = before[:2]
        logger.setLevel(before[2])


def _warn_of_unknown_variables() -> None:
    names = unknown_variables()
    if names:
        logger.warning("environment variable(s) without a meaning here: %s", ", ".join(names))


def _message(error: Exception, *, debug: bool) -> str:
    if isinstance(error, AutoRoundError) and not isinstance(error, InternalError):
        return f"error: {error}"
    if is_out_of_memory(error):
        return (
            "error: out of memory: try a smaller --batch_size, --seqlen or --nsamples; --dry_run says what "
            "a run needs and what there is"
        )
    hint = "" if debug else "; AR_LOG_LEVEL=DEBUG shows where"
    return f"error: unexpected {type(error).__name__}: {error}{hint}"


def _say(text: str) -> None:
    try:
        who = _who(place())
    except ConfigError:  # which is what is said
        who = ""
    print(f"auto-round: {who}{text}", file=sys.stderr, flush=True)


def _who(here: Place | None) -> str:
    """Which of several processes is speaking."""
    return "" if here is None else f"[rank {here.rank}] "
