"""Cells as tasks of a Ray cluster whose machines share the cache (`pip install '.[ray]'`).

Ray decides where: a cell asks for its threads as CPUs, a GPU where it runs on one, and the memory that is predicted for
it. A task whose machine or worker dies is tried again elsewhere, and goes on from the cell's finished blocks."""

from __future__ import annotations

import contextlib
import signal
import socket
import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from harness.engine import elsewhere
from harness.engine.elsewhere import Order, Task
from harness.engine.process import Watch
from harness.progress import first_line
from harness.store.records import CellSpec, Outcome

TRIES = 5  # more, of a task whose machine went away


def run_cells(
    specs: Sequence[CellSpec],
    watch: Watch,
    timeout_s: float | None,
    memory_gib: Mapping[str, float],
    options: Mapping[str, str],
) -> dict[str, Outcome]:
    """`options`: address, of the cluster ("auto": the one this machine belongs to). Raises ValueError where there is no
    such cluster."""
    ray = _ray()
    ours = not ray.is_initialized()
    if ours:
        address = options.get("address", "auto")
        try:
            _answers(address)
            with _own_signals():
                ray.init(address=address, log_to_driver=False, configure_logging=False)
        except Exception as error:
            raise ValueError(
                f"no Ray cluster at '{address}' ({first_line(error)}): start one with `ray start --head`, or give "
                "another --address"
            ) from None
    try:
        remote = ray.remote(elsewhere.perform)

        def submit(orders: Sequence[Order]) -> list[Task]:
            return [_Task(ray, _given(remote, order)) for order in orders]

        return elsewhere.run_cells(specs, submit, watch, timeout_s, memory_gib)
    finally:
        if ours:
            ray.shutdown()


@contextlib.contextmanager
def _own_signals() -> Iterator[None]:
    """Ray sets a handler of its own for SIGTERM, which ours is to stay: it writes the table of what is finished."""
    main = threading.current_thread() is threading.main_thread()
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        if main:
            signal.signal(signal.SIGTERM, before)


def _answers(address: str) -> None:
    """Raises OSError where nobody listens at host:port, which Ray would try for minutes."""
    host, colon, port = address.rpartition(":")
    if colon and "/" not in host and port.isdecimal():
        socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()


def _given(remote: Any, order: Order) -> Any:
    spec = order.cell
    return remote.options(
        name=f"{spec.method_text} {spec.budget or ''}".strip(),
        num_cpus=spec.threads,
        num_gpus=1 if spec.device.startswith("cuda") else 0,
        memory=int(order.memory_gib * 2**30),
        max_retries=TRIES,
        scheduling_strategy="SPREAD",
    ).remote(order)


class _Task:
    def __init__(self, ray: Any, reference: Any) -> None:
        self.ray, self.reference = ray, reference

    def done(self) -> bool:
        return bool(self.ray.wait([self.reference], timeout=0)[0])

    def failure(self) -> str:
        try:
            self.ray.get(self.reference)
        except Exception as error:
            cause = getattr(error, "cause", None) or error
            return f"{type(cause).__name__}: {first_line(cause)}"
        return ""

    def cancel(self) -> None:
        with contextlib.suppress(Exception):
            self.ray.cancel(self.reference, force=True)


def _ray() -> Any:
    try:
        import ray
    except ImportError:
        raise ValueError("--engine ray needs Ray on every machine: pip install '.[ray]'") from None
    return ray
