"""Training what a packed layer stores in real numbers: scales, minima, codebooks, low-rank factors, cores. Codes stay
as they are.

Every forward pass sees stored numbers: each tensor is rounded to its stored form with a straight-through gradient, so
that what training ends with is what is decoded. A block of them is tuned to the uncompressed model's outputs
(`tune_numbers`, `methods.tuning`; after AQLM, arXiv 2401.06118), or a whole model's are trained end to end
(`harness.compress.training`)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from kernels.formats.packed import PackedLinear
from methods.base import Block
from methods.tuning import Goal, Schedule, tune


class TunedLinear(nn.Module):
    """A packed layer whose stored real numbers are trained: start + size * change, where the size of a scale is the
    scale itself, and that of other numbers the root mean square of their tensor. So one rate serves all of them."""

    packed: PackedLinear
    decoded: Tensor | None = None  # the weight and how it came about, between `hold` and `let_go`
    held: Tensor | None = None  # the weight alone, in which the gradients of several passes add up

    def __init__(self, packed: PackedLinear, keep_codes: bool = False) -> None:
        """`keep_codes`: unpack them once, for 4 bytes a code, and not in every pass."""
        super().__init__()
        object.__setattr__(self, "packed", packed)  # its buffers are not this module's
        self.codes = packed.indices() if keep_codes else None
        self.start = packed.learnt()
        self.size = {name: value if name.endswith("scale") else rms(value) for name, value in self.start.items()}
        self.change = nn.ParameterDict({name: torch.zeros_like(value) for name, value in self.start.items()})

    def now(self) -> dict[str, Tensor]:
        """The numbers, not yet rounded."""
        return {name: start + self.size[name] * self.change[name] for name, start in self.start.items()}

    @torch.no_grad()
    def store(self) -> None:
        """Have the packed layer store them."""
        self.packed.relearn(self.now())

    def weight(self) -> Tensor:
        """What the stored form of the current numbers decodes to, with the gradient of the numbers."""
        now = self.now()
        with torch.no_grad():
            self.packed.relearn(now)
            stored = self.packed.learnt()
        through = {name: value + (stored[name] - value).detach() for name, value in now.items()}
        return self.packed.weight_of(through, self.codes)

    def hold(self) -> None:
        """Decode the weight once, for all passes until `let_go`."""
        self.decoded = self.weight()
        self.held = self.decoded.detach().requires_grad_()

    def let_go(self) -> None:
        """Hand on to the numbers what gradient the passes gave the weight."""
        decoded, held, self.decoded, self.held = self.decoded, self.held, None, None
        if decoded is not None and held is not None and held.grad is not None:  # None: an expert no token was sent to
            decoded.backward(held.grad)

    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.packed.constant is None else self.packed.constant.to(x.dtype)
        if self.packed.rounds:
            x = self.packed.turned_back(self.packed.entering(x))
        weight = self.weight() if self.held is None else self.held
        return nn.functional.linear(x, weight.to(x.dtype), bias)


def tune_numbers(block: Block, packed: Mapping[str, PackedLinear], schedule: Schedule, seed: int) -> dict[str, float]:
    """Train the layers' numbers in place; they are left in the block as `TunedLinear`s, to be installed again. Returns
    what `tune` does; the rate is a step in units of each tensor's own size."""
    goal = Goal.of(block, packed, schedule)
    tuned = {name: TunedLinear(layer, keep_codes=True) for name, layer in packed.items() if layer.learnt()}
    # A layer without such numbers stands there as it was packed: `goal` has left the original in its place.
    noted = tune(block, goal, {**packed, **tuned}, schedule, seed)
    for module in tuned.values():
        module.store()
    return noted


def rms(value: Tensor) -> Tensor:
    """The size of a tensor's numbers: their root mean square."""
    return value.square().mean().sqrt()
