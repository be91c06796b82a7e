"""QLLM (Liu, Gong, Wei, Dong, Cai, Zhuang; ICLR 2024, arXiv 2310.08041): weights and activations of few bits.

    sec. 4.1   outlier channels are taken apart, similar ones put together      methods.codecs.reassembly
    sec. 4.2   low-rank factors, trained to undo what rounding did to a block,
               merged into the weights before these are rounded for good        `Correction`, `QLLM.tune_block`

Weights are rounded to nearest on grids per group of the reassembled channels (the paper: of a whole row, `group=0`,
asymmetric), activations by the layer itself (`--act-bits`, kernels.formats.activations). `qllm:reassembled` leaves the
correction out, and with it the fine-tuned track. What differs from the paper, and what was obtained: README.md."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from kernels.formats.packed import PackedLinear
from kernels.formats.reassembly import Reassembly
from kernels.formats.uniform import UniformLinear
from methods.base import Block, Compressed, LayerConfig, LayerData, LayerSpec, Method, Needs, Track, layer_seed
from methods.codecs.grids import Grid, fit_grid
from methods.codecs.reassembly import choose
from methods.tuning import Goal, Schedule, tune
from methods.uniform_grid import UniformGridMethod


@dataclass(frozen=True, kw_only=True)
class Reassembled(UniformGridMethod):
    """Reassembled channels on uniform grids, nothing trained."""

    name: ClassVar[str] = "qllm"
    algorithm: ClassVar[str] = "reassembled"
    version: ClassVar[int] = 1
    track: ClassVar[Track] = Track.CALIBRATED

    offset: str | None = "zero"
    most: float = 0.2  # channels that may be added in between, as a share of all

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.grid not in ("minmax", "mse"):
            raise ValueError("qllm has grid=minmax and grid=mse")
        if not 0 <= self.most <= 0.5:
            raise ValueError("most is a share from 0 (nothing is taken apart) to 0.5")

    @classmethod
    def variants(cls) -> dict[str, Method]:
        return {"reassembled": Reassembled()}

    @property
    def needs(self) -> Needs:
        return Needs(inputs=True)

    def candidates(self, layer: LayerSpec) -> list[LayerConfig]:
        return [config.plus(reassembled=True) for config in super().candidates(layer)]

    def compress(self, data: LayerData, layer: LayerSpec, config: LayerConfig) -> Compressed:
        assert data.inputs is not None
        packed = config.layout(layer, data.weight_OI.device)
        assert isinstance(packed, UniformLinear)

        def rounded(weight_OI: Tensor) -> Tensor:
            grid = self._grid(packed, weight_OI)
            return grid.decode(grid.round(weight_OI))

        place_I, copies_I = choose(data.weight_OI, data.inputs, data.act_bits, rounded, self.most)
        chosen = Reassembly.of(place_I, copies_I)
        gathered_OI = chosen.gather(data.weight_OI)
        grid = self._grid(packed, gathered_OI)
        tensors = packed.tensors(grid.round(gathered_OI), **grid.stored)
        packed.fill(**tensors, **{f"reassembly.{name}": tensor for name, tensor in chosen.named_buffers()})
        return Compressed(packed, {"channels_added": float(copies_I.sum() - len(copies_I))})

    def _grid(self, packed: UniformLinear, weight_OI: Tensor) -> Grid:
        return fit_grid(weight_OI, bits=packed.bits, group=packed.group, offset=packed.offset, search=self.grid)


@dataclass(frozen=True, kw_only=True)
class QLLM(Reassembled):
    """Reassembled, and corrected block by block."""

    algorithm: ClassVar[str] = ""
    track: ClassVar[Track] = Track.FINE_TUNED

    rank: int = 4  # of the correction, which is not stored
    epochs: int = 4
    rate: float = 2e-3
    batch: int = 1  # windows per step
    follow: float = 0.5  # where a block's target lies (methods.tuning); the paper: 1, what the original model's made

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rank < 1 or self.epochs < 1 or self.batch < 1 or not 0 < self.rate < 1 or not 0 <= self.follow <= 1:
            raise ValueError("rank, epochs and batch must be at least 1, rate between 0 and 1, follow from 0 to 1")

    @property
    def needs(self) -> Needs:
        return Needs(inputs=True, outputs=True)

    def tune_block(self, block: Block, packed: Mapping[str, PackedLinear], seed: int) -> dict[str, float]:
        """The layers are left as they were where the merged weights do worse."""
        schedule = Schedule(self.epochs, self.rate, self.batch, self.follow)
        goal = Goal.of(block, packed, schedule)
        modules: dict[str, Correction] = {}
        for name, layer in packed.items():
            assert isinstance(layer, UniformLinear)
            modules[name] = Correction(layer, block.weight(name), self.rank, layer_seed(seed, name))
        noted = tune(block, goal, modules, schedule, seed)
        before = {
            name: {part: layer.get_buffer(part) for part in layer.stored_parts()} for name, layer in packed.items()
        }
        for name, module in modules.items():
            merged_OI = module.merged()
            grid = self._grid(module.packed, merged_OI)
            module.packed.refill(**module.packed.tensors(grid.round(merged_OI), **grid.stored))
            block.lend(name, module.packed)
        noted["loss_merged"] = goal.loss(block)
        if noted["loss_merged"] >= noted["loss_before"]:
            for name, layer in packed.items():
                layer.refill(**before[name])
        return noted


class Correction(nn.Module):
    """A packed layer with low-rank factors beside its codes, on the same reassembled and rounded inputs."""

    packed: UniformLinear

    def __init__(self, packed: UniformLinear, weight_OI: Tensor, rank: int, seed: int) -> None:
        super().__init__()
        object.__setattr__(self, "packed", packed)  # its buffers are not this module's
        assert packed.reassembly is not None
        self.gathered_OI = packed.reassembly.gather(weight_OI)
        self.base_OI = packed.decode_entered()
        rows, columns = weight_OI.shape
        drawn_RI = torch.rand(rank, columns, generator=torch.Generator().manual_seed(seed)) * 2 - 1
        self.right = nn.Parameter((drawn_RI / columns**0.5).to(weight_OI))  # as LoRA's draws, one factor at zero
        self.left = nn.Parameter(torch.zeros(rows, rank).to(weight_OI))

    @torch.no_grad()
    def merged(self) -> Tensor:
        """The original weight of the reassembled channels with the correction added, [O, I]."""
        return self.gathered_OI + self.left @ self.right

    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.packed.bias is None else self.packed.bias.to(x.dtype)
        weight_OI = self.base_OI + self.left @ self.right
        return nn.functional.linear(self.packed.entering(x), weight_OI.to(x.dtype), bias)
