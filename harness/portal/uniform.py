"""A layer on uniform grids by its numbers: what a dozen formats store, each in its own order of words.

`of_layer` takes the numbers out of a packed layer, `Numbers.layer` puts those of another program into one. Both are
lossless: codes, scales and zero points stay the integers and 16-bit numbers they were."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.formats.bitpack import unpack
from kernels.formats.packed import PackedLinear
from kernels.formats.uniform import UniformLinear

WHOLE_ROW = -1  # what others write for the group of a row that has one


@dataclass(frozen=True)
class Numbers:
    """w[o, i] = scale[o, g] * (code[o, i] - zero[o, g]); or scale * code + minimum.

    Codes int32 [O, I] in the columns' own order, scales fp16 [O, G], zero points int32 [O, G] (None: 2**(bits - 1)).
    `order_I` is the column (int64) that stands at every stored position, where groups are formed along an order; else
    groups are consecutive columns, and the last may be ragged."""

    bits: int
    group: int
    codes_OI: Tensor
    scale_OG: Tensor
    zero_OG: Tensor | None = None
    minimum_OG: Tensor | None = None
    order_I: Tensor | None = None

    @property
    def offset(self) -> str:
        return "minimum" if self.minimum_OG is not None else "symmetric" if self.zero_OG is None else "zero"

    @property
    def group_I(self) -> Tensor:
        """The group of every column, in the columns' own order, int64 [I]."""
        place_I = torch.arange(self.codes_OI.shape[1])
        if self.order_I is not None:
            place_I = torch.empty_like(place_I).index_copy_(0, self.order_I, place_I)
        return place_I // self.group

    def layer(self, bias: bool) -> UniformLinear:
        """The packed layer of these numbers; its bias, if it has one, is filled by whoever has it."""
        rows, columns = self.codes_OI.shape
        packed = UniformLinear(
            columns,
            rows,
            bias,
            bits=self.bits,
            group=self.group,
            offset=self.offset,
            permuted=self.order_I is not None,
        )
        codes_OI = self.codes_OI if self.order_I is None else self.codes_OI[:, self.order_I]
        added = {"zero_OG": self.zero_OG, "minimum_OG": self.minimum_OG, "order_I": self.order_I}
        packed.fill(**packed.tensors(codes_OI, self.scale_OG, **added))
        return packed


def of_layer(layer: PackedLinear, name: str, format: str) -> Numbers:
    """The numbers of a packed layer. Raises ValueError for what is more, or other, than a uniform grid."""
    if not isinstance(layer, UniformLinear):
        what = "16-bit weights" if layer.format == "dense" else f"the format '{layer.format}'"
        raise ValueError(f"{name} is stored as {what}, which {format} has no form for: write --format hf")
    if not layer.is_plain or layer.column_scale is not None or layer.rounds:
        extra = {
            "a low-rank part": layer.lowrank is not None,
            "row scales": layer.row_scale is not None,
            "a rotation of its inputs": layer.rotation is not None,
            "a reassembly of its inputs": layer.reassembly is not None,
            "scales of its inputs": layer.column_scale is not None,
            "rounded inputs": layer.rounds,
        }
        found = next(what for what, there in extra.items() if there)
        raise ValueError(f"{name} has {found}, which {format} has no place for: write --format hf")
    codes_OI = unpack(layer.codes, layer.bits, layer.in_features)
    order_I = None
    if layer.order is not None:
        order_I = layer.order.long() & 0xFFFF
        codes_OI = torch.empty_like(codes_OI).index_copy_(1, order_I, codes_OI)
    zero_OG = None
    if layer.zeros is not None:
        zero_OG = unpack(layer.zeros, layer.bits, layer.scales.numel()).view_as(layer.scales)
    return Numbers(layer.bits, layer.group, codes_OI, layer.scales, zero_OG, layer.minima, order_I)


def groups_of(columns: int, group: int) -> tuple[int, int]:
    """(columns of a group, groups of a row) for a size that a checkpoint names; the last group may be ragged. Raises
    ValueError for a size that is none."""
    if group < 1 and group != WHOLE_ROW:
        raise ValueError(
            f"its quantization_config has groups of {group}, which is no number of columns, nor {WHOLE_ROW} for a row"
        )
    found = columns if group == WHOLE_ROW else group
    return found, -(-columns // found)


def exact_half(tensor: Tensor, name: str) -> Tensor:
    """The numbers in fp16, where that is what they are. Raises ValueError for others: rows are of a file's numbers."""
    half = tensor.half()
    if not torch.equal(half.to(tensor.dtype), tensor):
        raise ValueError(f"{name} holds numbers of {tensor.dtype} that are none of fp16: not read here")
    return half
