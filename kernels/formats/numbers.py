"""`Numbers`: a matrix of learnt numbers that a format multiplies, as a factor or a core, in 16, 8 or 4 bits.

    16   fp16
    8    integers of -127 to 127 under one fp16 scale per row
    4    integers of -8 to 7 under one fp16 scale per 64 numbers of a row, packed

A row is what one component of a factorisation has on one side, so that its scale is its own."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from kernels.formats.bitpack import pack, packed_words, unpack
from kernels.formats.scales import per_column
from kernels.formats.stored import StoredModule

NUMBER_BITS = (16, 8, 4)
GROUP = 64  # numbers of 4 bits under one scale, a quarter of a bit for each
SHARES = (1.0, 0.9, 0.8, 0.7, 0.6)  # of the largest number of a group that its range of 4 bits may span


class Numbers(StoredModule):
    """A matrix [R, N] in `bits` bits a number."""

    part_of: ClassVar[dict[str, str]] = {"numbers": "codes", "scales": "scales"}
    numbers: Tensor  # fp16 or int8 [R, N], or packed int32 [R, W]
    scales: Tensor | None  # fp16 [R, G]

    def __init__(self, rows: int, columns: int, bits: int) -> None:
        super().__init__()
        assert rows >= 1 and columns >= 1 and bits in NUMBER_BITS
        self.rows, self.columns, self.bits = rows, columns, bits
        self.group = min(GROUP, columns) if bits == 4 else columns
        dtype = {16: torch.float16, 8: torch.int8, 4: torch.int32}[bits]
        width = packed_words(columns, bits) if bits == 4 else columns
        self.register_buffer("numbers", torch.empty(rows, width, dtype=dtype))
        scales = torch.empty(rows, -(-columns // self.group), dtype=torch.float16) if bits < 16 else None
        self.register_buffer("scales", scales)

    def decode(self) -> Tensor:
        """fp32 [R, N]."""
        if self.scales is None:
            return self.numbers.float()
        whole = self.numbers.float() if self.bits == 8 else unpack(self.numbers, 4, self.columns).float() - 8
        return whole * per_column(self.scales.float(), self.group, self.columns)

    def tensors(self, values_RN: Tensor) -> dict[str, Tensor]:
        """These numbers rounded to what is stored: the buffers by name."""
        assert values_RN.shape == (self.rows, self.columns)
        if self.bits == 16:
            return {"numbers": values_RN.half()}
        pad = -self.columns % self.group
        values_RGS = torch.nn.functional.pad(values_RN, (0, pad)).view(self.rows, -1, self.group)
        top = 2 ** (self.bits - 1) - 1
        absmax_RG = values_RGS.abs().amax(dim=2)
        best: tuple[Tensor, Tensor] | None = None
        least_RG = torch.full_like(absmax_RG, torch.inf)
        for share in SHARES if self.bits == 4 else (1.0,):
            scale_RG = (share * absmax_RG / top).clamp(2.0**-24, 65504.0).half()
            whole_RGS = torch.round(values_RGS / scale_RG.float()[:, :, None]).clamp_(
                -top - (self.bits == 4), top
            )  # eight bits are symmetric
            error_RG = (whole_RGS * scale_RG.float()[:, :, None] - values_RGS).square().sum(dim=2)
            better_RG = error_RG < least_RG
            least_RG = torch.where(better_RG, error_RG, least_RG)
            best = (
                (scale_RG, whole_RGS)
                if best is None
                else (torch.where(better_RG, scale_RG, best[0]), torch.where(better_RG[:, :, None], whole_RGS, best[1]))
            )
        assert best is not None
        whole_RN = best[1].reshape(self.rows, -1)[:, : self.columns]
        stored = whole_RN.to(torch.int8) if self.bits == 8 else pack(whole_RN.int() + 8, 4)
        return {"numbers": stored.contiguous(), "scales": best[0]}

    def rounded(self, values_RN: Tensor) -> Tensor:
        """What these numbers decode to once they are stored, fp32 [R, N]."""
        for name, tensor in self.tensors(values_RN).items():
            setattr(self, name, tensor)
        return self.decode()
