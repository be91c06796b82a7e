"""What fused kernels know of a layer: prepared once, and again when the layer's tensors are others or were written to."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from kernels.codebook import CodebookLinear
from kernels.packed import PackedLinear


def view(layer: PackedLinear, name: str, make: Callable[[PackedLinear], Any]) -> Any:
    """The view `make(layer)`, kept with the layer under `name` for as long as its tensors stay as they are."""
    state, known = _state(layer), layer.__dict__.get(name)
    if known is None or known[0] != state:
        known = layer.__dict__[name] = (state, make(layer))
    return known[1]


def _state(layer: PackedLinear) -> list[tuple[int, int]]:
    shared = getattr(layer, "shared", None)  # a table of the model's
    buffers = [*layer.buffers(), *(shared.buffers() if shared is not None else ())]
    return [(buffer.data_ptr(), 0 if buffer.is_inference() else buffer._version) for buffer in buffers]


def supports(layer: PackedLinear) -> bool:
    """Whether the fused kernels read this layout: codes along rows, one order of columns for all of them, tables that fit a cache."""
    return not (isinstance(layer, CodebookLinear) and (layer.order is not None or layer.along == "columns" or layer.index_bits > 12))
