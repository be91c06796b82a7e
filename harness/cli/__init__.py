"""One small file per verb, imported when it is typed. What a user did wrong becomes one line here, and nowhere else."""

from __future__ import annotations

import argparse
import errno
import importlib
import logging
import os
import shlex
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from harness import __version__
from harness.progress import printable

VERBS = {  # each a module beside this one, and what `--help` says of it
    "run": "compress, score and rank",
    "plan": "cells, candidates and exact stored bits, without loading a model",
    "bench": "measure memory and latency again, or products of a model's shapes",
    "report": "tables, pictures and report.html of finished runs",
    "check": "compare a leaderboard with a baseline",
    "compare": "two runs side by side, or a run's rows against one of them",
    "export": "a compressed model as a folder or file that other programs load",
    "kld": "a cell against llama.cpp's file of log-probabilities, or such a file of it",
    "recommend": "the rows of a run that are worth having within limits of memory, bits and speed",
    "ls": "list methods, models, protocols, tasks or runs",
    "verify": "re-hash the cache and name what is damaged",
    "clean": "remove old cells from the cache",
}


def main(argv: Sequence[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else list(argv)
    arguments = _parser(argv).parse_args(argv)
    arguments.typed = argv
    try:
        with _told_to_end(_level(arguments)):
            code = arguments.main(arguments)
            sys.stdout.flush()
            return code
    except BrokenPipeError:  # `| head` has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except ValueError as error:  # bad input: what to type next
        print(f"harness {arguments.verb}: {printable(str(error).strip())}", file=sys.stderr)
        return 2
    except OSError as error:  # a folder that cannot be read or written, a full disk
        print(f"harness {arguments.verb}: {printable(_advice(error).strip())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as stop:
        kept = getattr(stop, "kept", "") or "what is finished is kept"
        again = shlex.join([*_program().split(), *(word for word in argv if word != "--fresh")])
        print(f"\nstopped; {kept}; the same command goes on from here:\n  {again}", file=sys.stderr)
        return 128 + (signal.SIGTERM if isinstance(stop.__cause__ or stop, Terminated) else signal.SIGINT)


def _parser(argv: Sequence[str]) -> argparse.ArgumentParser:
    """Of all verbs by name, or of the one that is typed with its options."""
    parser = argparse.ArgumentParser(
        prog=_program(), description="Compare quantisation methods at one stored-bit budget."
    )
    parser.add_argument("--version", action="version", version=__version__)
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    if argv and argv[0] in VERBS:
        importlib.import_module(f"{__name__}.{argv[0]}").register(verbs)
        return parser
    for name, text in VERBS.items():
        verbs.add_parser(name, help=text)
    return parser


class Terminated(KeyboardInterrupt):
    """SIGTERM: the same as Ctrl-C, with an exit status of its own."""


@contextmanager
def _told_to_end(level: int = logging.INFO) -> Iterator[None]:
    """SIGTERM and a lost terminal end the work as Ctrl-C does; what the cache has to say is printed, from this level
    on."""

    def end(number: int, frame: FrameType | None) -> None:
        raise Terminated

    logger = logging.getLogger("harness")
    handler = logging.StreamHandler()
    logger.setLevel(level)
    logger.addHandler(handler)
    in_main = threading.current_thread() is threading.main_thread()  # the only one that may set handlers
    ours = [n for n in (signal.SIGTERM, signal.SIGHUP) if in_main and signal.getsignal(n) != signal.SIG_IGN]  # nohup
    before = {number: signal.signal(number, end) for number in ours}
    try:
        yield
    finally:
        logger.removeHandler(handler)
        for number, handled in before.items():
            signal.signal(number, handled)


def _level(arguments: argparse.Namespace) -> int:
    if getattr(arguments, "quiet", False):
        return logging.ERROR
    return logging.DEBUG if getattr(arguments, "verbose", False) else logging.INFO


def _advice(error: OSError) -> str:
    where = f" ({error.filename})" if error.filename else ""
    match error.errno:
        case errno.ENOSPC | errno.EDQUOT:
            advice = "free some space (`clean` removes old cells), the same command goes on from here"
        case errno.EACCES | errno.EPERM | errno.EROFS:
            advice = "give a folder that you may write to, with --out or HARNESS_CACHE"
        case errno.EEXIST | errno.ENOTDIR | errno.EISDIR:
            advice = "something else has that name: remove it, or give another path"
        case _:
            advice = "give a path that exists"
    return f"{error.strerror or error}{where}: {advice}"


def _program() -> str:
    """What the user typed to get here."""
    return "ptq-harness" if Path(sys.argv[0]).stem == "ptq-harness" else "python -m harness"
