"""Delta-CoMe (Ping, Wang, Wang, et al.; NeurIPS 2024, arXiv 2406.08903): the difference of a tuned model and its base
as low-rank factors whose bits fall with the singular values.

    Delta = U S V^T, cut to the components that the budget holds                 methods.codecs.factors
    bits by singular value: the first few components 8, the next 3, the rest     kernels.formats.bands
    2 (the triple of the released configuration)
    GPTQ on V^T with the layer's inputs X, then on U with S V^T X, where V^T     methods.codecs.feedback_on_grids
    is the quantised one

README.md holds it against the paper and its code, and says what is done otherwise."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from kernels.formats.bands import BandsLinear, numbers_of, text_of
from kernels.formats.scales import per_column
from kernels.formats.uniform import UniformLinear
from methods.base import Compressed, LayerConfig, LayerData, LayerSpec, Method, Needs, Sensitivity, Track
from methods.codecs.error_feedback import Feedback, check_damp, prepare
from methods.codecs.factors import best_factors
from methods.codecs.feedback_on_grids import codes_on_grids
from methods.codecs.grids import Grid, fit_grid

WIDTHS = (8, 3, 2)  # bits of the three bands
PUBLISHED = (2, 32)  # components of the first two at 4096 x 4096; fewer where there are fewer in all
PUBLISHED_AT = 4096
LEVELS = 64  # for so many parts of a bit
FINEST, MIXED = (4, 512, 4), (4, 512, 12)  # levels that are on offer: from, to, in steps; and of those that are mixed
SPLITS = (0.0, 0.25, 4.0, 16.0, 1.0)  # times the published share of components in more than 2 bits (`split=searched`)
SPLIT_NAMES = ("published", "searched")


@dataclass(frozen=True, kw_only=True)
class DeltaCoMe(Method):
    """Bands of singular components in 8, 3 and 2 bits."""

    name: ClassVar[str] = "delta-come"
    version: ClassVar[int] = 1
    track: ClassVar[Track] = Track.DELTA
    reach: ClassVar[float] = 64.0  # as factors (methods.factored): a matrix may be worth next to none

    ranks: str | None = None  # "2+32+968", of every matrix that has as many; None: the plan's
    split: str = "published"  # how components are shared among the bands: as published, or by what it costs
    group: int = 128  # numbers of a singular vector under one scale
    damp: float = 0.01  # share of mean diag(H) added to it
    act_order: bool = True

    def __post_init__(self) -> None:
        check_damp(self.damp)
        if self.split not in SPLIT_NAMES:
            raise ValueError(f"split={self.split} is not one of {', '.join(SPLIT_NAMES)}")
        if self.group < 1:
            raise ValueError("group must be at least 1")
        if self.ranks is not None and not _are_ranks(self.ranks):
            raise ValueError(
                f"ranks={self.ranks} are not three numbers of components; write for example ranks=2+32+968"
            )

    @property
    def needs(self) -> Needs:
        return Needs(hessian=True)

    def candidates(self, layer: LayerSpec) -> list[LayerConfig]:
        return self._configs(layer, *FINEST)

    def mixed_candidates(self, layer: LayerSpec) -> list[LayerConfig]:
        return self._configs(layer, *MIXED)

    def family(self, config: LayerConfig) -> LayerConfig:
        """Ranks are cut for a layer's shape; what unlike layers share is the level they were cut for."""
        return config.without("ranks") if self.ranks is None else config.without("ranks").plus(ranks=self.ranks)

    def _configs(self, layer: LayerSpec, first: int, last: int, step: int) -> list[LayerConfig]:
        full = min(layer.in_features, layer.out_features)
        if self.ranks is not None:
            return [self._config(_cut(numbers_of(self.ranks), full), 0)]
        found = []
        for share in (1.0,) if self.split == "published" else SPLITS:
            wide = tuple(round(share * count * full / PUBLISHED_AT) for count in PUBLISHED)
            if share == 1.0:  # a small matrix has its largest component in 8 bits all the same
                wide = (max(1, wide[0]), wide[1])
            for level in range(first, last + 1, step):
                rest = self._components(layer, level, wide)
                if rest >= 0 and 1 <= sum(wide) + rest <= full:
                    found.append(self._config((*wide, rest), level))
        return list(dict.fromkeys(found))

    def _config(self, ranks: Sequence[int], level: int) -> LayerConfig:
        return LayerConfig.of("bands", ranks=text_of(ranks), widths=text_of(WIDTHS), group=self.group, level=level)

    def _components(self, layer: LayerSpec, level: int, wide: tuple[int, ...]) -> int:
        """How many components of the last band fit beside `wide` of the others, negative for none."""
        room = level * layer.weights // LEVELS
        alone = self._config((0, 0, 1), 0).stored_bits(layer).total
        first = self._config((*wide, 0), 0).stored_bits(layer).total if any(wide) else 0
        rest = int((room - first) // alone)
        full = min(layer.in_features, layer.out_features) - sum(wide)
        if rest <= 0:
            return rest if first <= room else -1
        return min(rest + 1, full) if self._fits((*wide, min(rest + 1, full)), layer, room) else min(rest, full)

    def _fits(self, ranks: Sequence[int], layer: LayerSpec, room: int) -> bool:
        """Zero points of a band are packed in one stream: a component more may cost a word less than one alone."""
        return self._config(ranks, 0).stored_bits(layer).total <= room

    def expected_costs(
        self, weight_OI: Tensor, sensitivity: Sensitivity, layer: LayerSpec, configs: Sequence[LayerConfig], seed: int
    ) -> list[float]:
        """One decomposition, each side of a component rounded to nearest in each of the widths: error feedback changes
        what is rounded, but hardly how far."""
        left_OR, right_RI = best_factors(weight_OI)
        rounded = {}
        for bits in WIDTHS:
            left_RO, near_RI = (self._grid(side, bits) for side in (left_OR.t(), right_RI))
            rounded[bits] = left_RO.t(), near_RI
        costs = {}
        for config in configs:
            rest_OI, start = weight_OI.clone(), 0
            for rank, bits in zip(numbers_of(config["ranks"]), WIDTHS, strict=True):
                near_OR, near_RI = rounded[bits]
                rest_OI -= near_OR[:, start : start + rank] @ near_RI[start : start + rank]
                start += rank
            costs[config] = sensitivity.cost(rest_OI)
        return [costs[config] for config in configs]

    def _grid(self, values_RN: Tensor, bits: int) -> Tensor:
        grid = self._placed(values_RN, bits)
        return grid.decode(grid.round(values_RN))

    def _placed(self, values_RN: Tensor, bits: int) -> Grid:
        return fit_grid(values_RN, bits=bits, group=min(self.group, values_RN.shape[1]), offset="zero", search="mse")

    def compress(self, data: LayerData, layer: LayerSpec, config: LayerConfig) -> Compressed:
        assert data.hessian_II is not None
        packed = config.layout(layer, data.weight_OI.device)
        assert isinstance(packed, BandsLinear)
        left_OR, right_RI = (side for side in best_factors(data.weight_OI))
        left_OR, right_RI = left_OR[:, : packed.components], right_RI[: packed.components]
        inputs = prepare(data.hessian_II, act_order=self.act_order, damp=self.damp)
        packed.refill(**self._right(packed, right_RI, inputs))
        # The released loop swaps its buffers of inputs and outputs inside the loop over bands, so that all bands but
        # the first are calibrated on the block's outputs. Here all see the same inputs, and U what V^T makes of them.
        entering_RI = packed.factor("right")
        seen_RR = entering_RI @ data.hessian_II @ entering_RI.t()
        outputs = prepare(seen_RR, act_order=self.act_order, damp=self.damp)
        packed.refill(**self._left(packed, left_OR, outputs))
        return Compressed(packed, {"dead_columns": inputs.dead, "damp": max(inputs.damp, outputs.damp)})

    def _right(self, packed: BandsLinear, right_RI: Tensor, feedback: Feedback) -> dict[str, Tensor]:
        """V^T: rows are components, and errors pass on from input to input."""
        found: dict[str, Tensor] = {}
        for (name, stored), values_RI in _bands(packed, "right", right_RI):
            grid = self._placed(values_RI, stored.bits)
            top_I = torch.full((values_RI.shape[1],), 2**stored.bits - 1)
            codes_IR = codes_on_grids(values_RI, feedback, *grid.columns(values_RI.shape[1]), top_I)
            found |= _named(name, stored, codes_IR.t(), grid)
        return found

    def _left(self, packed: BandsLinear, left_OR: Tensor, feedback: Feedback) -> dict[str, Tensor]:
        """U: errors pass on from component to component, of whichever band."""
        bands = [
            (name, stored, self._placed(values_RO, stored.bits))
            for (name, stored), values_RO in _bands(packed, "left", left_OR.t())
        ]
        outputs = packed.out_features
        scale_RO, base_RO = (
            torch.cat([per_column(getattr(grid, part), grid.group, outputs) for _, _, grid in bands])
            for part in ("scale_OG", "base_OG")
        )
        top_R = torch.cat([torch.full((stored.out_features,), 2**stored.bits - 1) for _, stored, _ in bands])
        codes_RO = codes_on_grids(left_OR, feedback, scale_RO, base_RO, top_R)
        found: dict[str, Tensor] = {}
        start = 0
        for name, stored, grid in bands:
            found |= _named(name, stored, codes_RO[start : start + stored.out_features], grid)
            start += stored.out_features
        return found


def _bands(packed: BandsLinear, side: str, values_RN: Tensor) -> list[tuple[tuple[str, UniformLinear], Tensor]]:
    """The grids of a side by name, each with its components."""
    grids = packed.side(side)
    return list(zip(grids, values_RN.split([grid.out_features for _, grid in grids]), strict=True))


def _named(name: str, stored: UniformLinear, codes_RN: Tensor, grid: Grid) -> dict[str, Tensor]:
    """The stored tensors of one side of one band, by their name in the layer."""
    tensors = stored.tensors(codes_RN.to(torch.int32), **grid.stored)
    return {f"{name}.{leaf}": tensor for leaf, tensor in tensors.items()}


def _cut(ranks: Sequence[int], full: int) -> tuple[int, ...]:
    """These ranks, the last ones less where there are no more components."""
    found: list[int] = []
    for rank in ranks:
        found.append(min(rank, full - sum(found)))
    return tuple(found)


def _are_ranks(text: str) -> bool:
    parts = text.split("+")
    numbers = [int(part) for part in parts if part.isascii() and part.isdecimal() and len(part) < 6]
    return len(parts) == len(numbers) == len(WIDTHS) and sum(numbers) > 0
