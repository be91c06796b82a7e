"""Trellis codes down a column: a code and the ones above it, a window of bits, stand for weights together.

    state[v, i]  = the last `window` bits of the codes 0 ... v of column i (none above the first row: zeros)
    w[v d + j, i] = LEVELS[(state[v, i] * MULTIPLIERS[j] mod 2^16) >> 8] * scale[v d + j],   j < d = `dim`

A weight costs bits / dim bits and is chosen with `window` of them, so that the levels on offer to a weight depend on
those before it: trellis-coded quantisation (Marcellin & Fischer, IEEE Trans. Commun. 38, 1990) in the form of a window
that slides over a stream of bits (Mao et al., arXiv 2102.05980; QTIP, Tseng et al., arXiv 2406.11235). Decoding needs
no search and starts at any row.

Nothing of the code is stored: LEVELS are 256 quantiles of a normal distribution as integers, and a multiplication
(Fibonacci hashing; Knuth, TAOCP 3, sec. 6.4) both scatters the states over them and spreads the 2^bits states that
follow one state evenly, which is what a good trellis code has to do. With it a code of 2^12 states leaves .0701 of the
variance of normal numbers at 2 bits a weight (the limit is .0625) and .0181 at 3 (.0156); tables fitted to the same
states leave .0703 and .0186. The source must be normal, and the same for all columns: layers of this format are meant
to be `rotated`, and a row has one scale.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from statistics import NormalDist
from typing import Any, ClassVar

import torch
from torch import Tensor

from kernels.formats.bitpack import pack, packed_words, unpack
from kernels.formats.packed import PackedLinear
from kernels.formats.scales import BlockScales, ScaleForm

WINDOWS = range(8, 17)
# By (bits, weights) of a code, of its first and its second weight: the best of 150 odd numbers, by the error they leave
# of normal numbers with windows of 12 bits. That of the golden ratio alone, 40503, costs up to 2 % more.
MULTIPLIERS = {
    (1, 1): (28555,),
    (3, 2): (46193, 36561),
    (2, 1): (16975,),
    (5, 2): (47303, 40811),
    (3, 1): (41061,),
    (7, 2): (18897, 30739),
    (4, 1): (54031,),
    (5, 1): (59425,),
}
LARGEST = 127


class TrellisLinear(PackedLinear):
    """A layer of codes of `bits` bits for `dim` rows of a column each, read through windows of `window` bits, under one
    scale for each row."""

    format: ClassVar[str] = "trellis"
    part_of: ClassVar[dict[str, str]] = {"codes": "codes"}
    codes: Tensor  # int32 [J, W]
    codebook: None = None  # levels are computed

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool,
        *,
        bits: int,
        dim: int,
        window: int = 12,
        scale_bits: int = 8,
        **added: Any,
    ) -> None:
        super().__init__(
            in_features, out_features, bias, bits=bits, dim=dim, window=window, scale_bits=scale_bits, **added
        )
        assert (bits, dim) in MULTIPLIERS and window in WINDOWS
        self.bits, self.dim, self.window = bits, dim, window
        down = -(-out_features // dim)
        self.register_buffer("codes", torch.empty(down, packed_words(in_features, bits), dtype=torch.int32))
        self.scales = BlockScales(out_features, 1, ScaleForm("double", scale_bits))

    def tensors(self, code_JI: Tensor, scales: dict[str, Tensor]) -> dict[str, Tensor]:
        """Buffers of the base by name, for `fill`: codes [J, I], and scales as `quantise_scales` makes them."""
        return {"codes": pack(code_JI, self.bits)} | {f"scales.{name}": tensor for name, tensor in scales.items()}

    def decode_codes(self) -> Tensor:
        return self.base_of(self.base_learnt(), self.indices())

    def indices(self) -> Tensor:
        """The states that the codes lead through, int32 [J, I]."""
        return states(unpack(self.codes, self.bits, self.in_features), self.bits, self.window)

    def entries(self) -> Tensor:
        """The levels of every state, fp32 [S, D]."""
        return levels(self.bits, self.dim, self.window).t().to(self.codes.device)

    def base_learnt(self) -> dict[str, Tensor]:
        return {"scale": self.scales.decode()}

    def base_of(self, learnt: Mapping[str, Tensor], codes: Tensor) -> Tensor:
        """The base [O, I], for turned inputs."""
        level_DS, state_N = levels(self.bits, self.dim, self.window).to(codes.device), codes.flatten()
        rows = [level_S.index_select(0, state_N).view_as(codes) for level_S in level_DS]  # an embedding is slower
        return torch.stack(rows, dim=1).view(-1, self.in_features)[: self.out_features] * learnt["scale"]

    def base_tensors(self, learnt: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return self.scales.tensors(learnt["scale"])


def states(code_JI: Tensor, bits: int, window: int) -> Tensor:
    """The window that ends with every code of a column, int32 [J, I]."""
    state_JI = code_JI.clone()
    for above in range(1, -(-window // bits)):
        state_JI[above:] |= code_JI[:-above] << above * bits
    return state_JI & ((1 << window) - 1)


@cache
def levels(bits: int, dim: int, window: int) -> Tensor:
    """What every state stands for under a scale of one, in turn for each of the rows of a code: fp32 integers
    [dim, 2**window]."""
    state_S = torch.arange(2**window)
    return torch.stack([gaussian_levels()[(state_S * m & 0xFFFF) >> 8] for m in MULTIPLIERS[bits, dim]]).float()


@cache
def gaussian_levels() -> Tensor:
    """256 quantiles of a normal distribution, the largest 127, int64 [256]."""
    quantiles = [NormalDist().inv_cdf((i + 0.5) / 256) for i in range(256)]
    return torch.tensor([round(LARGEST * q / quantiles[-1]) for q in quantiles])


def level_of_deviation() -> float:
    """What a standard deviation of the source is, in units of `gaussian_levels`."""
    return LARGEST / NormalDist().inv_cdf(255.5 / 256)
