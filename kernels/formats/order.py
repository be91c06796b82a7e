"""Column orders: which input column stands at every stored position, one order for each band of rows.

    stored[o, j] = weight[o, order[o // band, j]]

An order is packed in `bits` per index, or with 0 in as few as the width of the matrix needs.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from kernels.formats.bitpack import pack, packed_words, unpack
from kernels.formats.stored import StoredModule


def index_bits(columns: int) -> int:
    """Bits that hold the number of any column."""
    return max(1, (columns - 1).bit_length())


class BandOrder(StoredModule):
    """One permutation of the columns per band of `band` rows; the last band may be ragged."""

    part_of: ClassVar[dict[str, str]] = {"packed": "tables"}
    packed: Tensor  # int32 [Z, W]

    def __init__(self, rows: int, columns: int, band: int, bits: int) -> None:
        super().__init__()
        self.rows, self.columns, self.band, self.bits = rows, columns, band, bits or index_bits(columns)
        assert band >= 1 and index_bits(columns) <= self.bits <= 16
        words = packed_words(columns, self.bits)
        self.register_buffer("packed", torch.empty(-(-rows // band), words, dtype=torch.int32))

    def store(self, order_ZI: Tensor) -> dict[str, Tensor]:
        """Buffers that hold `order_ZI` [Z, I]. Every row must be a permutation."""
        every_I = torch.arange(self.columns, device=order_ZI.device)
        assert torch.equal(order_ZI.sort(dim=1).values, every_I.expand_as(order_ZI))
        return {"packed": pack(order_ZI, self.bits)}

    def per_row(self) -> Tensor:
        """The order of every row, int64 [O, I]."""
        order_ZI = unpack(self.packed, self.bits, self.columns).long()
        return order_ZI.repeat_interleave(self.band, dim=0)[: self.rows]

    def restore(self, stored_OI: Tensor) -> Tensor:
        """The matrix [O, I] with every column back at its place."""
        return torch.empty_like(stored_OI).scatter_(1, self.per_row(), stored_OI)
