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
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from kernels.formats.bands import BandsLinear, numbers_of, text_of
from kernels.formats.scales import per_column
from kernels.formats.uniform import UniformLinear
from methods.base import Compressed, LayerConfig, LayerData, LayerSpec, Method, Needs, Sensitivity, Track
from methods.codecs.error_feedback import check_damp, prepare
from methods.codecs.factors import best_factors
from methods.codecs.feedback_on_grids import codes_on_grids
from methods.codecs.grids import Grid, fit_grid

WIDTHS = (8, 3, 2)  # bits of the three bands
PUBLISHED = (2, 32)  # components of the first two at 4096 x 4096; fewer where there are fewer in all
PUBLISHED_AT = 4096
LEVELS = 64  # for so many parts of a bit
FINEST, MIXED = (4, 512, 1), (4, 512, 12)  # levels that are on offer: from, to, in steps; and of those that are mixed
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
                ranks = self._ranks(layer, level * layer.weights // LEVELS, wide)
                if ranks is not None:
                    found.append(self._config(ranks, level))
                if ranks is not None and sum(ranks) == full:
                    break
        return found

    def _config(self, ranks: Sequence[int], level: int) -> LayerConfig:
        return LayerConfig.of("bands", ranks=text_of(ranks), widths=text_of(WIDTHS), group=self.group, level=level)

    def _ranks(self, layer: LayerSpec, room: int, wide: tuple[int, ...]) -> tuple[int, ...] | None:
        """`wide`, and as many components in the last band as fit in `room` bits; None where not even one does."""
        full = min(layer.in_features, layer.out_features)
        of_all, of_wide = (self._bits(layer, ranks) for ranks in ((0, 0, full), (*wide, 0)))
        # Zero points of a band are packed in one stream, so that components differ by a word: from above, then.
        rest = min(full - sum(wide), (room - of_wide) * full // of_all + 2)
        while rest > 0 and self._bits(layer, (*wide, rest)) > room:
            rest -= 1
        return (*wide, rest) if rest > 0 else None

    def _bits(self, layer: LayerSpec, ranks: Sequence[int]) -> int:
        return self._config(ranks, 0).stored_bits(layer).total if any(ranks) else 0

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
        left_OR, right_RI = best_factors(data.weight_OI)
        left_OR, right_RI = left_OR[:, : packed.components], right_RI[: packed.components]
        inputs = prepare(data.hessian_II, act_order=self.act_order, damp=self.damp)
        right = self._bands(packed, "right", right_RI)
        scale_RI, base_RI, top_R = _grids_of(right, packed.in_features)
        tops = [top_R] * packed.in_features
        codes_IR = codes_on_grids(right_RI, inputs, scale_RI.t().contiguous(), base_RI.t().contiguous(), tops)
        packed.refill(**_stored(right, codes_IR.t()))
        # The released loop swaps its buffers of inputs and outputs inside the loop over bands, so that all bands but
        # the first are calibrated on the block's outputs. Here all see the same inputs, and U what V^T makes of them.
        entering_RI = packed.factor("right")
        outputs = prepare(entering_RI @ data.hessian_II @ entering_RI.t(), act_order=self.act_order, damp=self.damp)
        left = self._bands(packed, "left", left_OR.t())
        scale_RO, base_RO, top_R = _grids_of(left, packed.out_features)
        codes_RO = codes_on_grids(left_OR, outputs, scale_RO, base_RO, [int(top) for top in top_R])
        packed.refill(**_stored(left, codes_RO))
        return Compressed(packed, {"dead_columns": inputs.dead, "damp": max(inputs.damp, outputs.damp)})

    def _bands(self, packed: BandsLinear, side: str, values_RN: Tensor) -> list[_Band]:
        """The grids of a side, placed for its components."""
        grids = packed.side(side)
        parts = values_RN.split([stored.out_features for _, stored in grids])
        return [
            _Band(name, stored, self._placed(values, stored.bits))
            for (name, stored), values in zip(grids, parts, strict=True)
        ]


class _Band(NamedTuple):
    name: str
    stored: UniformLinear
    grid: Grid


def _grids_of(bands: Sequence[_Band], size: int) -> tuple[Tensor, Tensor, Tensor]:
    """(scale, base) of every number of a side, each [R, N], and the largest code of every component [R]."""
    scale_RN, base_RN = (
        torch.cat([per_column(getattr(band.grid, part), band.grid.group, size) for band in bands])
        for part in ("scale_OG", "base_OG")
    )
    tops = [torch.full((band.stored.out_features,), 2.0**band.grid.bits - 1) for band in bands]
    return scale_RN, base_RN, torch.cat(tops).to(scale_RN.device)


def _stored(bands: Sequence[_Band], codes_RN: Tensor) -> dict[str, Tensor]:
    """The stored tensors of a side, by their names in the layer."""
    found: dict[str, Tensor] = {}
    for band, codes in zip(bands, codes_RN.split([band.stored.out_features for band in bands]), strict=True):
        tensors = band.stored.tensors(codes.to(torch.int32), **band.grid.stored)
        found |= {f"{band.name}.{leaf}": tensor for leaf, tensor in tensors.items()}
    return found


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
