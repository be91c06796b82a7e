"""Block scales: one positive number per block of consecutive input columns of a row, stored in one of three ways.

    half      fp16 per block
    double    integers of `bits` bits over [offset, offset + (2**bits - 1) * step], one step in `dtype` per `group` consecutive scales
              (row-major) and one fp32 offset, the smallest scale of the matrix (LQ-LoRA, arXiv 2311.12023, sec. 3)
    dynamic   8 bits per block: the signed dynamic format over [offset - step, offset + step], offset the mean scale (QLoRA,
              arXiv 2305.14314, sec. 3, as bitsandbytes stores it)

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

KINDS = ("half", "double", "dynamic")
STEP_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class ScaleForm:
    kind: str
    bits: int = 8
    group: int = 256
    dtype: str = "float32"

    def __post_init__(self) -> None:
        assert self.kind in KINDS and 1 <= self.bits <= 8 and self.group >= 1 and self.dtype in STEP_DTYPES
        assert self.kind == "double" or (self.bits, self.group, self.dtype) == (8, 256, "float32")


class BlockScales(StoredModule):
    """Scales of an [O, G] array of blocks, G blocks to a row."""

    part_of: ClassVar[dict[str, str]] = {"direct": "scales", "codes": "scales", "steps": "scales", "offset": "scales"}

    def __init__(self, rows: int, blocks: int, form: ScaleForm) -> None:
        super().__init__()
        self.rows, self.blocks, self.form = rows, blocks, form
        self.register_buffer("direct", torch.empty(rows, blocks, dtype=torch.float16) if form.kind == "half" else None)
        count = rows * blocks
        whole = (rows, blocks) if form.bits == 8 else (1, packed_words(count, form.bits))  # bytes need no packing
        coded = form.kind != "half"
        codes = torch.empty(whole, dtype=torch.uint8 if form.bits == 8 else torch.int32) if coded else None
        self.register_buffer("codes", codes)
        self.register_buffer(
            "steps", torch.empty(-(-count // form.group), dtype=STEP_DTYPES[form.dtype]) if coded else None
        )
        self.register_buffer("offset", torch.empty(1, dtype=torch.float32) if coded else None)

    def decode(self) -> Tensor:
        """fp32 [O, G]."""
        form, shape = self.form, (self.rows, self.blocks)
        if form.kind == "half":
            return self.direct.float()
        code_OG = self.codes if form.bits == 8 else unpack(self.codes, form.bits, self.rows * self.blocks).view(shape)
        step_OG = self.steps.float().repeat_interleave(form.group)[: code_OG.numel()].view(shape)
        if form.kind == "double":
            return code_OG.float() * step_OG + self.offset
        return dynamic_map().to(step_OG.device)[code_OG.int()] * step_OG + self.offset


def per_column(group_OG: Tensor, group: int, columns: int) -> Tensor:
    """Repeat one value per group of `group` columns over its columns: [O, G] -> [O, columns]; the last group may be
    ragged."""
    rows, groups = group_OG.shape
    return group_OG[:, :, None].expand(rows, groups, group).reshape(rows, groups * group)[:, :columns]


def quantise_scales(scale_OG: Tensor, form: ScaleForm) -> dict[str, Tensor]:
    """Round positive scales to what `BlockScales` of this form stores: its buffers by name."""
    if form.kind == "half":
        return {"direct": scale_OG.clamp(2.0**-24, 65504.0).half()}  # smallest and largest finite fp16
    offset = scale_OG.min() if form.kind == "double" else scale_OG.mean()
    flat_N = (scale_OG - offset).flatten()
    padded_GS = torch.nn.functional.pad(flat_N, (0, -flat_N.numel() % form.group)).view(-1, form.group)
    absmax_G = padded_GS.abs().amax(dim=1)
    highest = 2**form.bits - 1
    step_G = (absmax_G / highest if form.kind == "double" else absmax_G).to(STEP_DTYPES[form.dtype])
    unit_GS = padded_GS / step_G.float().clamp_min(torch.finfo(torch.float32).tiny)[:, None]
    codes_GS = torch.round(unit_GS).clamp_(0, highest) if form.kind == "double" else nearest(unit_GS, dynamic_map())
    codes_N = codes_GS.flatten()[: flat_N.numel()]
    codes = codes_N.view_as(scale_OG).to(torch.uint8) if form.bits == 8 else pack(codes_N[None], form.bits)
    return {"codes": codes, "steps": step_G, "offset": offset.float().reshape(1)}
