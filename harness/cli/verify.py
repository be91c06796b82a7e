"""`verify`: read every file of the cache again, and name those that are not what was written."""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator
from pathlib import Path

from harness.cli.sheets import add_json_option, print_json
from harness.data.assets import MANIFEST
from harness.data.files import cache_dir, file_sha256
from harness.data.record import Record
from harness.data.sealed import Damaged, check_tensors, damaged_files, read_object, read_sealed, unsealed
from harness.progress import say_nothing
from harness.store.records import AllocationRecord, Artifact, CellSpec
from harness.store.results import Bench, Score, TaskResult

EARLIER_MEMO = {"path", "sha256"}  # of a file's checksum, which is not read any more
RECORDS: dict[str, type[Record]] = {  # by what the names of their files begin with
    "spec": CellSpec,
    "allocation": AllocationRecord,
    "artifact": Artifact,
    "score": Score,
    "task": TaskResult,
    "bench": Bench,
}


def register(verbs: argparse._SubParsersAction) -> None:
    parser = verbs.add_parser("verify", description=__doc__)
    add_json_option(parser)
    parser.set_defaults(main=main)


def main(arguments: argparse.Namespace) -> int:
    say = say_nothing if arguments.json else print
    root = cache_dir()
    files, problems = 0, []
    for path in sorted(_files(root)):
        for problem in _problems(path):
            say(f"{problem}; the next run that needs it makes it again")
            problems.append(problem)
        files += 1
    unsealed = list(_unsealed_cells())
    for line in unsealed:
        say(line)
    if arguments.json:
        print_json({"folder": root, "files": files, "damaged": problems, "without_checksums": unsealed})
    say(f"{files} files in {root}, {len(problems)} damaged")
    return 1 if problems else 0


def _files(root: Path) -> Iterator[Path]:
    """Every file below a folder; parts of a cache may be links to another disk."""
    seen = set()
    for folder, inside, names in os.walk(root, followlinks=True):
        place = os.stat(folder)
        if (place.st_dev, place.st_ino) in seen:
            inside.clear()  # a link to a folder above it
            continue
        seen.add((place.st_dev, place.st_ino))
        yield from (path for path in map(Path(folder).joinpath, names) if path.is_file())


def _problems(path: Path) -> Iterator[str]:
    """What is wrong with a file of the cache, if it is one that carries a checksum."""
    try:
        if path.parent.parent == cache_dir("cells"):
            if path.name == "artifact.json":
                yield from _payload(path)
            elif path.suffix == ".json" and (record := RECORDS.get(path.stem.partition("_")[0])):
                record.read(path)
            elif path.name.startswith("states_"):
                check_tensors(path)
        elif path.suffix == ".safetensors" and path.parent.name in ("streams", "sensitivities", "blocks", "teacher"):
            check_tensors(path)
        elif path.suffix == ".json" and path.parent == cache_dir("costs"):
            read_sealed(path)
        elif path.suffix == ".json" and path.parent == cache_dir("sha256"):
            if read_object(path).keys() != EARLIER_MEMO:
                read_sealed(path)
        elif path.name == MANIFEST and path.parent.parent == cache_dir("models"):
            yield from damaged_files(path.parent, read_sealed(path))
        elif path.parent.parent == cache_dir("files"):  # named by what it must be
            if not file_sha256(path).startswith(path.parent.name):
                yield f"{path} is damaged (not the pinned sha256)"
        elif path.parent == cache_dir("kernels") and path.suffix == ".so":
            yield from _library(path)
    except FileNotFoundError:  # a run is at work
        return
    except (ValueError, OSError) as error:  # damaged; of a later version, or not ours to read
        yield str(error)


def _library(path: Path) -> Iterator[str]:
    _, dash, checksum = path.stem.rpartition("-")
    if dash and not file_sha256(path).startswith(checksum):  # earlier ones have none in their name, and are not loaded
        yield f"{path} is damaged (its name has the checksum of other content)"


def _payload(path: Path) -> Iterator[str]:
    for problem in damaged_files(path.parent, Artifact.read(path).files):
        if not path.exists():
            return  # a run is at work, and makes it again
        yield problem


def _unsealed_cells() -> Iterator[str]:
    """Cells from before checksums were kept: nothing can be said of their bytes."""
    for path in sorted(cache_dir("cells").glob("*/artifact.json")):
        try:
            if not unsealed(read_object(path), path).get("files"):
                yield f"{path.parent} was stored before checksums were kept: `run --fresh` makes it again with them"
        except Damaged:
            continue
