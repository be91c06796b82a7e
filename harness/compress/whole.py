"""Layers whose own numbers are trained, where the others have factors beside them: the cores of an operator.

For as long as training takes, a packed layer that has such numbers (`PackedLinear.learnt`) stands in the model as a
`LearntLinear`, fp32. At the end they are rounded to their stored form, once."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from harness.compressed import CompressedModel
from kernels.formats.packed import PackedLinear


class LearntLinear(nn.Module):
    """A packed layer as parameters: the weight is made of them at every use."""

    packed: PackedLinear

    def __init__(self, packed: PackedLinear) -> None:
        super().__init__()
        object.__setattr__(self, "packed", packed)  # its buffers are not this module's
        self.learnt = nn.ParameterDict({name: nn.Parameter(tensor) for name, tensor in packed.learnt().items()})

    def forward(self, x: Tensor) -> Tensor:
        constant = self.packed.constant
        bias = None if constant is None else constant.to(x.dtype)
        return nn.functional.linear(x, self.packed.weight_of(dict(self.learnt)).to(x.dtype), bias)

    @torch.no_grad()
    def store(self) -> None:
        self.packed.relearn({name: parameter.detach() for name, parameter in self.learnt.items()})


@contextlib.contextmanager
def learning(compressed: CompressedModel) -> Iterator[nn.Module]:
    """The model with a `LearntLinear` for every layer that can be one, and nothing else to train; on leaving, the
    packed layers are back in their places.

    Raises ValueError when there is none."""
    model = compressed.model
    packed = {name: layer for name, layer in compressed.packed.items() if layer.learnt()}
    if not packed:
        raise ValueError("no layer has numbers to train: all were left whole; give a smaller budget")
    model.requires_grad_(False)
    try:
        for name, layer in packed.items():
            model.set_submodule(name, LearntLinear(layer))
        yield model
    finally:
        for name, layer in packed.items():
            model.set_submodule(name, layer)
        model.requires_grad_(False)


def store_learnt(model: nn.Module) -> None:
    """Round what was trained to its stored form."""
    for module in list(model.modules()):
        if isinstance(module, LearntLinear):
            module.store()
