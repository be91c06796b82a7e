"""What a long measurement has found so far, kept in a file now and then, so that a kill costs seconds of it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path

from torch import Tensor

from harness.data.sealed import believed, checked, save_tensors
from harness.data.tensor_file import TensorFile

SAVE_S = 15.0  # seconds between two writes, at least
SHARE = 0.1  # of the time, at most, that goes into writing
FORM = "2"  # of what is kept; what another version kept is measured again


class Unfinished:
    """The state of a measurement after some of its steps, as named tensors; `path` None: kept nowhere."""

    def __init__(self, path: Path | None = None) -> None:
        self.path, self._written, self._cost = path, time.monotonic(), 0.0

    def state(self) -> tuple[int, Mapping[str, Tensor]]:
        """(steps that are done, what was kept after them), on the CPU."""
        if self.path is None or believed(self.path, checked) is None:
            return 0, {}
        file = TensorFile(self.path)
        if file.metadata.get("form") != FORM:
            return 0, {}
        return int(file.metadata["steps"]), Asked({name: partial(file.read, name) for name in file.specs})

    def keep(self, steps: int, state: Callable[[], Mapping[str, Tensor]]) -> None:
        """Write, if it is time to."""
        if self.path is None or time.monotonic() - self._written < max(SAVE_S, self._cost / SHARE):
            return
        start = time.monotonic()
        save_tensors(self.path, state(), {"steps": str(steps), "form": FORM})
        self._written = time.monotonic()
        self._cost = self._written - start

    def forget(self) -> None:
        if self.path is not None:
            self.path.unlink(missing_ok=True)


class Asked(Mapping[str, Tensor]):
    """Tensors that are read when they are asked for: all of them together may be more than memory."""

    def __init__(self, reads: Mapping[str, Callable[[], Tensor]]) -> None:
        self.reads = reads

    def __getitem__(self, name: str) -> Tensor:
        return self.reads[name]()

    def __iter__(self) -> Iterator[str]:
        return iter(self.reads)

    def __len__(self) -> int:
        return len(self.reads)


def joined(**parts: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """All tensors of some parts, under `part/name`; none is asked for yet."""
    return Asked({f"{part}/{name}": partial(of.__getitem__, name) for part, of in parts.items() for name in of})


def part(name: str, tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """The tensors that `joined` named so, by their own names."""
    return Asked(
        {
            full.removeprefix(f"{name}/"): partial(tensors.__getitem__, full)
            for full in tensors
            if full.startswith(f"{name}/")
        }
    )
