"""Cells on this machine: a few processes at a time, each on its own share of the cores."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
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
    """Run every cell in its own process, `jobs` at once; a failure is an outcome, never an exception.

    Cells that need the reference's states wait until it has them, or until its process is over (a file of this run says so).
    """
    running: list[subprocess.Popen[str]] = []
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(max_workers=jobs) as pool:
        over = Path(folder) / "reference_over"
        if all(spec["key"] != spec["reference"] for spec in specs):
            over.touch()  # finished earlier

        def run(spec: dict[str, Any]) -> Outcome:
            error = _run_one(spec | {"reference_over": str(over)}, watch, running)
            if spec["key"] == spec["reference"]:
                over.touch()
            watch(spec["key"], {"ended": True, "error": error})
            return Outcome(spec["key"], error)

        try:
            outcomes = list(pool.map(run, specs))
        except KeyboardInterrupt:
            pool.shutdown(wait=False, cancel_futures=True)
            for process in running:
                process.kill()
            raise
    return {outcome.key: outcome for outcome in outcomes}


def _run_one(spec: dict[str, Any], watch: Watch, running: list[subprocess.Popen[str]]) -> str:
    """Run one cell to its end; returns its error in one line, empty when it finished."""
    store = CellStore(spec["key"])
    store.folder.mkdir(parents=True, exist_ok=True)
    error = ""
    with open(store.log, "a") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "harness.engine.cell"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True, env=_environment(spec["threads"]),
        )  # fmt: skip
        running.append(process)
        assert process.stdin and process.stdout
        with contextlib.suppress(BrokenPipeError):  # it died before it read its orders; the exit code tells
            json.dump(spec, process.stdin)
            process.stdin.close()
        for line in process.stdout:
            try:
                message = json.loads(line)
            except json.JSONDecodeError:  # killed in the middle of a line
                break
            error = message.get("error", error)
            watch(spec["key"], message)
        code = process.wait()
        running.remove(process)
    if code < 0:
        memory = " (out of memory?)" if -code == signal.SIGKILL else ""
        return f"killed by {signal.Signals(-code).name}{memory}; log: {store.log}"
    return error or (f"exit code {code}; log: {store.log}" if code else "")


def _environment(threads: int) -> dict[str, str]:
    return os.environ | {
        # Passive waiting: threads of two cells share the cores, and a spinning one would steal from the other.
        "OMP_WAIT_POLICY": "PASSIVE", "OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1", "TQDM_DISABLE": "1",
        # One glibc heap that keeps freed activations (up to 32 MiB each, its maximum) instead of faulting them in again: a tenth
        # of the run's time went there.
        "MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": str(1 << 25), "MALLOC_TRIM_THRESHOLD_": str(1 << 30),
    }  # fmt: skip
