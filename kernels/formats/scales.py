"""Block scales: one positive number per block of consecutive input columns of a row, stored in one of three ways.

    half      fp16 per block
    double    integers of `bits` bits over [offset, offset + (2**bits - 1) * step], one step in `dtype` per `group`
              consecutive scales (row-major) and one fp32 offset, the smallest scale of the matrix (LQ-LoRA, arXiv
              2311.12023, sec. 3)
    dynamic   8 bits per block: the signed dynamic format over [offset - step, offset + step], offset the mean scale
              (QLoRA, arXiv 2305.14314, sec. 3, as bitsandbytes stores it)

The last two take bits/B + dtype/(group * B) bits per weight for blocks of B, and 32 bits for the offset.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from kernels.formats.bitpack import pack, packed_words, unpack
from kernels.formats.normal_float import dynamic_map, nearest
from kernels.formats.stored import StoredModule

SCHEMES = ("half", "double", "dynamic")
LEAST = 2.0**-24  # positive number that fp16 has
STEP_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class ScaleForm:
    """How the scales of a layer are stored: `bits`, `group` and `dtype` (of the steps) are those of "double"."""

    scheme: str
    bits: int = 8
    group: int = 256
    dtype: str = "float32"

    def __post_init__(self) -> None:
        assert self.scheme in SCHEMES and 1 <= self.bits <= 8 and self.group >= 1 and self.dtype in STEP_DTYPES
        assert self.scheme == "double" or (self.bits, self.group, self.dtype) == (8, 256, "float32")


class BlockScales(StoredModule):
    """Scales of an [O, G] array of blocks, G blocks to a row."""

    part_of: ClassVar[dict[str, str]] = dict.fromkeys(("direct", "codes", "steps", "offset"), "scales")
    direct: Tensor | None  # fp16 [O, G]
    codes: Tensor | None  # uint8 [O, G], or one stream of O * G codes
    steps: Tensor | None  # of every `group` scales, in `dtype`
    offset: Tensor | None  # fp32 [1]

    def __init__(self, rows: int, blocks: int, form: ScaleForm) -> None:
        super().__init__()
        self.rows, self.blocks, self.form = rows, blocks, form
        self.register_buffer(
            "direct", torch.empty(rows, blocks, dtype=torch.float16) if form.scheme == "half" else None
        )
        count = rows * blocks
        whole = (rows, blocks) if form.bits == 8 else (1, packed_words(count, form.bits))  # bytes need no packing
        coded = form.scheme != "half"
        codes = torch.empty(whole, dtype=torch.uint8 if form.bits == 8 else torch.int32) if coded else None
        self.register_buffer("codes", codes)
        self.register_buffer(
            "steps", torch.empty(-(-count // form.group), dtype=STEP_DTYPES[form.dtype]) if coded else None
        )
        self.register_buffer("offset", torch.empty(1, dtype=torch.float32) if coded else None)

    def decode(self) -> Tensor:
        """The scales, fp32 [O, G]."""
        form, shape = self.form, (self.rows, self.blocks)
        if self.direct is not None:
            return self.direct.float()
        assert self.codes is not None and self.steps is not None and self.offset is not None
        code_OG = self.codes if form.bits == 8 else unpack(self.codes, form.bits, self.rows * self.blocks).view(shape)
        step_OG = self.steps.float().repeat_interleave(form.group)[: code_OG.numel()].view(shape)
        if form.scheme == "double":
            return code_OG.float() * step_OG + self.offset
        return dynamic_map().to(step_OG.device)[code_OG.int()] * step_OG + self.offset

    def tensors(self, scale_OG: Tensor) -> dict[str, Tensor]:
        """Buffers by name, for `refill` of the layer whose `scales` these are: the scales rounded, those that are not
        positive as the least one that fp16 has."""
        stored = quantise_scales(scale_OG.clamp_min(LEAST), self.form)
        return {f"scales.{name}": tensor for name, tensor in stored.items()}


def per_column(group_OG: Tensor, group: int, columns: int) -> Tensor:
    """Repeat one value per group of `group` columns over its columns: [O, G] -> [O, columns]; the last group may be
    ragged."""
    rows, groups = group_OG.shape
    return group_OG[:, :, None].expand(rows, groups, group).reshape(rows, groups * group)[:, :columns]


def quantise_scales(scale_OG: Tensor, form: ScaleForm) -> dict[str, Tensor]:
    """Round positive scales to what `BlockScales` of this form stores: its buffers by name."""
    if form.scheme == "half":
        return {"direct": scale_OG.clamp(LEAST, 65504.0).half()}  # the largest finite fp16
    offset = scale_OG.min() if form.scheme == "double" else scale_OG.mean()
    flat_N = (scale_OG - offset).flatten()
    padded_GS = torch.nn.functional.pad(flat_N, (0, -flat_N.numel() % form.group)).view(-1, form.group)
    absmax_G = padded_GS.abs().amax(dim=1)
    highest = 2**form.bits - 1
    step_G = (absmax_G / highest if form.scheme == "double" else absmax_G).to(STEP_DTYPES[form.dtype])
    unit_GS = padded_GS / step_G.float().clamp_min(torch.finfo(torch.float32).tiny)[:, None]
    codes_GS = torch.round(unit_GS).clamp_(0, highest) if form.scheme == "double" else nearest(unit_GS, dynamic_map())
    codes_N = codes_GS.flatten()[: flat_N.numel()]
    codes = codes_N.view_as(scale_OG).to(torch.uint8) if form.bits == 8 else pack(codes_N[None], form.bits)
    return {"codes": codes, "steps": step_G, "offset": offset.float().reshape(1)}
