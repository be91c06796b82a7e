"""The base of methods that store uniform grids (`rtn`, `gptq`): their common options, candidates and estimates."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from kernels.formats.uniform import OFFSETS
from methods.base import LayerConfig, LayerSpec, Method, Sensitivity
from methods.codecs.grids import SEARCHES, fit_grid

BITS = (2, 3, 4, 5, 6, 8)
ESTIMATED_SHARES = (1.0, 0.8, 0.6)  # of a search, when only its outcome is wanted
MIXED_GROUPS = (32, 64, 128, 0)
GROUPS = (16, 20, 24, 32, 40, 48, 64, 80, 96, 128, 192, 256, 512, 1024)


@dataclass(frozen=True, kw_only=True)
class UniformGridMethod(Method):
    """Fields and candidates shared by the methods that store `UniformLinear`s. A group of 0 is one scale for a whole
    row."""

    bits: int | None = None
    group: int | None = None
    offset: str | None = None
    grid: str = "minmax"

    def __post_init__(self) -> None:
        if self.bits is not None and not 1 <= self.bits <= 8:
            raise ValueError("bits must be 1 to 8")
        if self.group is not None and self.group < 0:
            raise ValueError("group must be 0 (a whole row) or a number of columns")
        if self.offset not in (None, *OFFSETS):
            raise ValueError(f"offset={self.offset} is not one of {', '.join(OFFSETS)}")
        if self.grid not in SEARCHES:
            raise ValueError(f"grid={self.grid} is not one of {', '.join(SEARCHES)}")

    @property
    def permuted(self) -> bool:
        return False

    def candidates(self, layer: LayerSpec) -> list[LayerConfig]:
        groups = GROUPS + (0,) if self.group is None else (self.group,)
        offsets = ("symmetric", "zero") if self.offset is None else (self.offset,)
        return [
            LayerConfig.of("uniform", bits=bits, group=group, offset=offset, permuted=self.permuted)
            for bits in (BITS if self.bits is None else (self.bits,))
            for offset in offsets
            for group in groups
        ]

    def mixed_candidates(self, layer: LayerSpec) -> list[LayerConfig]:
        return [
            config for config in self.candidates(layer) if self.group is not None or config["group"] in MIXED_GROUPS
        ]

    def expected_costs(
        self, weight_OI: Tensor, sensitivity: Sensitivity, layer: LayerSpec, configs: Sequence[LayerConfig], seed: int
    ) -> list[float]:
        """Plain rounding of a sample of rows: error feedback changes what is rounded, but hardly how far."""
        sample_NI, seen = sensitivity.sample(weight_OI)
        costs = []
        for config in configs:
            bits, group, offset = config["bits"], config["group"] or layer.in_features, config["offset"]
            grid = fit_grid(
                sample_NI,
                bits=bits,
                group=group,
                offset=offset,
                search=self.grid,
                importance_I=seen.column_I,
                shares=ESTIMATED_SHARES,
                steps=(),
            )
            costs.append(seen.cost(sample_NI - grid.decode(grid.round(sample_NI))))
        return costs
