"""Grids with zero points of any value, as the package `hqq` stores them: w = scale * (code - zero), tensor by tensor.

The matrix of O rows and I columns, read row by row, is cut into groups of `group` numbers, which lie

    axis 1    side by side: group g is row g of [G, group], scale and zero [G, 1]
    axis 0    apart:        group g is column g of [group, G], scale and zero [1, G]

Codes of `width` bits are packed down the first dimension of that: place k of a word, from the highest bits, is of row
k R + r, R words down. A word is a byte, of 3 bits ten to an int32. Nothing is laid out anew, and no kernel reads it:
uniform grids have integer zero points here, or minima, and neither holds these numbers without rounding them."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from kernels.formats.packed import PackedLinear

WIDTHS = {8: 1, 4: 2, 3: 10, 2: 4, 1: 8}  # bits of a code -> codes of a word
NUMBERS = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}


class HqqLinear(PackedLinear):
    """A layer of `width`-bit codes, with a scale and a zero point of type `numbers` for every `group` of them."""

    format: ClassVar[str] = "hqq"
    part_of: ClassVar[dict[str, str]] = {"codes": "codes", "scales": "scales", "zeros": "scales"}
    codes: Tensor  # uint8, int32 of 3 bits: [words, group], or [words, G]
    scales: Tensor  # [G, 1], or [1, G]
    zeros: Tensor  # likewise

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool,
        *,
        width: int,
        group: int,
        axis: int,
        numbers: str,
        **added: Any,
    ) -> None:
        super().__init__(in_features, out_features, bias, width=width, group=group, axis=axis, numbers=numbers, **added)
        assert width in WIDTHS and axis in (0, 1) and out_features * in_features % group == 0
        groups = out_features * in_features // group
        self.width = width
        self.rows, other = (groups, group) if axis else (group, groups)
        words = -(-self.rows // WIDTHS[width])
        self.register_buffer("codes", torch.empty(words, other, dtype=torch.int32 if width == 3 else torch.uint8))
        for name in ("scales", "zeros"):
            self.register_buffer(name, torch.empty(*((groups, 1) if axis else (1, groups)), dtype=NUMBERS[numbers]))

    def decode_codes(self) -> Tensor:
        count = WIDTHS[self.width]
        places = [self.codes >> (self.width * (count - 1 - place)) & (2**self.width - 1) for place in range(count)]
        code_GS = torch.cat(places)[: self.rows].float()
        return ((code_GS - self.zeros.float()) * self.scales.float()).reshape(self.out_features, self.in_features)
