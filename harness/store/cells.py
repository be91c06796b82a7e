"""Results by content key: one folder per artifact, every file in it whole or absent.

<key>/spec.json          what the cell was last asked for
<key>/allocation.json    what every layer will be stored as, where the cell itself decided (earlier: plan.json)
<key>/blocks/            finished blocks of an unfinished compression
<key>/packed.safetensors ... packed.json      harness.compressed
<key>/adapter/           of a trained method: its adapters as peft saves them
<key>/artifact.json      written last: the artifact is complete
<key>/score_<protocol key>.json               one per protocol
<key>/task_<task key>.json                    one per zero-shot task, with every item's outcome
<key>/states_<protocol key>.safetensors       the reference only: what divergences are taken from
<key>/bench_<identity>.json                   memory and latency on one machine (harness.measure.machine.identity_key)
<key>/log.txt            what the cell's process printed

JSON files hold the records of harness.store.records and harness.store.results.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TypeVar

from harness.data.files import cache_dir, locked
from harness.data.record import Record
from harness.store.records import AllocationRecord, Artifact, CellSpec
from harness.store.results import Bench, Score, TaskResult

R = TypeVar("R", bound=Record)


class CellStore:
    """The folder of one cell. What is not there is None; a file that cannot be read raises ValueError."""

    def __init__(self, key: str) -> None:
        self.key = key
        self.folder = cache_dir("cells", key)

    def locked(self) -> AbstractContextManager[None]:
        """One process at a time works on a cell; a second one waits, and then finds the work done."""
        return locked(self.folder)

    @property
    def blocks(self) -> Path:
        return self.folder / "blocks"

    @property
    def adapter(self) -> Path:
        return self.folder / "adapter"

    @property
    def log(self) -> Path:
        return self.folder / "log.txt"

    def states(self, protocol_key: str) -> Path:
        return self.folder / f"states_{protocol_key}.safetensors"

    def spec(self) -> CellSpec | None:
        return self._read(CellSpec, "spec")

    def put_spec(self, spec: CellSpec) -> None:
        self._write(spec, "spec")

    def allocation(self) -> AllocationRecord | None:
        # Called plan.json until November 2026.
        return self._read(AllocationRecord, "allocation") or self._read(AllocationRecord, "plan")

    def put_allocation(self, allocation: AllocationRecord) -> None:
        self._write(allocation, "allocation")

    def artifact(self) -> Artifact | None:
        return self._read(Artifact, "artifact")

    def put_artifact(self, artifact: Artifact) -> None:
        self._write(artifact, "artifact")
        shutil.rmtree(self.blocks, ignore_errors=True)  # only now are they no longer needed

    def score(self, protocol_key: str) -> Score | None:
        return self._read(Score, f"score_{protocol_key}")

    def put_score(self, protocol_key: str, score: Score) -> None:
        self._write(score, f"score_{protocol_key}")

    def task(self, task_key: str) -> TaskResult | None:
        return self._read(TaskResult, f"task_{task_key}")

    def put_task(self, task_key: str, result: TaskResult) -> None:
        self._write(result, f"task_{task_key}")

    def bench(self, identity: str) -> Bench | None:
        return self._read(Bench, f"bench_{identity}")

    def put_bench(self, identity: str, bench: Bench) -> None:
        self._write(bench, f"bench_{identity}")

    def scored(self, protocol_key: str) -> bool:
        """Scored with a divergence from the reference; one that failed then may be there now."""
        score = self.score(protocol_key)
        return score is not None and score.divergence is not None

    def finished(self, protocol_keys: Iterable[str], task_keys: Iterable[str] = ()) -> bool:
        return (
            self.artifact() is not None
            and all(self.scored(key) for key in protocol_keys)
            and all(self.task(key) is not None for key in task_keys)
        )

    def forget(self) -> None:
        """Drop everything this cell has stored."""
        with self.locked():
            shutil.rmtree(self.folder, ignore_errors=True)

    def _read(self, record: type[R], name: str) -> R | None:
        path = self.folder / f"{name}.json"
        return record.read(path) if path.exists() else None

    def _write(self, record: Record, name: str) -> None:
        record.write(self.folder / f"{name}.json")
