"""One small file per verb."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from harness import __version__


def main(argv: list[str] | None = None) -> int:
    from harness.cli import bench, check, compare, ls, plan, run

    parser = argparse.ArgumentParser(
        prog=_program(), description="Compare quantisation methods at one stored-bit budget."
    )
    parser.add_argument("--version", action="version", version=__version__)
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    for module in (run, plan, bench, check, compare, ls):
        module.register(verbs)
    arguments = parser.parse_args(argv)
    try:
        code = arguments.main(arguments)
        sys.stdout.flush()
        return code
    except BrokenPipeError:  # `| head` has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (ValueError, OSError) as error:  # bad input, or a folder that cannot be written: what to type next
        print(f"harness {arguments.verb}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nstopped; the same command goes on from here", file=sys.stderr)
        return 130


def _program() -> str:
    """What the user typed to get here."""
    return "ptq-harness" if Path(sys.argv[0]).stem == "ptq-harness" else "python -m harness"
