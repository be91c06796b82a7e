"""What each phase of a cell took: time, bytes read from files, the most memory held meanwhile."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from harness.measure.machine import peak_process_bytes
from harness.store.results import PhaseCost

GIB = 2**30
log = logging.getLogger(__name__)


class Meter:
    """The phases of this process, in the order they were gone through. `blocks`: how many every phase goes through,
    where each phase is to be told of when it is over; None: nothing is said."""

    def __init__(self, blocks: int | None = None) -> None:
        self.phases: dict[str, PhaseCost] = {}
        self.blocks = blocks
        self._peak = 0  # of phases that are over

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        self._peak = max(self._peak, peak_process_bytes())
        _forget_peak()
        start, read = time.perf_counter(), _read_bytes()
        yield
        seconds, read = time.perf_counter() - start, _read_bytes() - read
        self.phases[name] = found = PhaseCost(seconds, read / GIB, peak_process_bytes() / GIB)
        if self.blocks:
            log.info(
                "%s: %.1f s, %.2f s a block; %.2f GiB read; at most %.2f GiB of memory",
                name,
                seconds,
                seconds / self.blocks,
                found.read_gib,
                found.peak_gib,
            )

    @property
    def peak_gib(self) -> float:
        """Of the process so far."""
        return max(self._peak, peak_process_bytes()) / GIB


def _forget_peak() -> None:
    """Have the kernel count the most memory from now on. Where it does not, a phase's is at least that of those in
    front of it."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def _read_bytes() -> int:
    """By this process so far, from files and pipes; 0 where the system does not count."""
    with suppress(OSError, ValueError):
        counts = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
        return int(counts["rchar"])
    return 0
