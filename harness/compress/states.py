"""The hidden states that a text has in front of a block, in memory or in a file."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from harness.data.tensor_file import bytes_of, fill, named


class States:
    """The states [N, T, H] of N windows, read and written a few windows at a time, on their `device`. With a `folder`
    they are in a file there that has no name and ends with this process: what is in memory are the windows in use."""

    def __init__(
        self, shape: tuple[int, int, int], dtype: torch.dtype, device: torch.device, folder: Path | None = None
    ) -> None:
        self.shape, self.dtype, self.device, self.folder = shape, dtype, device, folder
        self._held_NTH, self._file = None, None
        if folder is None:
            self._held_NTH = torch.empty(shape, dtype=dtype, device=device)
        else:
            folder.mkdir(parents=True, exist_ok=True)
            self._file = tempfile.TemporaryFile(dir=folder, buffering=0)  # noqa: SIM115  open as long as this lives

    @classmethod
    def of(cls, states_NTH: Tensor) -> States:
        """These, in memory."""
        count, tokens, width = states_NTH.shape
        found = cls((count, tokens, width), states_NTH.dtype, states_NTH.device)
        found.write(0, states_NTH)
        return found

    def __len__(self) -> int:
        return self.shape[0]

    @property
    def tokens(self) -> int:
        return self.shape[0] * self.shape[1]

    def read(self, start: int, stop: int) -> Tensor:
        """Windows [start, stop), which nobody may change: they may be the memory of what is held."""
        if self._held_NTH is not None:
            return self._held_NTH[start:stop]
        assert self._file is not None
        found_NTH = torch.empty(min(stop, len(self)) - start, *self.shape[1:], dtype=self.dtype)
        self._file.seek(start * self._window_bytes)
        whole = fill(self._file, found_NTH.view(torch.uint8).view(-1))
        assert whole, "windows are written before they are read"
        return found_NTH.to(self.device)

    def write(self, start: int, states_NTH: Tensor) -> None:
        """Raises OSError, naming the folder, for what the system refuses."""
        if self._held_NTH is not None:
            self._held_NTH[start : start + len(states_NTH)] = states_NTH
            return
        assert self._file is not None and self.folder is not None
        view = bytes_of(states_NTH.detach().to("cpu", self.dtype))
        with named(self.folder):
            self._file.seek(start * self._window_bytes)
            while view:
                view = view[self._file.write(view) :]

    def split(self, windows: int) -> Iterator[Tensor]:
        """All, so many at a time."""
        for start in range(0, len(self), windows):
            yield self.read(start, start + windows)

    def replace(self, parts: Iterable[Tensor]) -> None:
        """By others, in their order; what becomes of windows may be computed from them as they are read."""
        start = 0
        for part_NTH in parts:
            self.write(start, part_NTH)
            start += len(part_NTH)

    def whole(self) -> Tensor:
        return self.read(0, len(self))

    def copy(self) -> States:
        found = States(self.shape, self.dtype, self.device, self.folder)
        found.replace(self.split(1))
        return found

    @property
    def _window_bytes(self) -> int:
        return self.shape[1] * self.shape[2] * self.dtype.itemsize
