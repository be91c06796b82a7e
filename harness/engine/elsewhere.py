"""Cells on machines that share this one's cache: what an engine hands over, what is done with it there, and how the run
hears of it. Which machine does what is the engine's affair (harness.engine.on_ray, harness.engine.on_slurm).

Both sides meet in a folder of the cache: a worker appends what a cell says to a file there, the run reads it. So an
engine needs no channel of its own, and a worker that dies leaves what it said. A cell is a process below its worker, as
it is on one machine, under the same lease, and goes on from finished blocks wherever it is tried again."""

from __future__ import annotations

import json
import os
import platform
import shutil
import socket
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Protocol

from harness import __version__
from harness.data.files import CACHE_VARIABLE, cache_dir
from harness.engine.process import INTERRUPTED, Ended, Message, Note, Phase, Watch
from harness.store.records import CellSpec, Ending, Outcome

FOLDER = "engine"  # of the cache
POLL_S = 0.5


@dataclass(frozen=True)
class Order:
    """A cell to be done elsewhere; everything in it is plain, for it crosses machines."""

    key: str
    spec: str  # the CellSpec, as JSON
    cache: str  # the shared folder of assets and results
    folder: str  # of this run, in it
    versions: dict[str, str]  # that a worker must have
    timeout_s: float | None
    memory_gib: float  # that it will need at most, by prediction

    @property
    def cell(self) -> CellSpec:
        return CellSpec.from_json(json.loads(self.spec), f"the order of {self.key}")

    @property
    def said(self) -> Path:
        """The file of what the cell says: a message a line."""
        return Path(self.folder) / f"{self.key}.jsonl"


class Task(Protocol):
    """An order that was given to an engine."""

    def done(self) -> bool: ...

    def failure(self) -> str:
        """Why it ended without the cell having said how, in one line; "" where the engine knows of nothing."""

    def cancel(self) -> None: ...


def versions() -> dict[str, str]:
    """What two machines must have alike for a cell to store the same bytes on both."""
    packages = ("torch", "transformers", "numpy", "safetensors")
    python = ".".join(platform.python_version_tuple()[:2])
    return {"harness": __version__, "python": python, **{name: version(name).partition("+")[0] for name in packages}}


def perform(order: Order) -> None:
    """On the worker: do the cell's work in a process below this one, or say why not."""
    said = order.said
    try:
        with open(said, "a") as out:
            say = partial(_say, out)
            if refusal := _unfit(order):
                say(order.key, Ended(refusal, Ending.FAILED))
            else:
                _work(order, say)
    except FileNotFoundError:
        raise RuntimeError(
            f"{socket.gethostname()} sees no {order.folder}: put HARNESS_CACHE on storage that all machines share"
        ) from None


def _work(order: Order, say: Watch) -> None:
    from harness.engine.cell import work
    from harness.engine.local import in_a_process

    os.environ[CACHE_VARIABLE] = order.cache
    spec = order.cell
    say(order.key, Note(f"on {socket.gethostname()}", warning=False))
    over = Path(order.folder) / "reference_over"
    in_a_process(partial(work, spec, over), spec, say, order.timeout_s)


def _unfit(order: Order) -> str:
    """Why this machine cannot do it; "" when it can."""
    here, host = versions(), socket.gethostname()
    unlike = [
        f"{name} {here.get(name)} and not {wanted}"
        for name, wanted in order.versions.items()
        if here.get(name) != wanted
    ]
    if unlike:
        return f"{host} has {', '.join(unlike)}: install the same on every machine"
    spec = order.cell
    needed = [model.path for model in (spec.model, spec.base, spec.source) if model is not None]
    if away := [str(path) for path in needed if not path.exists()]:
        return f"{host} sees no {away[0]}: put the model on storage that all machines share"
    return ""


def _say(out: object, key: str, message: Message) -> None:
    # The break comes first: a line that a killed attempt did not finish spoils none of the next one's.
    print(f"\n{json.dumps({type(message).__name__: asdict(message)})}", file=out, end="\n", flush=True)  # type: ignore[call-overload]


def run_cells(
    specs: Sequence[CellSpec],
    submit: Callable[[Sequence[Order]], Sequence[Task]],
    watch: Watch,
    timeout_s: float | None = None,
    memory_gib: Mapping[str, float] | None = None,
) -> dict[str, Outcome]:
    """Have every cell done by the engine that `submit` hands orders to; a failure is an outcome, never an exception.

    The reference is done before any other cell is handed over: whoever waits for it would hold a place that it may
    need. Raises Interrupted when this process is told to end; what was handed over is taken back."""
    from harness.engine.local import Interrupted

    folder = cache_dir(FOLDER, uuid.uuid4().hex)
    folder.mkdir(parents=True)
    outcomes: dict[str, Outcome] = {}
    tasks: dict[str, Task] = {}
    here, cache = versions(), str(cache_dir().resolve())
    waves = ([s for s in specs if s.is_reference], [s for s in specs if not s.is_reference])
    try:
        for wave in filter(None, waves):
            orders = [
                Order(
                    spec.key,
                    json.dumps(replace(spec, device=spec.device.partition(":")[0]).to_json()),
                    cache,
                    str(folder.resolve()),
                    here,
                    timeout_s,
                    (memory_gib or {}).get(spec.key, 0.0),
                )
                for spec in wave
            ]
            tasks = dict(zip((order.key for order in orders), submit(orders), strict=True))
            _follow({order.key: _Heard(order) for order in orders}, tasks, watch, outcomes)
            (folder / "reference_over").touch()
    except KeyboardInterrupt as stop:
        for task in tasks.values():
            task.cancel()
        left = {spec.key: Outcome(spec.key, INTERRUPTED.error, INTERRUPTED.ending) for spec in specs}
        raise Interrupted(left | outcomes) from stop
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return outcomes


def _follow(heard: Mapping[str, _Heard], tasks: Mapping[str, Task], watch: Watch, outcomes: dict[str, Outcome]) -> None:
    """Hand on what cells say until all have ended."""
    waiting = dict(heard)
    while waiting:
        for key, said in list(waiting.items()):
            over = tasks[key].done()  # asked before reading: what was said last is not missed
            ended = None
            for message in said.new():
                if isinstance(message, Ended):
                    ended = message
                else:
                    watch(key, message)
            if over and ended is None:
                ended = Ended(tasks[key].failure() or "its worker ended without a word", Ending.CRASHED)
            if ended is not None:
                watch(key, ended)
                outcomes[key] = Outcome(key, ended.error, ended.ending)
                del waiting[key]
        if waiting:
            time.sleep(POLL_S)


class _Heard:
    """What a cell has said, read as it grows."""

    def __init__(self, order: Order) -> None:
        self.path, self.read = order.said, 0

    def new(self) -> list[Message]:
        if not self.path.exists():
            return []
        with open(self.path, "rb") as file:
            file.seek(self.read)
            text = file.read()
        whole = text[: text.rfind(b"\n") + 1]
        self.read += len(whole)
        return [message for line in whole.decode(errors="replace").splitlines() if (message := _message(line))]


def _message(line: str) -> Message | None:
    """None for an empty line, and for what a killed worker left of one."""
    try:
        ((name, fields),) = json.loads(line).items()
        if name == "Ended":
            return Ended(fields["error"], Ending(fields["ending"]))
        return {"Phase": Phase, "Note": Note}[name](**fields)
    except (ValueError, AttributeError, KeyError, TypeError):
        return None
