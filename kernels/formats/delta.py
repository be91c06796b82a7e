"""A weight that is another model's plus a difference: y = x base^T + x delta^T, the sum never formed.

Stored, and counted, is the difference alone, in any format. The base is a 16-bit weight of the model that the whole is
the difference to: a buffer that no checkpoint holds (the file would hold it once more for every tenant of one base),
handed in when the layer is made or loaded, and counted with what is resident."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from kernels.dispatch import linear
from kernels.formats.bits import Scalar, Spec
from kernels.formats.dense import HALF_DTYPES
from kernels.formats.packed import FORMATS, PackedLinear

BASE = "base"  # the buffer's name


class DeltaLinear(PackedLinear):
    """A difference of format `of`, described by `hyper`, on a base [O, I] of 16-bit type `half`."""

    format: ClassVar[str] = "delta"
    takes_act_bits: ClassVar[bool] = False
    base: Tensor

    def __init__(self, in_features: int, out_features: int, bias: bool, *, of: str, half: str, **hyper: Any) -> None:
        super().__init__(in_features, out_features, bias)
        self.base_half = half
        self.delta: PackedLinear = FORMATS.get(of)(
            in_features=in_features, out_features=out_features, bias=False, **hyper
        )
        shape = (out_features, in_features)
        self.register_buffer(BASE, torch.empty(shape, dtype=HALF_DTYPES[half]), persistent=False)

    @classmethod
    def standing(cls, delta: PackedLinear, base_OI: Tensor, bias: bool) -> DeltaLinear:
        """A packed difference on its base; the bias is the whole layer's, and to be set."""
        half = next(name for name, dtype in HALF_DTYPES.items() if dtype == base_OI.dtype)
        inner: dict[str, Scalar] = {**delta.spec(), "bias": bias, "half": half}
        of = inner.pop("format")
        made = cls.from_spec({"format": cls.format, "of": of, **inner}, "meta")
        assert isinstance(made, DeltaLinear)
        made.delta = delta
        made.stand_on(base_OI)
        return made

    def stand_on(self, base_OI: Tensor) -> None:
        """Hand in the base, in the dtype that the layer was laid out for."""
        assert base_OI.shape == self.base.shape and base_OI.dtype == self.base.dtype
        self.base = base_OI

    def keep_base(self) -> None:
        """Have the base among what is saved and loaded with the layer, in a folder that stands alone."""
        self.register_buffer(BASE, self.base)

    def spec(self) -> Spec:
        inner = self.delta.spec()
        own: Spec = {"format": self.format, "of": inner.pop("format"), "half": self.base_half}
        return {**inner, **own, "bias": self._hyper["bias"]}

    def decode_codes(self) -> Tensor:
        return self.base.float() + self.delta.decode()

    def learnt(self) -> dict[str, Tensor]:
        return self.delta.learnt()

    def indices(self) -> Tensor:
        return self.delta.indices()

    def weight_of(self, learnt: Mapping[str, Tensor], codes: Tensor | None = None) -> Tensor:
        return self.base.float() + self.delta.weight_of(learnt, codes)

    def relearn(self, learnt: Mapping[str, Tensor]) -> None:
        self.delta.relearn(learnt)

    @property
    def beside_bits(self) -> int:
        return 8 * self.base.nbytes

    @property
    def multiplied(self) -> PackedLinear:
        return self.delta

    @property
    def contracts(self) -> bool:
        return True  # the base is multiplied as it is, and a delta of few numbers beside it

    def contracted(self, x: Tensor) -> Tensor:
        return torch.nn.functional.linear(x, self.base.to(x.dtype)) + linear(self.delta, x)
