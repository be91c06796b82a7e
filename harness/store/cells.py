"""Results by content key: one folder per artifact, every file in it whole or absent.

<key>/spec.json          what the cell was last asked for
<key>/plan.json          what every layer will be stored as, where the cell itself decided
<key>/blocks/            finished blocks of an unfinished compression
<key>/packed.safetensors ... packed.json      harness.compressed
<key>/adapter/           of a trained method: its adapters as peft saves them
<key>/artifact.json      written last: the artifact is complete
<key>/score_<protocol key>.json               one per protocol
<key>/task_<task key>.json                    one per zero-shot task, with every item's outcome
<key>/states_<protocol key>.safetensors       the reference only: what divergences are taken from
<key>/bench_<identity>.json                   memory and latency on one machine (harness.measure.machine.identity_key)
<key>/failure.json       why the last attempt ended early
<key>/log.txt            what the cell's process said
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from harness.store.files import cache_dir, locked, read_json, write_json


class CellStore:
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

    def spec(self) -> dict[str, Any] | None:
        return self._read("spec.json")

    def put_spec(self, data: dict[str, Any]) -> None:
        write_json(self.folder / "spec.json", data)

    def artifact(self) -> dict[str, Any] | None:
        return self._read("artifact.json")

    def put_artifact(self, data: dict[str, Any]) -> None:
        write_json(self.folder / "artifact.json", data)
        shutil.rmtree(self.blocks, ignore_errors=True)  # only now are they no longer needed

    def plan(self) -> dict[str, Any] | None:
        return self._read("plan.json")

    def put_plan(self, data: dict[str, Any]) -> None:
        write_json(self.folder / "plan.json", data)

    def score(self, protocol_key: str) -> dict[str, Any] | None:
        return self._read(f"score_{protocol_key}.json")

    def put_score(self, protocol_key: str, data: dict[str, Any]) -> None:
        write_json(self.folder / f"score_{protocol_key}.json", data)

    def bench(self, identity: str) -> dict[str, Any] | None:
        return self._read(f"bench_{identity}.json")

    def put_bench(self, identity: str, data: dict[str, Any]) -> None:
        write_json(self.folder / f"bench_{identity}.json", data)

    def states(self, protocol_key: str) -> Path:
        return self.folder / f"states_{protocol_key}.safetensors"

    def scored(self, protocol_key: str) -> bool:
        """Scored with a divergence from the reference; one that failed then may be there now."""
        score = self.score(protocol_key)
        return bool(score and score["divergence"])

    def task(self, task_key: str) -> dict[str, Any] | None:
        return self._read(f"task_{task_key}.json")

    def put_task(self, task_key: str, data: dict[str, Any]) -> None:
        write_json(self.folder / f"task_{task_key}.json", data)

    def finished(self, protocol_keys: Iterable[str], task_keys: Iterable[str] = ()) -> bool:
        return (
            self.artifact() is not None
            and all(self.scored(key) for key in protocol_keys)
            and all(map(self.task, task_keys))
        )

    def forget(self) -> None:
        """Drop everything this cell has stored."""
        with self.locked():
            shutil.rmtree(self.folder, ignore_errors=True)

    def _read(self, name: str) -> dict[str, Any] | None:
        path = self.folder / name
        return read_json(path) if path.exists() else None
