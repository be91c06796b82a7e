"""`reallm:blockwise`: calibrated, and then the real numbers that each packed block stores are trained
(methods.trained_numbers)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

from kernels.formats.packed import PackedLinear
from methods.base import Block, Needs, Track
from methods.reallm.calibrated import Calibrated
from methods.trained_numbers import tune_numbers
from methods.tuning import Schedule


@dataclass(frozen=True, kw_only=True)
class Blockwise(Calibrated):
    """Calibrated, then tuned block by block."""

    algorithm: ClassVar[str] = "blockwise"
    track: ClassVar[Track] = Track.FINE_TUNED
    fewest_epochs: ClassVar[int] = 1

    epochs: int = 2
    rate: float = 4e-3  # of the optimiser, relative to each tensor's size
    batch: int = 1  # windows per step

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.epochs < self.fewest_epochs or self.batch < 1 or not 0 < self.rate < 1:
            raise ValueError(f"epochs must be at least {self.fewest_epochs}, batch at least 1, rate between 0 and 1")

    @property
    def needs(self) -> Needs:
        return replace(super().needs, outputs=self.epochs > 0)

    def tune_block(self, block: Block, packed: Mapping[str, PackedLinear], seed: int) -> dict[str, float]:
        return tune_numbers(block, packed, Schedule(self.epochs, self.rate, self.batch, self.follow), seed)
