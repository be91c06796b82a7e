"""What a long measurement has found so far, kept in a file now and then, so that a kill costs seconds of it."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path

from torch import Tensor

from harness.data.sealed import believed, load_tensors, save_tensors

SAVE_S = 15.0  # seconds between two writes, at least
SHARE = 0.1  # of the time, at most, that goes into writing


class Unfinished:
    """The state of a measurement after some of its steps, as named tensors; `path` None: kept nowhere."""

    def __init__(self, path: Path | None = None) -> None:
        self.path, self._written, self._cost = path, time.monotonic(), 0.0

    def state(self, device: str = "cpu") -> tuple[int, dict[str, Tensor]]:
        """(steps that are done, what was kept after them)."""
        kept = self.path and believed(self.path, load_tensors)
        if not kept:
            return 0, {}
        tensors, metadata = kept
        return int(metadata["steps"]), {name: tensor.to(device) for name, tensor in tensors.items()}

    def keep(self, steps: int, state: Callable[[], Mapping[str, Tensor]]) -> None:
        """Write, if it is time to. What is written is cloned: parts of one tensor are not stored as such."""
        if self.path is None or time.monotonic() - self._written < max(SAVE_S, self._cost / SHARE):
            return
        start = time.monotonic()
        save_tensors(self.path, {name: tensor.clone() for name, tensor in state().items()}, {"steps": str(steps)})
        self._written = time.monotonic()
        self._cost = self._written - start

    def forget(self) -> None:
        if self.path is not None:
            self.path.unlink(missing_ok=True)


def prefixed(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {f"{prefix}/{name}": tensor for name, tensor in tensors.items()}


def under(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors that `prefixed` named so, by their own names."""
    return {name.removeprefix(f"{prefix}/"): t for name, t in tensors.items() if name.startswith(f"{prefix}/")}
