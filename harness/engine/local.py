"""Cells on this machine: a few processes at a time, each on its own share of the cores."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from harness.store import CellStore

Watch = Callable[[str, dict[str, Any]], None]  # (cell key, message of the cell's process)


@dataclass(frozen=True)
class Outcome:
    key: str
    error: str = ""  # one line; empty when the cell finished
    skipped: bool = False  # there was no reason to run it


def cores() -> int:
    return len(os.sched_getaffinity(0))


def run_cells(specs: Sequence[dict[str, Any]], jobs: int, watch: Watch) -> dict[str, Outcome]:
    """Run every cell in its own process, `jobs` at once; a failure is an outcome, never an exception."""
    running: list[subprocess.Popen[str]] = []
    with ThreadPoolExecutor(max_workers=max(1, jobs)) as pool:
        try:
            outcomes = list(pool.map(lambda spec: _run_one(spec, watch, running), specs))
        except KeyboardInterrupt:
            pool.shutdown(wait=False, cancel_futures=True)
            for process in running:
                process.kill()
            raise
    return {outcome.key: outcome for outcome in outcomes}


def _run_one(spec: dict[str, Any], watch: Watch, running: list[subprocess.Popen[str]]) -> Outcome:
    store = CellStore(spec["key"])
    store.folder.mkdir(parents=True, exist_ok=True)
    store.put_failure("")
    # Passive waiting: threads of two cells share the cores, and a spinning one would steal from the other.
    environment = os.environ | {"OMP_WAIT_POLICY": "PASSIVE", "OMP_NUM_THREADS": str(spec["threads"]), "TOKENIZERS_PARALLELISM": "false"}
    environment |= {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "TQDM_DISABLE": "1"}
    # One glibc heap that keeps freed activations (up to 32 MiB each, its maximum) instead of faulting them in again: a tenth of
    # the run's time went there.
    environment |= {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": str(1 << 25), "MALLOC_TRIM_THRESHOLD_": str(1 << 30)}
    error = ""
    with open(store.log, "a") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "harness.engine.cell"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True, env=environment,
        )  # fmt: skip
        running.append(process)
        assert process.stdin and process.stdout
        json.dump(spec, process.stdin)
        process.stdin.close()
        for line in process.stdout:
            message = json.loads(line)
            error = message.get("error", error)
            watch(spec["key"], message)
        code = process.wait()
        running.remove(process)
    if code < 0:
        name = signal.Signals(-code).name
        error = f"killed by {name}" + (" (out of memory?)" if -code == signal.SIGKILL else "") + f"; log: {store.log}"
    elif code and not error:
        error = f"exit code {code}; log: {store.log}"
    store.put_failure(error)  # cells that wait for this one go on without it
    watch(spec["key"], {"ended": True, "error": error})
    return Outcome(spec["key"], error)
