"""Signs under one scale a matrix (BitDelta, Liu et al., arXiv 2402.10193): W = sum over masks of scale_m * sign_m.

    bits = masks * (O * I + 16), rows padded to whole words

One mask is the paper's format; several are its "successive" one, each the signs of what those before it leave. No mask
at all stands for a matrix of zeros, in no bits."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from kernels.formats.bitpack import pack, packed_words, unpack
from kernels.formats.packed import PackedLinear


class SignsLinear(PackedLinear):
    """`masks` bits a weight, and as many fp16 scales."""

    format: ClassVar[str] = "signs"
    takes_act_bits: ClassVar[bool] = False
    part_of: ClassVar[dict[str, str]] = {"codes": "codes", "scales": "scales"}
    codes: Tensor  # int32 [masks * O, W]: the bit of a positive number is set
    scales: Tensor  # fp16 [masks]

    def __init__(self, in_features: int, out_features: int, bias: bool, *, masks: int, **added: Any) -> None:
        super().__init__(in_features, out_features, bias, masks=masks, **added)
        assert masks >= 0
        self.masks = masks
        self.register_buffer(
            "codes", torch.empty(masks * out_features, packed_words(in_features, 1), dtype=torch.int32)
        )
        self.register_buffer("scales", torch.empty(masks, dtype=torch.float16))

    def tensors(self, weight_OI: Tensor) -> dict[str, Tensor]:
        """Buffers of the masks by name, for `fill`: of each the signs of what is left, and the mean magnitude of it,
        which is the scale of least squared error for these signs (the paper's eq. 3)."""
        rest_OI, codes, scales = weight_OI, [], []
        for _ in range(self.masks):
            positive_OI = rest_OI > 0
            scale = rest_OI.abs().mean().half()
            codes.append(pack(positive_OI.to(torch.int32), 1))
            scales.append(scale)
            rest_OI = rest_OI - torch.where(positive_OI, scale.float(), -scale.float())
        if not self.masks:
            return {
                "codes": torch.empty_like(self.codes, device=weight_OI.device),
                "scales": weight_OI.new_empty(0).half(),
            }
        return {"codes": torch.cat(codes), "scales": torch.stack(scales)}

    def decode_codes(self) -> Tensor:
        return self.base_of(self.base_learnt(), self.indices())

    def indices(self) -> Tensor:
        """Bits, int32 [masks * O, I]."""
        return unpack(self.codes, 1, self.in_features)

    def base_learnt(self) -> dict[str, Tensor]:
        return {"scale": self.scales.float()} if self.masks else {}

    def base_of(self, learnt: Mapping[str, Tensor], codes: Tensor) -> Tensor:
        whole_OI = torch.zeros(self.out_features, self.in_features, device=self.codes.device)
        if self.masks:
            for scale, codes_OI in zip(learnt["scale"], codes.split(self.out_features), strict=True):
                whole_OI = whole_OI + scale * (2.0 * codes_OI.float() - 1.0)
        return whole_OI

    def base_tensors(self, learnt: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {"scales": learnt["scale"].half()}

    @property
    def contracts(self) -> bool:
        return not self.masks and self.is_plain  # there is nothing to multiply

    def contracted(self, x: Tensor) -> Tensor:
        return x.new_zeros(*x.shape[:-1], self.out_features)
