"""Two factors in the weight's place: W = left @ right, of `components` components and nothing beside them.

    bits = b * components * (in + out), and 16 for every component and side at 8 bits, for 64 numbers at 4

With `shifted`, a number of 16 bits per output is added to the product: what factors that stand for deviations from a
mean leave of that mean. It is counted with the scales, not a bias of the model's.

Products take one factor after the other where that is less work than the weight itself."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from kernels.formats.numbers import Numbers
from kernels.formats.packed import PackedLinear


class FactorsLinear(PackedLinear):
    """left [O, R] times right [R, I], each a row of `Numbers` per component."""

    format: ClassVar[str] = "factors"
    takes_act_bits: ClassVar[bool] = False
    part_of: ClassVar[dict[str, str]] = {"shift": "scales"}
    shift: Tensor | None  # fp16 [O]

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool,
        *,
        components: int,
        bits: int,
        shifted: bool = False,
        **added: Any,
    ) -> None:
        added |= {"shifted": True} if shifted else {}
        super().__init__(in_features, out_features, bias, components=components, bits=bits, **added)
        assert 1 <= components <= min(in_features, out_features)
        self.components = components
        self.left = Numbers(components, out_features, bits)  # transposed: a row is a component
        self.right = Numbers(components, in_features, bits)
        self.register_buffer("shift", torch.empty(out_features, dtype=torch.float16) if shifted else None)

    @property
    def constant(self) -> Tensor | None:
        if self.shift is None or self.bias is None:
            return self.bias if self.shift is None else self.shift
        return self.shift.float() + self.bias.float()

    def tensors(self, left_OR: Tensor, right_RI: Tensor) -> dict[str, Tensor]:
        """Buffers of the two factors by name, rounded, for `fill`."""
        sides = (("left", self.left, left_OR.t()), ("right", self.right, right_RI))
        return {f"{side}.{name}": t for side, kept, values in sides for name, t in kept.tensors(values).items()}

    def decode_codes(self) -> Tensor:
        return self.left.decode().t() @ self.right.decode()

    def base_learnt(self) -> dict[str, Tensor]:
        return {"long": self.left.decode().t(), "wide": self.right.decode()}

    def base_of(self, learnt: Mapping[str, Tensor], codes: Tensor) -> Tensor:
        return learnt["long"] @ learnt["wide"]

    def base_tensors(self, learnt: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return self.tensors(learnt["long"], learnt["wide"])

    @property
    def contracts(self) -> bool:
        dense = self.in_features * self.out_features
        return self.components * (self.in_features + self.out_features) < dense and self.is_plain

    def contracted(self, x: Tensor) -> Tensor:
        return x @ self.right.decode().to(x.dtype).t() @ self.left.decode().to(x.dtype)
