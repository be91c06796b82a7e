"""Views: what fused kernels know of a layer, prepared once, and again when its tensors change or are written to."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Generic, Protocol, TypeVar

from torch import Tensor, nn

from kernels.formats.codebook import CodebookLinear
from kernels.formats.packed import PackedLinear
from kernels.formats.uniform import UniformLinear


class View(Protocol):
    @property
    def tensors(self) -> Mapping[str, Tensor]:
        """All that is held for the kernel: the layer's own tensors, and those prepared from them."""


Some = TypeVar("Some", bound=View)
Of = TypeVar("Of", bound=nn.Module)  # a layer, or a table that layers share


class Kept(Generic[Some]):
    """A view, and the tensors it was prepared from, with the number of writes each had seen."""

    def __init__(self, layer: nn.Module, view: Some) -> None:
        self.view = view
        shared = getattr(layer, "shared", None)  # a table of the model's
        owners: list[nn.Module] = [*layer.modules(), *([shared] if shared is not None else [])]
        self._sources = [
            (owner._buffers, name, buffer, _version(buffer))
            for owner in owners
            for name, buffer in owner._buffers.items()
        ]

    @property
    def current(self) -> bool:
        """Whether the layer's tensors still are those. Asked at every product: no call of torch's, no allocation."""
        return all(
            buffers[name] is known and _version(known) == version for buffers, name, known, version in self._sources
        )


def view(layer: Of, name: str, make: Callable[[Of], Some]) -> Some:
    """The view `make(layer)`, kept with the layer under `name` for as long as its tensors stay as they are."""
    known = layer.__dict__.get(name)
    if known is None or not known.current:
        known = layer.__dict__[name] = Kept(layer, make(layer))
    return known.view


def forget(layer: PackedLinear) -> None:
    """Let go of all that was prepared from the layer's tensors, and is prepared again when it is asked for."""
    for name in [name for name, value in vars(layer).items() if isinstance(value, Kept)]:
        del layer.__dict__[name]
    layer.unload()


def _version(buffer: Tensor | None) -> int:
    """How often the buffer was written to in place."""
    return 0 if buffer is None or buffer.is_inference() else buffer._version


def readable_codebook(layer: CodebookLinear) -> bool:
    """Whether the fused kernels read this layout: vectors down the rows, one order of columns for all of them, a table
    that fits a cache."""
    return layer.order is None and layer.along == "rows" and layer.index_bits <= 12


def readable_uniform(layer: UniformLinear) -> bool:
    """Whether the fused kernels read this layout: inputs are turned, or stand in another order, not both."""
    return layer.order is None or (layer.rotation is None and layer.reassembly is None)
