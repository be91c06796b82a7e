"""`StoredModule`: a module whose buffers are what is stored, counted from their bytes and kept in their dtype."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar, Self

import torch
from torch import Tensor, nn

from kernels.formats.bits import PARTS, StoredBits


class StoredModule(nn.Module):
    """A module whose buffers keep the dtype they are stored in.

    `.to(dtype)`, `.half()` and the like move the device and nothing else: converting a stored tensor would make the
    object that is scored another one than the object that was counted."""

    # Buffer name -> one of PARTS, in addition to those of the base classes. A buffer that is not listed is no weight.
    part_of: ClassVar[dict[str, str]] = {}

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        device = fn(torch.empty(0, device=self._device())).device
        return super()._apply(lambda t: torch.empty_like(t, device=device) if t.is_meta else t.to(device), recurse)

    def _device(self) -> torch.device:
        tensor = next((b for b in self.buffers()), None)
        return tensor.device if tensor is not None else torch.device("cpu")

    def stored_parts(self) -> dict[str, str]:
        """Name of every stored weight tensor (dotted, relative to this module) -> the part it is counted under."""
        parts: dict[str, str] = {}
        for cls in reversed(type(self).__mro__):
            parts |= vars(cls).get("part_of", {})
        own = {name: parts[name] for name, _ in self.named_buffers(recurse=False) if name in parts}
        for child_name, child in self.named_children():
            assert isinstance(child, StoredModule)
            own |= {f"{child_name}.{name}": part for name, part in child.stored_parts().items()}
        return own

    def stored_bits(self) -> StoredBits:
        """8 x the bytes of every stored weight tensor."""
        bits = dict.fromkeys(PARTS, 0)
        for name, part in self.stored_parts().items():
            tensor = self.get_buffer(name)
            bits[part] += 8 * tensor.numel() * tensor.element_size()
        return StoredBits(**bits)
