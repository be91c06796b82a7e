"""Two factors whose components have bits by their rank: W = sum over bands of left_b @ right_b, the first band the
components of the largest singular values, in the most bits (Delta-CoMe, Ping et al., arXiv 2406.08903).

    bits = sum over bands of r_b (O + I) b, and 16 + b for every component, side and 128 numbers

Every side of a band is a uniform grid with a zero point, whose row is a component: groups lie along outputs or inputs,
where the numbers of a singular vector are alike, and singular values are in the scales. Products take one factor after
the other where that is less work than the weight itself."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from kernels.formats.packed import PackedLinear
from kernels.formats.uniform import UniformLinear


class BandsLinear(PackedLinear):
    """Bands of `ranks` components in `widths` bits a number ("2+32+968", "8+3+2"), a scale and a zero point per `group`
    numbers. `level` is a label: for how many bits a weight (in 64ths) a method cut the ranks, which layers of unlike
    shapes share."""

    format: ClassVar[str] = "bands"
    takes_act_bits: ClassVar[bool] = False

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool,
        *,
        ranks: str,
        widths: str,
        group: int,
        level: int = 0,
        **added: Any,
    ) -> None:
        super().__init__(in_features, out_features, bias, ranks=ranks, widths=widths, group=group, level=level, **added)
        self.ranks, self.widths = numbers_of(ranks), numbers_of(widths)
        assert len(self.ranks) == len(self.widths) and 1 <= sum(self.ranks) <= min(in_features, out_features)
        for index, (rank, bits) in enumerate(zip(self.ranks, self.widths, strict=True)):
            for side, size in (("left", out_features), ("right", in_features)):
                if rank:
                    grid = UniformLinear(size, rank, False, bits=bits, group=group, offset="zero")
                    self.add_module(f"{side}_{index}", grid)

    @property
    def components(self) -> int:
        return sum(self.ranks)

    def side(self, side: str) -> list[tuple[str, UniformLinear]]:
        """The grids of "left" [r_b, O] or "right" [r_b, I] that there are, band by band, by name."""
        found = ((name, module) for name, module in self.named_children() if name.startswith(f"{side}_"))
        return [(name, module) for name, module in found if isinstance(module, UniformLinear)]

    def factor(self, side: str) -> Tensor:
        """All components of a side, fp32 [R, O] or [R, I]."""
        return torch.cat([grid.decode_codes() for _, grid in self.side(side)])

    def decode_codes(self) -> Tensor:
        return self.factor("left").t() @ self.factor("right")

    @property
    def contracts(self) -> bool:
        dense = self.in_features * self.out_features
        return self.components * (self.in_features + self.out_features) < dense and self.is_plain

    def contracted(self, x: Tensor) -> Tensor:
        return x @ self.factor("right").to(x.dtype).t() @ self.factor("left").to(x.dtype)


def numbers_of(text: str) -> tuple[int, ...]:
    """(2, 32, 968) of "2+32+968"."""
    return tuple(int(part) for part in text.split("+"))


def text_of(numbers: Sequence[int]) -> str:
    """The inverse of `numbers_of`."""
    return "+".join(map(str, numbers))
