"""NormalFloat with double-quantised scales: the frozen base of QLoRA (Dettmers et al., NeurIPS 2023, arXiv 2305.14314,
sec. 3).

Weights are divided by the absmax of 64 consecutive entries and rounded to the nearest of 2**b quantiles of a normal
distribution; the absmax values are stored in 8 bits. NF4 with blocks of 64 takes 4 + 8/64 + 32/(64 * 256) = 4.127 bits.
QLoRA's adapters start at zero, so this *is* QLoRA before training; the row is called `nf` until there is some.

QLoRA publishes 4 bits, LQ-LoRA (arXiv 2311.12023) 2 and 3 with the same outermost quantile; 5 and 6 are built alike.
They keep a mixed allocation from ending at 4.5 bits for a layer that other methods may store in 8.

Codes, scales and decoding are those of bitsandbytes' NF4 where 64 divides the rows (its blocks run across rows; here
each row starts one), but for the few scale codes in a thousand that its CPU kernel does not round to the nearest level.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from kernels.formats.codebook import CodebookLinear
from kernels.formats.normal_float import nearest, nf_levels
from kernels.formats.scales import per_column, quantise_scales
from methods.base import Compressed, LayerConfig, LayerData, LayerSpec, Method, Track
from methods.codecs.vector import block_absmax

BITS = (2, 3, 4, 5, 6)
MIXED_BLOCKS = (16, 32, 64, 128)
BLOCKS = (8, 12, 16, 24, 32, 40, 48, 64, 96, 128, 256)


@dataclass(frozen=True, kw_only=True)
class NormalFloat(Method):
    """Quantiles of a normal distribution under absmax block scales."""

    name: ClassVar[str] = "nf"
    version: ClassVar[int] = 2
    track: ClassVar[Track] = Track.DATA_FREE
    seeded: ClassVar[bool] = False

    bits: int | None = None
    block: int | None = None

    def __post_init__(self) -> None:
        if self.bits not in (None, *BITS):
            raise ValueError(f"bits must be one of {', '.join(map(str, BITS))}")
        if self.block is not None and self.block < 1:
            raise ValueError("block must be at least 1")

    def candidates(self, layer: LayerSpec) -> list[LayerConfig]:
        return [
            LayerConfig.of("codebook", dim=1, index_bits=bits, block=block, scales="dynamic", table="nf")
            for bits in (BITS if self.bits is None else (self.bits,))
            for block in (BLOCKS if self.block is None else (self.block,))
        ]

    def mixed_candidates(self, layer: LayerSpec) -> list[LayerConfig]:
        return [
            config for config in self.candidates(layer) if self.block is not None or config["block"] in MIXED_BLOCKS
        ]

    def compress(self, data: LayerData, layer: LayerSpec, config: LayerConfig) -> Compressed:
        weight_OI = data.weight_OI
        packed = config.layout(layer, weight_OI.device)
        assert isinstance(packed, CodebookLinear)
        absmax_OG = block_absmax(weight_OI, packed.block)
        # Codes are chosen with the exact absmax, as bitsandbytes does; only then are the scales rounded.
        unit_OI = weight_OI / per_column(absmax_OG, packed.block, packed.in_features)
        codes_OI = nearest(unit_OI, nf_levels(packed.index_bits))
        scales = quantise_scales(absmax_OG, packed.scales.form)
        packed.fill(**packed.tensors(codes_OI, scales))
        return Compressed(packed)
