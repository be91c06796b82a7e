"""Block scales: one positive number per block of consecutive input columns of a row, stored in one of three ways.

    half      fp16 per block
    double    8 bits per block: unsigned integers over [offset, offset + 255 * step], one fp32 step per `SECOND_GROUP`
              consecutive scales (row-major) and one fp32 offset, the smallest scale of the matrix (LQ-LoRA, arXiv 2311.12023,
              sec. 3)
    dynamic   8 bits per block: the signed dynamic format over [offset - step, offset + step], offset the mean scale (QLoRA,
              arXiv 2305.14314, sec. 3, as bitsandbytes stores it)

The last two take 8/B + 32/(256 B) bits per weight for blocks of B, and 32 bits for the offset.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from kernels.normal_float import dynamic_map
from kernels.packed import StoredModule

SECOND_GROUP = 256
KINDS = ("half", "double", "dynamic")


class BlockScales(StoredModule):
    """Scales of an [O, G] array of blocks, G blocks to a row."""

    part_of: ClassVar[dict[str, str]] = {"direct": "scales", "codes": "scales", "steps": "scales", "offset": "scales"}

    def __init__(self, rows: int, blocks: int, kind: str) -> None:
        super().__init__()
        assert kind in KINDS
        self.rows, self.blocks, self.kind = rows, blocks, kind
        double, count = kind != "half", rows * blocks
        self.register_buffer("direct", None if double else torch.empty(rows, blocks, dtype=torch.float16))
        self.register_buffer("codes", torch.empty(rows, blocks, dtype=torch.uint8) if double else None)
        self.register_buffer("steps", torch.empty(-(-count // SECOND_GROUP), dtype=torch.float32) if double else None)
        self.register_buffer("offset", torch.empty(1, dtype=torch.float32) if double else None)

    def decode(self) -> Tensor:
        """fp32 [O, G]."""
        if self.kind == "half":
            return self.direct.float()
        step_N = self.steps.repeat_interleave(SECOND_GROUP)[: self.codes.numel()]
        if self.kind == "double":
            return self.codes.float() * step_N.view_as(self.codes) + self.offset
        return dynamic_map().to(step_N.device)[self.codes.int()] * step_N.view_as(self.codes) + self.offset


def per_column(group_OG: Tensor, group: int, columns: int) -> Tensor:
    """Repeat one value per group of `group` columns over its columns: [O, G] -> [O, columns]; the last group may be ragged."""
    rows, groups = group_OG.shape
    return group_OG[:, :, None].expand(rows, groups, group).reshape(rows, groups * group)[:, :columns]


def quantise_scales(scale_OG: Tensor, kind: str) -> dict[str, Tensor]:
    """Round positive scales to what `BlockScales` of this kind stores: its buffers by name."""
    if kind == "half":
        return {"direct": scale_OG.clamp(2.0**-24, 65504.0).half()}  # smallest and largest finite fp16
    offset = scale_OG.min() if kind == "double" else scale_OG.mean()
    flat_N = (scale_OG - offset).flatten()
    padded_MS = torch.nn.functional.pad(flat_N, (0, -flat_N.numel() % SECOND_GROUP)).view(-1, SECOND_GROUP)
    absmax_M = padded_MS.abs().amax(dim=1)
    step_M = absmax_M / 255 if kind == "double" else absmax_M
    unit_MS = padded_MS / step_M.clamp_min(torch.finfo(torch.float32).tiny)[:, None]
    if kind == "double":
        codes_MS = torch.round(unit_MS).clamp_(0, 255)
    else:
        levels = dynamic_map().to(unit_MS.device)
        codes_MS = torch.bucketize(unit_MS, (levels[1:] + levels[:-1]) / 2)
    codes = codes_MS.flatten()[: flat_N.numel()].view_as(scale_OG).to(torch.uint8)
    return {"codes": codes, "steps": step_M.float(), "offset": offset.float().reshape(1)}
