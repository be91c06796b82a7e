"""Block-wise tuning: what a packed block stores in real numbers, trained to give the uncompressed model's outputs.

After all layers of a block are packed, codes stay as they are and block scales, codebooks and low-rank factors are
trained (`methods.tuning`; the paper's block-wise stage, after AQLM, arXiv 2401.06118). Every forward pass sees stored
numbers: each tensor is rounded to its stored form with a straight-through gradient, so that what training ends with is
what is decoded."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from kernels.formats.codebook import CodebookLinear
from kernels.formats.lowrank import quantise_lowrank
from kernels.formats.scales import quantise_scales
from kernels.formats.trellis import TrellisLinear
from methods.base import Block
from methods.tuning import Goal, Schedule, tune

Latent = CodebookLinear | TrellisLinear


class TunedLinear(nn.Module):
    """A packed layer whose stored real numbers are trained: start * (1 + change) for scales, start + size * change for
    the others."""

    packed: Latent

    def __init__(self, packed: Latent) -> None:
        super().__init__()
        object.__setattr__(self, "packed", packed)  # its buffers are not this module's
        self.code_JI = packed.indices()
        self.start = {"scale": packed.scales.decode()}
        if packed.codebook is not None:
            self.start["entries"] = packed.entries()
        if packed.lowrank is not None:
            self.start["left"], self.start["right"] = packed.lowrank.factors()
        self.size = {name: value if name == "scale" else _rms(value) for name, value in self.start.items()}
        self.change = nn.ParameterDict({name: torch.zeros_like(value) for name, value in self.start.items()})

    def _now(self, name: str) -> Tensor:
        return self.start[name] + self.size[name] * self.change[name]

    def stored(self) -> dict[str, Tensor]:
        """The trained buffers of `packed`, by name."""
        tensors = {
            f"scales.{k}": v for k, v in quantise_scales(self._positive_scales(), self.packed.scales.form).items()
        }
        if "entries" in self.start:
            tensors["codebook"] = self._now("entries").half()
        if self.packed.lowrank is not None:
            stored = quantise_lowrank(self._now("left"), self._now("right"), self.packed.lowrank.bits)
            tensors |= {f"lowrank.{k}": v for k, v in stored.items()}
        return tensors

    def _positive_scales(self) -> Tensor:
        return self._now("scale").clamp_min(2.0**-24)

    def weight(self) -> Tensor:
        """What the stored form of the current numbers decodes to, with the gradient of the numbers."""
        scale_OG = self._positive_scales()
        with torch.no_grad():
            self.packed.refill(**self.stored())
            stored_scale_OG = self.packed.scales.decode()
            factors = self.packed.lowrank.factors() if self.packed.lowrank is not None else None
        entry_KD = (
            _through(self._now("entries"), self.packed.entries()) if "entries" in self.start else self.packed.entries()
        )
        if factors is not None:
            factors = (_through(self._now("left"), factors[0]), _through(self._now("right"), factors[1]))
        base_OI = self.packed.combine(self.code_JI, entry_KD, _through(scale_OG, stored_scale_OG))
        return self.packed.finish(base_OI, factors)

    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.packed.bias is None else self.packed.bias.to(x.dtype)
        if self.packed.rounds:
            x = self.packed.turned_back(self.packed.entering(x))
        return nn.functional.linear(x, self.weight().to(x.dtype), bias)


def tune_block(block: Block, packed: Mapping[str, Latent], schedule: Schedule, seed: int) -> dict[str, float]:
    """Train the layers in place; they are left in the block as `TunedLinear`s, to be installed again. Returns what
    `tune` does; the rate is a step in units of each tensor's own size."""
    goal = Goal.of(block, packed, schedule)
    tuned = {name: TunedLinear(layer) for name, layer in packed.items()}
    noted = tune(block, goal, tuned, schedule, seed)
    with torch.no_grad():
        for module in tuned.values():
            module.packed.refill(**module.stored())
    return noted


def _through(value: Tensor, stored: Tensor) -> Tensor:
    """`stored` with the gradient of `value`."""
    return value + (stored - value).detach()


def _rms(value: Tensor) -> Tensor:
    return value.square().mean().sqrt()
