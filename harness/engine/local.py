"""Cells on this machine: a few processes at a time, each on its own share of the cores."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from multiprocessing.context import BaseContext
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from harness.engine import cell
from harness.store import CellStore

# Cells are forked from a server that has the imports done, which take longer than a small cell. A driver of an accelerator may not
# survive a fork, so there every cell starts from nothing.
START = {"cpu": "forkserver"}
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
    running: list[BaseProcess] = []
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


def _run_one(spec: dict[str, Any], watch: Watch, running: list[BaseProcess]) -> str:
    """Run one cell to its end; returns its error in one line, empty when it finished."""
    store = CellStore(spec["key"])
    store.folder.mkdir(parents=True, exist_ok=True)
    context = _context(spec["device"].partition(":")[0])
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=cell.main, args=(spec, sender, str(store.log), os.environ | _settings(spec["threads"])))
    error = ""
    with _environment(_settings(spec["threads"])):
        process.start()
    running.append(process)
    sender.close()  # the cell has its own: when that is gone, there is nothing more to hear
    with contextlib.suppress(EOFError, OSError):  # killed, perhaps in the middle of a message; the exit code tells
        while True:
            message = receiver.recv()
            error = message.get("error", error)
            watch(spec["key"], message)
    process.join()
    receiver.close()
    running.remove(process)
    code = process.exitcode or 0
    if code < 0:
        memory = " (out of memory?)" if -code == signal.SIGKILL else ""
        return f"killed by {signal.Signals(-code).name}{memory}; log: {store.log}"
    return error or (f"exit code {code}; log: {store.log}" if code else "")


def _context(device_type: str) -> BaseContext:
    context = multiprocessing.get_context(START.get(device_type, "spawn"))
    if context.get_start_method() == "forkserver":
        context.set_forkserver_preload([cell.__name__])
    return context


def _settings(threads: int) -> dict[str, str]:
    """Variables that are read when a process starts, or a library is loaded."""
    return {
        # Passive waiting: threads of two cells share the cores, and a spinning one would steal from the other.
        "OMP_WAIT_POLICY": "PASSIVE", "OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1", "TQDM_DISABLE": "1",
        # One glibc heap that keeps freed activations (up to 32 MiB each, its maximum) instead of faulting them in again: a tenth
        # of the run's time went there.
        "MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": str(1 << 25), "MALLOC_TRIM_THRESHOLD_": str(1 << 30),
    }  # fmt: skip


@contextlib.contextmanager
def _environment(variables: dict[str, str]) -> Iterator[None]:
    """What a process that is started inside inherits; the server of the forks is one."""
    with _STARTING:
        before = dict(os.environ)
        os.environ.update(variables)
        try:
            yield
        finally:
            os.environ.clear()
            os.environ.update(before)


_STARTING = threading.Lock()  # the environment is everybody's
