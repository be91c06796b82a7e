"""The low-rank branch L = left @ right that a format may add to what its codes decode to.

Factors are stored in fp16, or in 8 bits with one fp16 scale per component: `left` is [O, R] and `right` is [R, I], so
component r of the product is s_left[r] * s_right[r] * q_left[:, r] q_right[r, :].
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from kernels.formats.stored import StoredModule


class LowRank(StoredModule):
    """Two factors of rank R in fp16, or in 8 bits with scales."""

    part_of: ClassVar[dict[str, str]] = dict.fromkeys(("left", "right", "left_scale", "right_scale"), "adapters")
    left: Tensor  # fp16 or int8 [O, R]
    right: Tensor  # [R, I]
    left_scale: Tensor | None  # fp16 [R]
    right_scale: Tensor | None

    def __init__(self, in_features: int, out_features: int, rank: int, bits: int) -> None:
        super().__init__()
        assert rank >= 1 and bits in (8, 16)
        self.bits = bits
        dtype = torch.float16 if bits == 16 else torch.int8
        self.register_buffer("left", torch.empty(out_features, rank, dtype=dtype))
        self.register_buffer("right", torch.empty(rank, in_features, dtype=dtype))
        for name in ("left_scale", "right_scale"):
            self.register_buffer(name, torch.empty(rank, dtype=torch.float16) if bits == 8 else None)

    def factors(self) -> tuple[Tensor, Tensor]:
        """(left [O, R], right [R, I]), fp32."""
        left, right = self.left.float(), self.right.float()
        if self.left_scale is not None and self.right_scale is not None:
            left, right = left * self.left_scale.float(), right * self.right_scale.float()[:, None]
        return left, right

    def decode(self) -> Tensor:
        """The product of the factors, fp32 [O, I]."""
        left, right = self.factors()
        return left @ right


def quantise_lowrank(left_OR: Tensor, right_RI: Tensor, bits: int) -> dict[str, Tensor]:
    """Round two factors to what `LowRank` of `bits` stores: its buffers by name."""
    if bits == 16:
        return {"left": left_OR.half(), "right": right_RI.half()}
    left_scale = _int8_scale(left_OR.abs().amax(dim=0))
    right_scale = _int8_scale(right_RI.abs().amax(dim=1))
    return {
        "left": torch.round(left_OR / left_scale.float()).clamp_(-127, 127).to(torch.int8),
        "right": torch.round(right_RI / right_scale.float()[:, None]).clamp_(-127, 127).to(torch.int8),
        "left_scale": left_scale,
        "right_scale": right_scale,
    }


def _int8_scale(absmax_R: Tensor) -> Tensor:
    return (absmax_R / 127).clamp(2.0**-24, 65504.0).half()
