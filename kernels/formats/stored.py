"""What is stored is a tensor of a `StoredModule`: counted from its bytes, kept in its dtype."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

PARTS = ("codes", "scales", "tables", "adapters")


@dataclass(frozen=True)
class StoredBits:
    """Bits of stored tensors, by what they are for. Padding is counted where it is stored."""

    codes: int = 0  # indices of weights, nothing else
    scales: int = 0  # scales, zero points, minima, per-row factors
    tables: int = 0  # codebooks, decoders, permutations
    adapters: int = 0  # low-rank factors and their scales

    @property
    def total(self) -> int:
        return self.codes + self.scales + self.tables + self.adapters

    def __add__(self, other: StoredBits) -> StoredBits:
        return StoredBits(*(getattr(self, part) + getattr(other, part) for part in PARTS))


class StoredModule(nn.Module):
    """A module whose buffers keep the dtype they are stored in.

    `.to(dtype)`, `.half()` and friends move the device and nothing else: converting a stored tensor would make the
    object that is scored another one than the object that was counted."""

    part_of: ClassVar[
        dict[str, str]
    ] = {}  # buffer name -> one of PARTS; a buffer that is not listed is not a weight (bias)

    def _apply(self, fn, recurse: bool = True):
        device = fn(torch.empty(0, device=self._device())).device
        return super()._apply(lambda t: torch.empty_like(t, device=device) if t.is_meta else t.to(device), recurse)

    def _device(self) -> torch.device:
        tensor = next((b for b in self.buffers()), None)
        return tensor.device if tensor is not None else torch.device("cpu")

    def stored_parts(self) -> dict[str, str]:
        """Name of every stored weight tensor (dotted, relative to this module) -> the part it is counted under."""
        own = {n: self.part_of[n] for n, b in self.named_buffers(recurse=False) if b is not None and n in self.part_of}
        for child_name, child in self.named_children():
            own |= {f"{child_name}.{name}": part for name, part in child.stored_parts().items()}
        return own

    def stored_bits(self) -> StoredBits:
        bits = dict.fromkeys(PARTS, 0)
        for name, part in self.stored_parts().items():
            tensor = self.get_buffer(name)
            bits[part] += 8 * tensor.numel() * tensor.element_size()
        return StoredBits(**bits)
