"""Layers whose own numbers are trained end to end (`methods.trained_numbers`), where others have factors beside them.
For as long as training takes, a `TunedLinear` stands in the place of every packed layer that has some."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from torch import nn

from harness.compressed import CompressedModel
from methods.trained_numbers import TunedLinear


@contextlib.contextmanager
def learning(compressed: CompressedModel) -> Iterator[nn.Module]:
    """The model with a `TunedLinear` for every layer that can be one, and nothing else to train; on leaving, the
    packed layers are back in their places, and where training did not end, with what they stored before it: every pass
    has them store what it sees.

    Raises ValueError when there is none."""
    model = compressed.model
    packed = {name: layer for name, layer in compressed.packed.items() if layer.learnt()}
    if not packed:
        raise ValueError("no layer has numbers to train: all were left whole; give a smaller budget")
    before = {name: {part: layer.get_buffer(part) for part in layer.stored_parts()} for name, layer in packed.items()}
    model.requires_grad_(False)
    try:
        for name, layer in packed.items():
            model.set_submodule(name, TunedLinear(layer))
        yield model
    except BaseException:
        for name, layer in packed.items():
            layer.refill(**before[name])
        raise
    finally:
        for name, layer in packed.items():
            model.set_submodule(name, layer)
        model.requires_grad_(False)


def store_learnt(model: nn.Module) -> None:
    """Round what was trained to its stored form."""
    for module in list(model.modules()):
        if isinstance(module, TunedLinear):
            module.store()
