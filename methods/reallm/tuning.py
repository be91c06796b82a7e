"""Block-wise tuning: what a packed block stores in real numbers, trained to give the uncompressed model's outputs.

After all layers of a block are packed, codes stay as they are and block scales, codebooks and low-rank factors are
trained by Adam on the squared error of the block's output behind the packed prefix (the paper's block-wise stage, after
AQLM, arXiv 2401.06118), of every token relative to its own size: a few tokens have states hundreds of times as large as
the others', and would be all that counts. Every forward pass sees stored numbers: each tensor is rounded to its stored
form with a straight-through gradient, so that what training ends with is what is decoded.

The target lies between two: what the original block makes of the inputs it now gets, and, `follow` of the way, what it
made of the uncompressed model's. The first takes back none of the errors made before the block; the second asks a block
for what it cannot know, and from few windows it learns their noise. As with the weights (`calibrated.followed`), half
way is better than either."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from kernels.formats.codebook import CodebookLinear
from kernels.formats.lowrank import quantise_lowrank
from kernels.formats.scales import quantise_scales
from kernels.formats.trellis import TrellisLinear
from methods.base import Block
from methods.schedule import warm_cosine

SMALLEST = 2.0**-40  # square of a token's state

Latent = CodebookLinear | TrellisLinear


@dataclass(frozen=True)
class Schedule:
    epochs: int
    rate: float  # step of Adam in units of each tensor's own size
    batch: int  # windows per step
    follow: float  # where the target lies between the original block's outputs on drifted inputs (0) and on its own (1)


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
        return nn.functional.linear(x, self.weight().to(x.dtype), bias)


def tune_block(block: Block, packed: Mapping[str, Latent], schedule: Schedule, seed: int) -> dict[str, float]:
    """Train the layers in place; they are left in the block as `TunedLinear`s, to be installed again. Returns
    {tuning_steps, tuning_tokens, loss_before, loss_after}, losses as in `_errors`.

    The numbers of the epoch with the least loss over all windows are kept; the start is one of them, so tuning never
    hurts on them."""
    hidden_NTH, target_NTH = _windows(block, packed, schedule)
    tuned = {name: TunedLinear(layer) for name, layer in packed.items()}
    for name, module in tuned.items():
        block.lend(name, module)
    parameters = [p for module in tuned.values() for p in module.parameters()]
    optimiser = torch.optim.Adam(parameters, lr=schedule.rate, betas=(0.9, 0.95))
    generator = torch.Generator().manual_seed(seed)
    steps = schedule.epochs * -(-len(hidden_NTH) // schedule.batch)
    rate = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: warm_cosine(step, steps))
    before = best = _loss(block, hidden_NTH, target_NTH, schedule.batch)
    kept = [p.detach().clone() for p in parameters]
    for _ in range(schedule.epochs):
        for index_B in torch.randperm(len(hidden_NTH), generator=generator).split(schedule.batch):
            index_B = index_B.to(hidden_NTH.device)
            loss = _errors(block.run(hidden_NTH[index_B]), target_NTH[index_B]).mean()
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            rate.step()
        now = _loss(block, hidden_NTH, target_NTH, schedule.batch)
        if now < best:
            best, kept = now, [p.detach().clone() for p in parameters]
    with torch.no_grad():
        for parameter, value in zip(parameters, kept, strict=True):
            parameter.copy_(value)
        for module in tuned.values():
            module.packed.refill(**module.stored())
    tokens = schedule.epochs * hidden_NTH[..., 0].numel()
    return {"tuning_steps": steps, "tuning_tokens": tokens, "loss_before": before, "loss_after": best}


@torch.no_grad()
def _windows(block: Block, names: Iterable[str], schedule: Schedule) -> tuple[Tensor, Tensor]:
    """Hidden states in front of the block, and what it is to make of them, both [N, T, H]."""
    hidden_NTH, original_NTH = block.windows()
    for name in names:
        block.restore(name)
    own_NTH = torch.cat([block.run(h) for h in hidden_NTH.split(schedule.batch)])
    return hidden_NTH, torch.lerp(own_NTH, original_NTH, schedule.follow)


@torch.no_grad()
def _loss(block: Block, hidden_NTH: Tensor, target_NTH: Tensor, batch: int) -> float:
    parts = zip(hidden_NTH.split(batch), target_NTH.split(batch), strict=True)
    return float(torch.cat([_errors(block.run(h), t) for h, t in parts]).mean())


def _errors(output_NTH: Tensor, target_NTH: Tensor) -> Tensor:
    """Squared error of every token, relative to the square of its target, [N, T]."""
    target_NTH = target_NTH.float()
    return (output_NTH.float() - target_NTH).square().sum(dim=-1) / target_NTH.square().sum(dim=-1).clamp_min(SMALLEST)


def _through(value: Tensor, stored: Tensor) -> Tensor:
    """`stored` with the gradient of `value`."""
    return value + (stored - value).detach()


def _rms(value: Tensor) -> Tensor:
    return value.square().mean().sqrt()
