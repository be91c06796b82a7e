"""Numbers that are trained end to end where others have factors beside their layers: those that the packed layers store
(`methods.trained_numbers`), and the factors of the norms, which every model has at 16 bits. For as long as training
takes, a `TunedLinear` stands in the place of every packed layer that has some.

Norms are trained by QuIP# (arXiv 2402.04396, sec. 5) and AQLM (arXiv 2401.06118) too: with the scales of rows they are
scales of the columns behind them, and cost no bit."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from harness.compressed import CompressedModel
from kernels.formats.dense import HALF_DTYPES
from methods.trained_numbers import TunedLinear, rms


class TunedFactor(nn.Module):
    """A norm's factors while they are trained (a parametrization): start + size * change, rounded to the 16 bits that
    they are stored in, with a straight-through gradient; the size is their root mean square."""

    def __init__(self, start: Tensor, stored: torch.dtype) -> None:
        super().__init__()
        self.size, self.stored = rms(start), stored
        self.change = nn.Parameter(torch.zeros_like(start))

    def forward(self, start: Tensor) -> Tensor:
        now = start + self.size * self.change
        return now + (now.to(self.stored).to(now.dtype) - now).detach()


@contextlib.contextmanager
def learning(compressed: CompressedModel) -> Iterator[nn.Module]:
    """The model with a `TunedLinear` for every layer that can be one and tuned norms, and nothing else to train; on
    leaving, packed layers and norms are back in their places, and where training did not end, with what they stored
    before it: every pass has layers store what it sees.

    Raises ValueError when no packed layer has numbers."""
    model = compressed.model
    packed = {name: layer for name, layer in compressed.packed.items() if layer.learnt()}
    if not packed:
        raise ValueError("no layer has numbers to train: all were left whole; give a smaller budget")
    before = {name: {part: layer.get_buffer(part) for part in layer.stored_parts()} for name, layer in packed.items()}
    norms = [] if compressed.base else _norms(model)  # those of a pair are its base's, and not stored
    keep = False
    model.requires_grad_(False)
    try:
        for name, layer in packed.items():
            model.set_submodule(name, TunedLinear(layer))
        for norm in norms:
            factor = TunedFactor(norm.get_parameter("weight").detach(), HALF_DTYPES[compressed.half])
            parametrize.register_parametrization(norm, "weight", factor)
        yield model
        keep = True
    except BaseException:
        for name, layer in packed.items():
            layer.refill(**before[name])
        raise
    finally:
        for name, layer in packed.items():
            model.set_submodule(name, layer)
        for norm in norms:
            if parametrize.is_parametrized(norm, "weight"):
                parametrize.remove_parametrizations(norm, "weight", leave_parametrized=keep)
        model.requires_grad_(False)


def _norms(model: nn.Module) -> list[nn.Module]:
    """Modules whose weight is one factor for each of their inputs."""
    return [
        module
        for module in model.modules()
        if isinstance(weight := getattr(module, "weight", None), nn.Parameter)
        and weight.ndim == 1
        and weight.is_floating_point()
    ]


def store_learnt(model: nn.Module) -> None:
    """Round what was trained to its stored form; a norm's factors always are."""
    for module in _tuned(model):
        module.store()


@contextlib.contextmanager
def decoded_once(model: nn.Module) -> Iterator[None]:
    """The passes of one step of training: no weight is decoded twice in it."""
    tuned = _tuned(model)
    for module in tuned:
        module.hold()
    yield
    for module in tuned:
        module.let_go()


def _tuned(model: nn.Module) -> list[TunedLinear]:
    return [module for module in model.modules() if isinstance(module, TunedLinear)]
