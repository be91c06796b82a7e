"""Codebooks: each code is the index of one of K vectors of d weights, times a scale per block of input columns.

    w[o, i] = codebook[code[o // d, i], o % d] * scale[o, i // block]   (+ low-rank branch)

The d weights of a vector are consecutive *rows* of one column, as in ReALLM's released code: one column of the matrix is a
whole number of vectors, so column-by-column error feedback assigns vectors without looking ahead. d = 1 is a scalar codebook
(`table="nf"`: the NormalFloat constants, which are not stored). Rows are padded up to a multiple of d; the padded codes are
stored and counted.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from kernels.bitpack import packed_words, unpack
from kernels.lowrank import LowRank
from kernels.normal_float import nf_levels
from kernels.packed import PackedLinear
from kernels.scales import BlockScales, per_column


class CodebookLinear(PackedLinear):
    format: ClassVar[str] = "codebook"
    part_of: ClassVar[dict[str, str]] = {"codes": "codes", "codebook": "tables"}

    def __init__(
        self, in_features: int, out_features: int, bias: bool, *,
        dim: int, index_bits: int, block: int, scales: str = "double", rank: int = 0, adapter_bits: int = 8, table: str = "learnt",
    ) -> None:  # fmt: skip
        super().__init__(
            in_features, out_features, bias,
            dim=dim, index_bits=index_bits, block=block, scales=scales, rank=rank, adapter_bits=adapter_bits, table=table,
        )  # fmt: skip
        assert dim in (1, 2, 4, 8) and 1 <= index_bits <= 16 and block >= 0 and table in ("learnt", "nf")
        assert table == "learnt" or dim == 1
        self.dim, self.index_bits, self.rank = dim, index_bits, rank
        self.block = min(block or in_features, in_features)  # 0: one block for the whole row
        self.vector_rows = -(-out_features // dim)
        self.register_buffer("codes", torch.empty(self.vector_rows, packed_words(in_features, index_bits), dtype=torch.int32))
        self.register_buffer("codebook", torch.empty(2**index_bits, dim, dtype=torch.float16) if table == "learnt" else None)
        self.scales = BlockScales(out_features, -(-in_features // self.block), scales)
        self.lowrank = LowRank(in_features, out_features, rank, adapter_bits) if rank else None

    def entries(self) -> Tensor:
        """The codebook, fp32 [K, D]."""
        return self.codebook.float() if self.codebook is not None else nf_levels(self.index_bits).to(self.codes.device)[:, None]

    def decode(self) -> Tensor:
        code_VI = unpack(self.codes, self.index_bits, self.in_features)
        vector_VID = torch.nn.functional.embedding(code_VI, self.entries())
        unit_OI = vector_VID.transpose(1, 2).reshape(self.vector_rows * self.dim, self.in_features)[: self.out_features]
        weight_OI = unit_OI * per_column(self.scales.decode(), self.block, self.in_features)
        return weight_OI if self.lowrank is None else weight_OI + self.lowrank.decode()
