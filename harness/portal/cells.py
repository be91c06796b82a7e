"""A finished cell by the names people have for it: its key, or the folder of a run and a row of its table."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from harness.data.files import cache_dir
from harness.store.cells import CellStore
from harness.store.records import Artifact
from kernels.registry import suggestion

UNBUDGETED = {"budget_bpw": "", "seed": ""}


@dataclass(frozen=True)
class StoredCell:
    """A compressed model that is complete in the cache."""

    store: CellStore
    artifact: Artifact

    @property
    def label(self) -> str:
        spec = self.artifact.spec
        return " ".join(filter(None, (spec.method_text, spec.budget)))


def stored_cell(name: str, row: str | None) -> StoredCell:
    """The cell of a key (its first characters do), or of a row of the folder that a run wrote. Raises ValueError in one
    line when there is none, more than one, or its files are damaged."""
    folder = Path(name).expanduser()
    key = _key_of_row(folder, row) if folder.is_dir() else _key_of_beginning(name)
    store = CellStore(key)
    artifact = store.artifact()
    if artifact is None:
        raise ValueError(f"cell {key} is not in {cache_dir('cells')}: the run's own command makes it again")
    if damage := store.damage(artifact):
        raise ValueError(f"{damage}: the run's own command makes it again")
    return StoredCell(store, artifact)


def _key_of_beginning(name: str) -> str:
    if not re.fullmatch("[0-9a-f]{4,16}", name):
        raise ValueError(f"no folder {name}, and no key of a cell: give one of `ls runs`, or a run's folder and --row")
    found = [path.parent.name for path in cache_dir("cells").glob(f"{name}*/artifact.json")]
    return _only(found, f"cells {name}...", "give one of `ls runs`")


def _key_of_row(folder: Path, row: str | None) -> str:
    from harness.report.board import stored_board
    from harness.report.sheet import label

    reports = stored_board([folder]).reports
    labels = {label(report.row): key for key, report in reports.items()}
    if row is None:
        raise ValueError(f"{folder} has several rows: write --row '{next(reversed(labels))}', say")
    names = {key: (label(report.row), label(report.row | UNBUDGETED)) for key, report in reports.items()}
    if not (found := [key for key, known in names.items() if row in known]):
        raise ValueError(f"{folder} has no row '{row}': {suggestion(row, list(labels))}")
    return _only(found, f"rows '{row}'", f"choose from {', '.join(labels)}")


def _only(found: Iterable[str], what: str, advice: str) -> str:
    keys = list(found)
    if len(keys) != 1:
        raise ValueError(f"there are {len(keys)} {what}: {advice}")
    return keys[0]
