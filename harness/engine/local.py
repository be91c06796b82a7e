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
from functools import partial
from multiprocessing import forkserver
from multiprocessing.context import ForkServerContext, SpawnContext
from multiprocessing.process import BaseProcess
from pathlib import Path

from harness.engine import cell, process
from harness.engine.process import Ended, Message
from harness.measure import measurement
from harness.measure.machine import quiet, working
from harness.store.cells import CellStore
from harness.store.records import CellSpec, Outcome

# Cells are forked from a server that has the imports done, which take longer than a small cell. A driver of an
# accelerator may not survive a fork, so there every cell starts from nothing.
START = {"cpu": "forkserver"}
LONGEST = 70  # bytes of the temporary folder's name: the server's socket lies there, and its whole name may have 108
Context = ForkServerContext | SpawnContext
Watch = Callable[[str, Message], None]  # (cell key, message of the cell's process)


def run_cells(specs: Sequence[CellSpec], jobs: int, watch: Watch) -> dict[str, Outcome]:
    """Run every cell in its own process, `jobs` at once; a failure is an outcome, never an exception.

    Cells that need the reference's states wait until it has them, or until its process is over (a file of this run says
    so)."""
    running: list[BaseProcess] = []
    settings = _shared_cores(max((spec.threads for spec in specs), default=1))
    with (
        working(),
        tempfile.TemporaryDirectory() as folder,
        _variables(settings),
        ThreadPoolExecutor(max_workers=jobs) as pool,
    ):
        over = Path(folder) / "reference_over"
        if not any(spec.is_reference for spec in specs):
            over.touch()  # finished earlier
        for device_type in {_device_type(spec) for spec in specs}:
            _prepare(device_type)

        def run(spec: CellSpec) -> Outcome:
            try:
                return _run_one(partial(cell.work, spec, over), spec, _context(_device_type(spec)), watch, running)
            finally:
                if spec.is_reference:
                    over.touch()

        try:
            outcomes = list(pool.map(run, specs))
        except KeyboardInterrupt:
            pool.shutdown(wait=False, cancel_futures=True)
            _kill(running)
            raise
    return {outcome.key: outcome for outcome in outcomes}


def measure_cells(
    specs: Sequence[CellSpec],
    conditions: measurement.Conditions,
    watch: Watch,
    waiting: Callable[[], None],
) -> dict[str, Outcome]:
    """Measure memory and latency of finished cells, each in a process that knows nothing of the others, while nothing
    else of ours runs."""
    running: list[BaseProcess] = []
    outcomes: dict[str, Outcome] = {}
    with quiet(waiting), _variables(_QUIET):
        try:
            for spec in specs:
                work = partial(measurement.work, spec, conditions)
                outcomes[spec.key] = _run_one(work, spec, multiprocessing.get_context("spawn"), watch, running)
        except KeyboardInterrupt:
            _kill(running)
            raise
    return outcomes


def _kill(running: Sequence[BaseProcess]) -> None:
    for child in running:
        child.kill()


def _run_one(work: process.Work, spec: CellSpec, context: Context, watch: Watch, running: list[BaseProcess]) -> Outcome:
    """Do one cell's work to its end."""
    try:
        error = _run(work, spec.key, context, watch, running)
    except Exception as failure:  # no process to be had
        error = f"could not be started ({type(failure).__name__}: {failure}); the same command tries again"
    watch(spec.key, Ended(error))
    return Outcome(spec.key, error)


def _run(work: process.Work, key: str, context: Context, watch: Watch, running: list[BaseProcess]) -> str:
    """Returns the error in one line, empty when the work was finished."""
    store = CellStore(key)
    store.folder.mkdir(parents=True, exist_ok=True)
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=process.main, args=(work, sender, str(store.log), dict(os.environ)))
    ended: Ended | None = None
    child.start()
    running.append(child)
    sender.close()  # the child has its own: when that is gone, there is nothing more to hear
    with contextlib.suppress(EOFError, OSError):  # killed, perhaps in the middle of a message; the exit code tells
        while True:
            message = receiver.recv()
            if isinstance(message, Ended):
                ended = message
            else:
                watch(key, message)
    child.join()
    receiver.close()
    running.remove(child)
    code = child.exitcode or 0
    if ended == Ended():  # it said so itself; the exit code comes by way of the server of the forks, which may be dead
        return ""
    if code < 0:
        name = {s.value: s.name for s in signal.Signals}.get(-code, f"signal {-code}")
        memory = " (out of memory?)" if -code == signal.SIGKILL else ""
        return f"killed by {name}{memory}; log: {store.log}"
    return ended.error if ended else f"exit code {code}; log: {store.log}"


def _device_type(spec: CellSpec) -> str:
    return spec.device.partition(":")[0]


def _context(device_type: str) -> Context:
    fits = len(os.fsencode(tempfile.gettempdir())) <= LONGEST
    if fits and START.get(device_type) == "forkserver":
        return multiprocessing.get_context("forkserver")
    return multiprocessing.get_context("spawn")


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
