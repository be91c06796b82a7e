"""Training a packed block as a whole: its output behind the packed prefix, held against the uncompressed model's.

What is trained is the caller's (modules that stand in the layers' places); the loss is the squared error of the block's
output, of every token relative to its own size: a few tokens have states hundreds of times as large as the others', and
would be all that counts.

The target lies between two: what the original block makes of the inputs it now gets, and, `follow` of the way, what it
made of the uncompressed model's. The first takes back none of the errors made before the block; the second asks a block
for what it cannot know, and from few windows it learns their noise. As with the weights (`methods.codecs.drift`), half
way is better than either."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from methods.base import Block
from methods.schedule import warm_cosine

SMALLEST = 2.0**-40  # square of a token's state


@dataclass(frozen=True)
class Schedule:
    epochs: int
    rate: float  # of Adam
    batch: int  # windows per step
    follow: float  # where the target lies between the original block's outputs on drifted inputs (0) and on its own (1)


@dataclass(frozen=True)
class Goal:
    """Hidden states in front of a block, and what it is to make of them, both [N, T, H]."""

    hidden_NTH: Tensor
    target_NTH: Tensor
    batch: int

    @classmethod
    @torch.no_grad()
    def of(cls, block: Block, names: Iterable[str], schedule: Schedule) -> Goal:
        """`names`: of the block's layers, whose originals stand in their places afterwards."""
        hidden_NTH, original_NTH = block.windows()
        for name in names:
            block.restore(name)
        own_NTH = torch.cat([block.run(h) for h in hidden_NTH.split(schedule.batch)])
        return cls(hidden_NTH, torch.lerp(own_NTH, original_NTH, schedule.follow), schedule.batch)

    @torch.no_grad()
    def loss(self, block: Block) -> float:
        """Of the block as it is now, over all windows."""
        parts = zip(self.hidden_NTH.split(self.batch), self.target_NTH.split(self.batch), strict=True)
        return float(torch.cat([_errors(block.run(h), t) for h, t in parts]).mean())


def tune(block: Block, goal: Goal, modules: Mapping[str, nn.Module], schedule: Schedule, seed: int) -> dict[str, float]:
    """Train the parameters of the modules, lent to the block in the layers' places, by Adam. Returns {tuning_steps,
    tuning_tokens, loss_before, loss_after}.

    The numbers of the epoch with the least loss over all windows are kept; the start is one of them, so tuning never
    hurts on them."""
    for name, module in modules.items():
        block.lend(name, module)
    hidden_NTH, target_NTH = goal.hidden_NTH, goal.target_NTH
    parameters = [p for module in modules.values() for p in module.parameters()]
    optimiser = torch.optim.Adam(parameters, lr=schedule.rate, betas=(0.9, 0.95))
    generator = torch.Generator().manual_seed(seed)
    steps = schedule.epochs * -(-len(hidden_NTH) // schedule.batch)
    rate = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: warm_cosine(step, steps))
    before = best = goal.loss(block)
    kept = [p.detach().clone() for p in parameters]
    for _ in range(schedule.epochs):
        for index_B in torch.randperm(len(hidden_NTH), generator=generator).split(schedule.batch):
            index_B = index_B.to(hidden_NTH.device)
            loss = _errors(block.run(hidden_NTH[index_B]), target_NTH[index_B]).mean()
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            rate.step()
        now = goal.loss(block)
        if now < best:
            best, kept = now, [p.detach().clone() for p in parameters]
    with torch.no_grad():
        for parameter, value in zip(parameters, kept, strict=True):
            parameter.copy_(value)
    tokens = schedule.epochs * hidden_NTH[..., 0].numel()
    return {"tuning_steps": steps, "tuning_tokens": tokens, "loss_before": before, "loss_after": best}


def _errors(output_NTH: Tensor, target_NTH: Tensor) -> Tensor:
    """Squared error of every token, relative to the square of its target, [N, T]."""
    target_NTH = target_NTH.float()
    return (output_NTH.float() - target_NTH).square().sum(dim=-1) / target_NTH.square().sum(dim=-1).clamp_min(SMALLEST)
