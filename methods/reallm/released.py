"""`reallm:released`: the settings of the authors' code, 2 bits nominal, 2.78 stored on Llama-2-7B.

The same alternation as `reallm:data-free`, with what that code adds: columns reordered inside bands of rows, and one
scale per row (DoRA's magnitude). One configuration serves all matrices, and no codebook is shared."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from kernels.formats.codebook import CodebookLinear
from methods.base import Compressed, LayerConfig, LayerData, LayerSpec, Option, Track
from methods.reallm.alternation import alternate
from methods.reallm.base import ReALLM


@dataclass(frozen=True, kw_only=True)
class Released(ReALLM):
    """The alternation with column orders and row scales, at the authors' settings."""

    algorithm: ClassVar[str] = "released"
    version: ClassVar[int] = 3
    track: ClassVar[Track] = Track.DATA_FREE

    dim: int | None = 2
    index_bits: int | None = 4
    block: int | None = 64
    scale_bits: int = 8
    rank: int | None = 64
    adapter_bits: int = 16
    band: int = 64  # rows that share an order of the columns; 0 leaves them in place
    order_bits: int | None = 16  # of an index in it; None: as few as hold it
    row_scales: bool = True  # DoRA's magnitudes, fitted
    rounds: int = 100  # alternations at most
    tolerance: float = 0.0  # stop at a smaller relative gain

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rounds < 1:
            raise ValueError("rounds must be at least 1")
        if self.band < 0 or self.band % (self.dim or 4):
            raise ValueError("band must be a multiple of the vector length")
        if self.order_bits is not None and not (self.band and 1 <= self.order_bits <= 16):
            raise ValueError("order_bits must be 1 to 16, and needs a band")

    def extras(self) -> dict[str, Option]:
        added = {"band": self.band, "order_bits": self.order_bits or 0, "row_scales": self.row_scales}
        return super().extras() | added

    def candidates(self, layer: LayerSpec) -> list[LayerConfig]:
        return super().candidates(layer) if layer.in_features <= 2 ** (self.order_bits or 16) else []

    def compress(self, data: LayerData, layer: LayerSpec, config: LayerConfig) -> Compressed:
        packed = config.layout(layer, data.weight_OI.device)
        assert isinstance(packed, CodebookLinear)
        tensors, report = alternate(
            data.weight_OI, packed, rounds=self.rounds, tolerance=self.tolerance, seed=data.seed
        )
        packed.fill(**tensors)
        return Compressed(packed, report)
