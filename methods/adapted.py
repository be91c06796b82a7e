"""What the methods of the fine-tuned track add to what they start from: low-rank adapters in stored precision, trained
afterwards.

A class made of `Adapted` and a method stores that method's configurations with adapters added, which the budget pays
for. They start without effect (as LoRA's do, Hu et al., arXiv 2106.09685) unless the method fits them itself, and
`harness.compress.training` trains them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from kernels.formats.layer import LayerConfig, LayerSpec
from methods.base import Adaptation, Method, Track

# Of AdamW, for adapters that start at zero; docs/methods.md, "Fine-tuned methods", has the grid it comes from.
RATE = 3e-3
SHARE = 64  # of a matrix's shorter side is one component: rank 64 on Llama-2-7B, as QLoRA and LQ-LoRA report


@dataclass(frozen=True, kw_only=True)
class Adapted(Method):
    """A mixin: the configurations of the method it is combined with, with adapters added."""

    track: ClassVar[Track] = Track.FINE_TUNED
    seeded: ClassVar[bool] = True

    rank: int | None = None  # None: a component for every SHARE of the matrix's shorter side
    adapter_bits: int = 8
    dora: bool = False
    lora_rate: float = RATE

    def __post_init__(self) -> None:
        super().__post_init__()
        check_adapters(self.rank, self.adapter_bits)
        check_rate(self.lora_rate)

    @property
    def adaptation(self) -> Adaptation:
        return Adaptation(rate=self.lora_rate, dora=self.dora)

    def candidates(self, layer: LayerSpec) -> list[LayerConfig]:
        base = super().candidates(layer)  # type: ignore[safe-super]  # the method that this class is combined with
        return [config.plus(**self.adapters(layer)) for config in base]

    def family(self, config: LayerConfig) -> LayerConfig:
        return config.without("rank")  # every shape has its own

    def adapters(self, layer: LayerSpec) -> dict[str, int | bool]:
        """What is added to the configurations of this layer."""
        added = {
            "rank": min(self.rank or usual_rank(layer), layer.in_features, layer.out_features),
            "adapter_bits": self.adapter_bits,
        }
        return added | ({"row_scales": True} if self.dora else {})


def usual_rank(layer: LayerSpec) -> int:
    return max(1, min(layer.in_features, layer.out_features) // SHARE)


def check_adapters(rank: int | None, bits: int) -> None:
    """Raises ValueError."""
    if rank is not None and rank < 1:
        raise ValueError("rank must be at least 1")
    if bits not in (8, 16):
        raise ValueError("adapter_bits must be 8 or 16")


def check_rate(rate: float, name: str = "lora_rate") -> None:
    """Raises ValueError."""
    if not 0 < rate < 1:
        raise ValueError(f"{name} must be between 0 and 1")
