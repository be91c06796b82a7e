"""Cells on this machine: a few processes at a time, each on its own share of the cores; measurements one by one, on all
of them."""

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
from multiprocessing import forkserver
from multiprocessing.context import BaseContext
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from harness.engine import cell, process
from harness.measure import measurement as bench
from harness.measure.machine import quiet, working
from harness.store.cells import CellStore

# Cells are forked from a server that has the imports done, which take longer than a small cell. A driver of an
# accelerator may not survive a fork, so there every cell starts from nothing.
START = {"cpu": "forkserver"}
LONGEST = (
    70  # name of the folder for temporary files, in bytes: the server's socket lies there, and its whole name has 108
)
Watch = Callable[[str, dict[str, Any]], None]  # (cell key, message of the cell's process)


@dataclass(frozen=True)
class Outcome:
    key: str
    error: str = ""  # one line; empty when the cell finished
    skipped: bool = False  # there was no reason to run it


def run_cells(specs: Sequence[dict[str, Any]], jobs: int, watch: Watch) -> dict[str, Outcome]:
    """Run every cell in its own process, `jobs` at once; a failure is an outcome, never an exception.

    Cells that need the reference's states wait until it has them, or until its process is over (a file of this run says
    so)."""
    running: list[BaseProcess] = []
    settings = _shared_cores(max((spec["threads"] for spec in specs), default=1))
    with (
        working(),
        tempfile.TemporaryDirectory() as folder,
        _variables(settings),
        ThreadPoolExecutor(max_workers=jobs) as pool,
    ):
        over = Path(folder) / "reference_over"
        if all(spec["key"] != spec["reference"] for spec in specs):
            over.touch()  # finished earlier
        for device_type in {_device_type(spec) for spec in specs}:
            _prepare(device_type)

        def run(spec: dict[str, Any]) -> Outcome:
            try:
                return _run_one(
                    cell.work, spec | {"reference_over": str(over)}, _context(_device_type(spec)), watch, running
                )
            finally:
                if spec["key"] == spec["reference"]:
                    over.touch()

        try:
            outcomes = list(pool.map(run, specs))
        except KeyboardInterrupt:
            pool.shutdown(wait=False, cancel_futures=True)
            _kill(running)
            raise
    return {outcome.key: outcome for outcome in outcomes}


def measure_cells(specs: Sequence[dict[str, Any]], watch: Watch, waiting: Callable[[], None]) -> dict[str, Outcome]:
    """Measure memory and latency of finished cells, each in a process that knows nothing of the others, while nothing
    else of ours runs."""
    running: list[BaseProcess] = []
    outcomes: dict[str, Outcome] = {}
    with quiet(waiting), _variables(_QUIET):
        try:
            for spec in specs:
                outcomes[spec["key"]] = _run_one(bench.work, spec, multiprocessing.get_context("spawn"), watch, running)
        except KeyboardInterrupt:
            _kill(running)
            raise
    return outcomes


def _kill(running: Sequence[BaseProcess]) -> None:
    for child in running:
        child.kill()


def _run_one(
    work: process.Work, spec: dict[str, Any], context: BaseContext, watch: Watch, running: list[BaseProcess]
) -> Outcome:
    """Do one cell's work to its end."""
    try:
        error = _run(work, spec, context, watch, running)
    except Exception as failure:  # no process to be had
        error = f"could not be started ({type(failure).__name__}: {failure}); the same command tries again"
    watch(spec["key"], {"ended": True, "error": error})
    return Outcome(spec["key"], error)


def _run(
    work: process.Work, spec: dict[str, Any], context: BaseContext, watch: Watch, running: list[BaseProcess]
) -> str:
    """Returns the error in one line, empty when the work was finished."""
    store = CellStore(spec["key"])
    store.folder.mkdir(parents=True, exist_ok=True)
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=process.main, args=(work, spec, sender, str(store.log), dict(os.environ)))
    error, finished = "", False
    child.start()
    running.append(child)
    sender.close()  # the child has its own: when that is gone, there is nothing more to hear
    with contextlib.suppress(EOFError, OSError):  # killed, perhaps in the middle of a message; the exit code tells
        while True:
            message = receiver.recv()
            error, finished = message.get("error", error), finished or "finished" in message
            watch(spec["key"], message)
    child.join()
    receiver.close()
    running.remove(child)
    code = child.exitcode or 0
    if finished:  # it said so itself; the exit code comes by way of the server of the forks, which may have been killed
        return ""
    if code < 0:
        name = {s.value: s.name for s in signal.Signals}.get(-code, f"signal {-code}")
        memory = " (out of memory?)" if -code == signal.SIGKILL else ""
        return f"killed by {name}{memory}; log: {store.log}"
    return error or f"exit code {code}; log: {store.log}"


def _device_type(spec: dict[str, Any]) -> str:
    return spec["device"].partition(":")[0]


def _context(device_type: str) -> BaseContext:
    fits = len(os.fsencode(tempfile.gettempdir())) <= LONGEST
    return multiprocessing.get_context(START.get(device_type, "spawn") if fits else "spawn")


def _prepare(device_type: str) -> None:
    """Start the server of the forks, if there is to be one. Ctrl-C is for this process: it ends the others itself."""
    context = _context(device_type)
    if context.get_start_method() == "forkserver":
        context.set_forkserver_preload([cell.__name__])
        main_thread = threading.current_thread() is threading.main_thread()
        before = signal.signal(signal.SIGINT, signal.SIG_IGN) if main_thread else None
        try:
            forkserver.ensure_running()
        finally:
            if main_thread:
                signal.signal(signal.SIGINT, before)


# Variables that are read when a process starts, or a library is loaded.
_QUIET = {"TOKENIZERS_PARALLELISM": "false", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "TQDM_DISABLE": "1"}


def _shared_cores(threads: int) -> dict[str, str]:
    return _QUIET | {
        # Passive waiting: threads of two cells share the cores, and a spinning one would steal from the other.
        "OMP_WAIT_POLICY": "PASSIVE",
        "OMP_NUM_THREADS": str(threads),
        # One glibc heap that keeps freed activations (up to 32 MiB each, its maximum) instead of faulting them in
        # again: a tenth of the run's time went there.
        "MALLOC_ARENA_MAX": "1",
        "MALLOC_MMAP_THRESHOLD_": str(1 << 25),
        "MALLOC_TRIM_THRESHOLD_": str(1 << 30),
    }


@contextlib.contextmanager
def _variables(values: dict[str, str]) -> Iterator[None]:
    """Environment variables of this process, and of those it starts inside."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
