"""Results by content key: one folder per artifact, every file in it whole or absent.

<key>/spec.json          what the cell was last asked for
<key>/allocation.json    what every layer will be stored as, where the cell itself decided (earlier: plan.json)
<key>/blocks/            finished blocks of an unfinished compression
<key>/teacher/           of an unfinished training: the uncompressed model's states of its windows
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

import os
import shutil
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from typing import TypeVar

from harness.data.checkpoint import remembered_sha256
from harness.data.files import cache_dir, file_sha256
from harness.data.record import Record
from harness.data.sealed import believed, checked, damaged_files
from harness.progress import wait_in_silence
from harness.store.lease import lease
from harness.store.records import AllocationRecord, Artifact, CellSpec
from harness.store.results import Bench, Score, TaskResult

R = TypeVar("R", bound=Record)


class CellStore:
    """The folder of one cell. What is not there, or damaged, is None; a file of a later version raises ValueError."""

    def __init__(self, key: str) -> None:
        self.key = key
        self.folder = cache_dir("cells", key)

    def lease(self, waiting: Callable[[], None] = wait_in_silence) -> AbstractContextManager[None]:
        """One process at a time works on a cell; a second one waits, and then finds the work done."""
        return lease(self.folder, waiting)

    @property
    def blocks(self) -> Path:
        return self.folder / "blocks"

    @property
    def teacher(self) -> Path:
        return self.folder / "teacher"

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
        for unfinished in (self.blocks, self.teacher):  # only now are they no longer needed
            shutil.rmtree(unfinished, ignore_errors=True)

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

    def scored(self, protocol_key: str, is_reference: bool = False) -> bool:
        """Scored with a divergence from the reference; one that failed then may be there now. The reference's score
        goes with the states that the others diverge from."""
        score = self.score(protocol_key)
        if score is None or score.divergence is None:
            return False
        return not is_reference or believed(self.states(protocol_key), checked) is not None

    def finished(self, protocol_keys: Iterable[str], task_keys: Iterable[str] = (), is_reference: bool = False) -> bool:
        artifact = self.artifact()
        return (
            artifact is not None
            and not self.damage(artifact, remembered_sha256)
            and all(self.scored(key, is_reference) for key in protocol_keys)
            and all(self.task(key) is not None for key in task_keys)
        )

    def damage(self, artifact: Artifact, sha256: Callable[[Path], str] = file_sha256) -> str:
        """What is wrong with the artifact's files, in one line; empty when they are what was written."""
        return next(damaged_files(self.folder, artifact.files, sha256), "")

    def unsealed(self, artifact: Artifact) -> str:
        """Why nothing new may be found out about an artifact from before checksums were kept, in one line; empty for
        others. What was found out about it then stays."""
        return "" if artifact.files else f"{self.folder} was stored before checksums were kept"

    def drop_artifact(self) -> None:
        """Remove a stored artifact and all that was found out about it; unfinished work stays."""
        for pattern in ("artifact.json", "score_*", "task_*", "bench_*", "states_*"):
            for path in self.folder.glob(pattern):
                path.unlink(missing_ok=True)

    def forget(self) -> None:
        """Drop everything this cell has stored."""
        with self.lease():
            self.remove()

    def remove(self) -> None:
        """The folder, which may be a link to another disk. Raises ValueError when it stays."""
        shutil.rmtree(self.folder.resolve(), ignore_errors=True)
        if self.folder.is_symlink():
            self.folder.unlink()
        if (self.folder / "artifact.json").exists():
            raise ValueError(f"{self.folder} cannot be removed: make it yours to write to, or remove it")

    def asked_for(self) -> None:
        """Note that a run found what it asked for: `clean` goes by age."""
        with suppress(OSError):  # a cache that can only be read
            os.utime(self.folder / "spec.json")

    def _read(self, record: type[R], name: str) -> R | None:
        return believed(self.folder / f"{name}.json", record.read)

    def _write(self, record: Record, name: str) -> None:
        record.write(self.folder / f"{name}.json")
