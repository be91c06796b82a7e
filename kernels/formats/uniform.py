"""Uniform grids: b-bit integers with a scale per group of consecutive input columns.

    symmetric      w = scale * (q - 2**(b-1))           16 bits per group
    integer zero   w = scale * (q - zero)               16 + b bits per group, zero packed at b bits
    minimum        w = scale * q + minimum              32 bits per group (the Q4_1 form of GGUF)

With `permuted`, groups are formed over the columns in a stored order (act-order without static groups), 16 bits a
column. With `column_scales`, what the codes stand for is multiplied by a number per column (AWQ's scales of the
inputs, arXiv 2306.00978), 16 bits a column too: kernels multiply the inputs by them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from kernels.formats.bitpack import pack, packed_words, unpack
from kernels.formats.packed import PackedLinear
from kernels.formats.scales import per_column

OFFSETS = ("symmetric", "zero", "minimum")


class UniformLinear(PackedLinear):
    """A layer of `bits`-wide numbers on a grid per `group` columns, whose zero `offset` tells."""

    format: ClassVar[str] = "uniform"
    part_of: ClassVar[dict[str, str]] = {
        "codes": "codes",
        "scales": "scales",
        "zeros": "scales",
        "minima": "scales",
        "column_scale": "scales",
        "order": "tables",
    }
    codes: Tensor  # int32 [O, W]
    scales: Tensor  # fp16 [O, G]
    zeros: Tensor | None  # one stream of O * G codes, int32 [1, W]
    minima: Tensor | None  # fp16 [O, G]
    order: Tensor | None  # int16 [I]
    column_scale: Tensor | None  # fp16 [I], of the columns in their own order

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool,
        *,
        bits: int,
        group: int,
        offset: str,
        permuted: bool = False,
        column_scales: bool = False,
        **added: Any,
    ) -> None:
        # Absent rather than false: a layer without them is described as it was before there were any.
        added |= {"column_scales": True} if column_scales else {}
        super().__init__(
            in_features, out_features, bias, bits=bits, group=group, offset=offset, permuted=permuted, **added
        )
        assert offset in OFFSETS and group >= 0 and in_features < 2**16
        self.bits, self.offset = bits, offset
        self.group = min(group or in_features, in_features)  # 0: one group for the whole row
        self.groups = -(-in_features // self.group)  # the last one may be ragged
        self.register_buffer("codes", torch.empty(out_features, packed_words(in_features, bits), dtype=torch.int32))
        self.register_buffer("scales", torch.empty(out_features, self.groups, dtype=torch.float16))
        # One stream for the whole matrix: padded row by row, the zero of a row-wide group would take 32 bits.
        zeros = torch.empty(1, packed_words(out_features * self.groups, bits), dtype=torch.int32)
        self.register_buffer("zeros", zeros if offset == "zero" else None)
        minima = torch.empty(out_features, self.groups, dtype=torch.float16) if offset == "minimum" else None
        self.register_buffer("minima", minima)
        # int16 holds column numbers below 2**16 as two's complement.
        self.register_buffer("order", torch.empty(in_features, dtype=torch.int16) if permuted else None)
        scale = torch.empty(in_features, dtype=torch.float16) if column_scales else None
        self.register_buffer("column_scale", scale)

    def tensors(
        self,
        codes_OI: Tensor,
        scale_OG: Tensor,
        zero_OG: Tensor | None = None,
        minimum_OG: Tensor | None = None,
        order_I: Tensor | None = None,
        column_scale_I: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Buffers of the base by name, for `fill`: what `decode_codes` reads, from numbers that are final already.

        Codes and zero points are integers in [0, 2**bits), scales, minima and scales of columns fp16; `order_I`
        holds the column (int64) that stands at every stored position."""
        stored = {"codes": pack(codes_OI, self.bits), "scales": scale_OG}
        if zero_OG is not None:
            stored["zeros"] = pack(zero_OG.reshape(1, -1), self.bits)
        if minimum_OG is not None:
            stored["minima"] = minimum_OG
        if order_I is not None:
            stored["order"] = torch.where(order_I >= 2**15, order_I - 2**16, order_I).to(torch.int16)
        if column_scale_I is not None:
            stored["column_scale"] = column_scale_I
        return stored

    def decode_codes(self) -> Tensor:
        return self.base_of(self.base_learnt(), self.indices())

    @property
    def column_factor(self) -> Tensor | None:
        return self.column_scale

    def decode_entered(self) -> Tensor:
        return self._entered(self.base_learnt(), self.indices())

    def indices(self) -> Tensor:
        """Codes, int32 [O, I], in the stored order of columns."""
        return unpack(self.codes, self.bits, self.in_features)

    def base_learnt(self) -> dict[str, Tensor]:
        """Scales and minima of the groups, and scales of columns; an integer zero is a code."""
        own = {"scale": self.scales, "minimum": self.minima, "column_scale": self.column_scale}
        return {name: buffer.float() for name, buffer in own.items() if buffer is not None}

    def base_of(self, learnt: Mapping[str, Tensor], codes: Tensor) -> Tensor:
        weight_OI = self._entered(learnt, codes)
        return weight_OI if self.column_scale is None else weight_OI * learnt["column_scale"]

    def base_tensors(self, learnt: Mapping[str, Tensor]) -> dict[str, Tensor]:
        buffers = {"scale": "scales", "minimum": "minima", "column_scale": "column_scale"}
        return {buffers[name]: values.half() for name, values in learnt.items() if name in buffers}

    def _entered(self, learnt: Mapping[str, Tensor], codes: Tensor) -> Tensor:
        """The weight but for its column scales."""
        q_OI = codes.float()
        scale_OI = per_column(learnt["scale"], self.group, self.in_features)
        if self.minima is not None:
            weight_OI = q_OI * scale_OI + per_column(learnt["minimum"], self.group, self.in_features)
        elif self.zeros is not None:
            zero_OG = unpack(self.zeros, self.bits, self.scales.numel()).view_as(self.scales)
            weight_OI = (q_OI - per_column(zero_OG.float(), self.group, self.in_features)) * scale_OI
        else:
            weight_OI = (q_OI - 2 ** (self.bits - 1)) * scale_OI
        if self.order is not None:
            column_I = self.order.long() & 0xFFFF
            weight_OI = torch.empty_like(weight_OI).index_copy(1, column_I, weight_OI)
        return weight_OI
