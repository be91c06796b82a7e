"""The uncompressed format: sixteen bits a weight, the reference of every comparison."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from kernels.formats.packed import PackedLinear

HALF_DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16}


class DenseLinear(PackedLinear):
    """A 16-bit weight [O, I]; `dtype` is "float16" or "bfloat16", whichever the published checkpoint uses."""

    format: ClassVar[str] = "dense"
    takes_act_bits: ClassVar[bool] = False
    part_of: ClassVar[dict[str, str]] = {"weight": "codes"}
    weight: Tensor

    def __init__(self, in_features: int, out_features: int, bias: bool, dtype: str = "float16", **added: Any) -> None:
        super().__init__(in_features, out_features, bias, dtype=dtype, **added)
        self.register_buffer("weight", torch.empty(out_features, in_features, dtype=HALF_DTYPES[dtype]))

    def decode_codes(self) -> Tensor:
        return self.weight.float()
