"""`reallm:finetuned`: block-wise tuned, and then low-rank factors and row magnitudes (DoRA) trained end to end by the
one loop that all methods of the track share (harness.compress.training)."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

from methods.adapted import check_rate, usual_rank
from methods.base import Adaptation, LayerConfig, LayerSpec, Option
from methods.reallm.blockwise import Blockwise


@dataclass(frozen=True, kw_only=True)
class Finetuned(Blockwise):
    """Tuned block by block, then trained end to end."""

    version: ClassVar[int] = Blockwise.version + 1  # magnitudes are among what is tuned block by block
    algorithm: ClassVar[str] = "finetuned"
    fewest_epochs: ClassVar[int] = 0

    row_scales: bool = True  # train a magnitude per row too
    lora_rate: float = 3e-4  # these factors start fitted

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rank == 0:
            raise ValueError("finetuned trains the low-rank part, and needs a rank of at least 1")
        check_rate(self.lora_rate)

    @property
    def adaptation(self) -> Adaptation:
        return Adaptation(rate=self.lora_rate, dora=self.row_scales)

    def ranks(self, layer: LayerSpec) -> Iterable[int]:
        # With training to come the budget cannot tell what a rank is worth: every matrix gets what other methods give
        # it.
        return (usual_rank(layer),) if self.rank is None else (self.rank,)

    def extras(self) -> dict[str, Option]:
        return super().extras() | ({"row_scales": True} if self.row_scales else {})

    def family(self, config: LayerConfig) -> LayerConfig:
        return config.without("rank") if self.rank is None else config

    def mixed_candidates(self, layer: LayerSpec) -> list[LayerConfig]:
        return self.candidates(layer)
