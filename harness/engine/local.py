"""Cells on this machine: a few processes at a time, each on its own share of the cores; measurements one by one, on all
of them."""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import os
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from multiprocessing import forkserver
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerContext, SpawnContext
from multiprocessing.process import BaseProcess
from pathlib import Path
from queue import Queue
from typing import Literal

from harness.engine import cell, process
from harness.engine.places import places
from harness.engine.process import INTERRUPTED, WAITING, Ended, Message, Note, Phase, Watch
from harness.measure import measurement
from harness.measure.machine import quiet, working
from harness.progress import wait_in_silence
from harness.store.cells import CellStore
from harness.store.lease import TAKEN
from harness.store.records import CellSpec, Ending, Outcome

# Cells are forked from a server that has the imports done, which take longer than a small cell. A driver of an
# accelerator may not survive a fork, so there every cell starts from nothing.
START = {"cpu": "forkserver"}
# A measurement inherits nothing: how threads wait and memory is kept is read when a process starts.
MEASURED: Literal["spawn"] = "spawn"
# What it imports: a cell's work, and what that would import on its way to a loaded model.
PRELOADED = (
    "harness.engine.cell",
    "harness.model.handed",
    "safetensors.torch",
    "transformers.modeling_utils",
    "transformers.models.auto.modeling_auto",
    "transformers.models.auto.tokenization_auto",
    "transformers.pytorch_utils",
)
LONGEST_POLL_S = 86400.0  # some weeks at once are more than the system takes
GRACE_S = 1.0  # in which a run that is told to end together with its processes learns of it too
LONGEST = 70  # bytes of the temporary folder's name: the server's socket lies there, and its whole name may have 108
Context = ForkServerContext | SpawnContext


class Interrupted(KeyboardInterrupt):
    """The run was told to end. What is finished is kept; `outcomes` says what was not."""

    kept = ""  # what is finished, for the person who stopped it

    def __init__(self, outcomes: dict[str, Outcome]) -> None:
        super().__init__()
        self.outcomes = outcomes


def run_cells(
    specs: Sequence[CellSpec],
    jobs: int,
    watch: Watch,
    timeout_s: float | None = None,
    waiting: Callable[[], None] = wait_in_silence,
) -> dict[str, Outcome]:
    """Run every cell in its own process, `jobs` at once, each on a device of its own as far as there are any; a failure
    is an outcome, never an exception.

    Cells that need the reference's states wait until it has them, or until its process is over (a file of this run says
    so). Raises Interrupted when this process is told to end."""
    settings = _shared_cores(max((spec.threads for spec in specs), default=1))
    processes = _Processes(watch, timeout_s)
    with (
        working(waiting),
        tempfile.TemporaryDirectory() as folder,
        _variables(settings),
        ThreadPoolExecutor(max_workers=jobs) as pool,
    ):
        over = Path(folder) / "reference_over"
        if not any(spec.is_reference for spec in specs):
            over.touch()  # finished earlier
        for device_type in {_device_type(spec) for spec in specs}:
            _prepare(device_type)

        free: Queue[str] = Queue()
        for place in places(specs[0].device, jobs) if specs else ():
            free.put(place)

        def run(spec: CellSpec) -> Outcome:
            place = free.get()
            try:
                work = partial(cell.work, replace(spec, device=place), over)
                return processes.run(work, spec.key, _context(_device_type(spec)))
            finally:
                free.put(place)
                if spec.is_reference:
                    over.touch()

        asked: list[Future[Outcome]] = []
        try:
            asked += [pool.submit(run, spec) for spec in specs]
            outcomes = [future.result() for future in asked]
        except KeyboardInterrupt as stop:
            processes.stop()  # those that wait for a place end at once, too
            raise Interrupted({outcome.key: outcome for outcome in (f.result() for f in asked)}) from stop
    return {outcome.key: outcome for outcome in outcomes}


def in_a_process(work: process.Work, spec: CellSpec, watch: Watch, timeout_s: float | None = None) -> Outcome:
    """One cell's work to its end, in a process below this one: what a worker of another engine does."""
    device_type = _device_type(spec)
    with working(), _variables(_shared_cores(spec.threads)):
        _prepare(device_type)
        return _Processes(watch, timeout_s).run(work, spec.key, _context(device_type))


def measure_cells(
    specs: Sequence[CellSpec],
    conditions: measurement.Conditions,
    watch: Watch,
    waiting: Callable[[], None],
    timeout_s: float | None = None,
) -> dict[str, Outcome]:
    """Measure memory and latency of finished cells, each in a process that knows nothing of the others, while nothing
    else of ours runs. Raises Interrupted when this process is told to end."""
    processes = _Processes(watch, timeout_s)
    outcomes: dict[str, Outcome] = {}
    try:
        with quiet(waiting), _variables(_QUIET):
            for spec in specs:
                work = partial(measurement.work, spec, conditions)
                outcomes[spec.key] = processes.run(work, spec.key, multiprocessing.get_context(MEASURED))
    except KeyboardInterrupt as stop:
        processes.stop()
        raise Interrupted(outcomes) from stop
    return outcomes


class _Processes:
    """The children of a run. `run` may be called from several threads."""

    def __init__(self, watch: Watch, timeout_s: float | None) -> None:
        self.watch, self.timeout_s = watch, timeout_s
        self._running: list[BaseProcess] = []
        self._stopped = threading.Event()

    def stop(self) -> None:
        """End all that run, and start no more."""
        self._stopped.set()
        for child in list(self._running):
            child.kill()

    def run(self, work: process.Work, key: str, context: Context) -> Outcome:
        """Do one cell's work to its end, in a process of its own."""
        try:
            ended = INTERRUPTED if self._stopped.is_set() else self._run(work, key, context)
        except Exception as failure:  # no process to be had
            reason = f"could not be started ({type(failure).__name__}: {failure}); the same command tries again"
            ended = Ended(reason, Ending.FAILED)
        self.watch(key, ended)
        return Outcome(key, ended.error, ended.ending)

    def _run(self, work: process.Work, key: str, context: Context) -> Ended:
        store = CellStore(key)
        store.folder.mkdir(parents=True, exist_ok=True)
        receiver, sender = context.Pipe(duplex=False)
        alive, ours = context.Pipe(duplex=False)
        log, variables = str(store.log), dict(os.environ)
        level = min(logging.INFO, logging.getLogger("harness").getEffectiveLevel())  # a cell's log is never shorter
        child = context.Process(target=process.main, args=(work, sender, alive, log, variables, level))
        victims = _memory_victims()
        child.start()
        self._running.append(child)
        for theirs in (sender, alive):
            theirs.close()  # when the child's own is gone too, there is nothing more to hear
        if self._stopped.is_set():
            child.kill()
        try:
            said = self._listen(receiver, child, key)
            child.join()
        except KeyboardInterrupt:  # of a measurement, which runs in the main thread
            child.kill()
            child.join()
            raise
        finally:
            for connection in (receiver, ours):
                connection.close()
            self._running.remove(child)
        if said == Ended():  # the exit code comes by way of the server of the forks, which may be dead
            return said
        # A signal to all of a run's processes may end a child before this one has looked at its own.
        alone = said is not None and said.ending != Ending.INTERRUPTED
        if self._stopped.wait(0.0 if alone else GRACE_S):
            return INTERRUPTED
        return said or _death(child.exitcode or 0, store.log, victims)

    def _listen(self, receiver: Connection, child: BaseProcess, key: str) -> Ended | None:
        """What a child says of its end; None when it ends without a word."""
        said: Ended | None = None
        left, heard, waits = self.timeout_s, time.monotonic(), False
        while True:
            try:
                due = LONGEST_POLL_S if left is None or waits else heard + left - time.monotonic()
                if not receiver.poll(min(max(0.0, due), LONGEST_POLL_S)):
                    if left is None or waits or due > LONGEST_POLL_S:
                        continue
                    child.kill()
                    text = f"not finished after {self.timeout_s:g} s (--timeout); with more it goes on from there"
                    return Ended(text, Ending.TIMEOUT)
                message = receiver.recv()
            except (EOFError, OSError):  # killed, perhaps in the middle of a message; the exit code tells
                return said
            now = time.monotonic()
            if left is not None and not waits:  # waiting for another process is not its own time
                left -= now - heard
            heard, waits = now, _waits(message)
            if isinstance(message, Ended):
                said = message
            else:
                self.watch(key, message)


def _waits(message: Message) -> bool:
    """Whether a process that says this does nothing until it says something else."""
    match message:
        case Phase():
            return message.phase.startswith(WAITING)
        case Note():
            return message.text.startswith(WAITING)
    return False


def _death(code: int, log: Path, victims: int) -> Ended:
    """How a process ended that did not say so itself."""
    if code == TAKEN:
        taken = "another process took this cell over while this one stood still; the same command goes on"
        return Ended(taken, Ending.INTERRUPTED)
    if code >= 0:
        return Ended(f"exit code {code}; log: {log}", Ending.CRASHED)
    if -code == signal.SIGKILL and _memory_victims() > victims:
        return Ended(f"killed by the kernel, which was out of memory; log: {log}", Ending.OUT_OF_MEMORY)
    name = {s.value: s.name for s in signal.Signals}.get(-code, f"signal {-code}")
    return Ended(f"killed by {name}; log: {log}", Ending.KILLED)


def _memory_victims() -> int:
    """How many processes the kernel has killed for memory since the machine started; 0 where it does not say."""
    with contextlib.suppress(OSError, ValueError):
        counts = dict(line.split() for line in Path("/proc/vmstat").read_text().splitlines())
        return int(counts.get("oom_kill", 0))
    return 0


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
        context.set_forkserver_preload(list(PRELOADED))
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
