"""`clean`: remove cells from the cache by age, until the cache is small enough, or what no board of a folder needs.

What is removed can be made again by the line that made it. Without --yes only says what would go."""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from harness.cli.options import amount
from harness.cli.sheets import add_json_option, print_json
from harness.data.files import cache_dir
from harness.progress import say_nothing
from harness.report.baseline import read_rows
from harness.store.cells import CellStore
from harness.store.records import CellSpec

UNITS = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


@dataclass(frozen=True)
class _Stored:
    """A cell's folder."""

    path: Path
    size: int  # bytes
    used: float  # when it was last asked for, seconds since the epoch

    @property
    def label(self) -> str:
        try:
            spec = CellSpec.read(self.path / "spec.json")
        except (OSError, ValueError):
            return "unreadable"
        return f"{spec.model.name}  {spec.method_text}{f' {spec.budget}' if spec.budget else ''} seed {spec.seed}"


def register(verbs: argparse._SubParsersAction) -> None:
    parser = verbs.add_parser("clean", description=__doc__)
    parser.add_argument("--older-than", metavar="DAYS", type=_days, help="cells that no run has asked for so long")
    parser.add_argument(
        "--larger-than", metavar="SIZE", type=_bytes, help="the longest unused, until the rest is as small as 20G"
    )
    parser.add_argument(
        "--keep",
        metavar="FOLDER",
        type=Path,
        action="append",
        help="cells that no leaderboard below this folder names (may be given several times)",
    )
    parser.add_argument("--yes", action="store_true", help="remove them")
    add_json_option(parser)
    parser.set_defaults(main=main)


def main(arguments: argparse.Namespace) -> int:
    if arguments.older_than is None and arguments.larger_than is None and not arguments.keep:
        raise ValueError("say what may go: --older-than 30, --larger-than 20G, or --keep results")
    say = say_nothing if arguments.json else print
    needed = {key for folder in arguments.keep or () for key in _named(folder)}
    stored = sorted(_cells(), key=lambda cell: cell.used)
    going = [cell for cell in stored if cell.path.name not in needed] if arguments.keep else stored
    if arguments.older_than is not None:
        going = [cell for cell in going if cell.used < time.time() - arguments.older_than * 86400]
    if arguments.larger_than is not None:
        going = list(_until(going, sum(cell.size for cell in stored), arguments.larger_than))
    kept: list[_Stored] = []
    labels = {cell.path.name: cell.label for cell in going}  # read before they are removed
    for cell in going:
        say(f"{cell.path.name}  {cell.size / 2**20:.0f} MiB  {labels[cell.path.name]}")
        if arguments.yes:
            store = CellStore(cell.path.name)
            with store.lease():  # nobody is at work on it
                if _stored(cell.path).used > cell.used:
                    say(f"{cell.path.name}  was asked for meanwhile: kept")
                    kept.append(cell)
                else:
                    store.remove()
    going = [cell for cell in going if cell not in kept]
    remains = list(_remains())
    for path in remains:
        say(f"{path}  of a run that was killed")
        if arguments.yes:
            path.unlink(missing_ok=True)
    done = "removed" if arguments.yes else "would be removed; --yes removes them"
    if arguments.json:
        cells = [{"cell": cell.path.name, "bytes": cell.size, "label": labels[cell.path.name]} for cell in going]
        print_json({"cells": cells, "of": len(stored), "remains": remains, "removed": arguments.yes})
    say(f"{len(going)} of {len(stored)} cells, {sum(cell.size for cell in going) / 2**20:.0f} MiB {done}")
    return 0


def _remains() -> Iterator[Path]:
    """Files that a killed process was writing, or measuring for, a day ago and longer."""
    yesterday = time.time() - 86400
    cells = ("cells/*/.*.tmp", "cells/*/blocks/.*.tmp", "cells/*/teacher/.*.tmp")
    for pattern in ("*/.*.tmp", *cells, "sensitivities/*.unfinished.safetensors"):
        for path in sorted(cache_dir().glob(pattern)):
            with suppress(FileNotFoundError):
                if path.is_file() and path.stat().st_mtime < yesterday:
                    yield path


def _until(cells: list[_Stored], total: int, limit: float) -> Iterator[_Stored]:
    for cell in cells:
        if total <= limit:
            return
        total -= cell.size
        yield cell


def _cells() -> Iterator[_Stored]:
    root = cache_dir("cells")
    for path in root.iterdir() if root.is_dir() else ():
        if path.is_dir():
            yield _stored(path)


def _stored(path: Path) -> _Stored:
    size, used = 0, 0.0
    for file in path.rglob("*"):
        with suppress(FileNotFoundError):  # of a run that is at work
            stat = file.stat()
            size, used = size + stat.st_size, max(used, stat.st_mtime)
    return _Stored(path, size, used)


def _named(folder: Path) -> set[str]:
    boards = sorted(folder.rglob("leaderboard.csv"))
    if not boards:
        raise ValueError(f"no leaderboard.csv below {folder}: everything would go; give the folder of your results")
    return {row["cell"] for board in boards for row in read_rows(board).values() if row.get("cell")}


def _days(text: str) -> float:
    return amount(text, "number of days", "30")


def _bytes(text: str) -> float:
    unit = UNITS.get(text[-1:].upper())
    return amount(text[:-1], "size", "20G", unit) if unit else amount(text, "size", "20G")
