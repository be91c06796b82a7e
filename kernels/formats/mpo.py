"""A matrix product operator in the weight's place (Oseledets, SIAM J. Sci. Comput. 33, 2011; for layers Novikov et al.,
arXiv 1509.06569; CompactifAI, arXiv 2401.14109).

Rows and columns are counted in mixed radix, O = o_1 ... o_n and I = i_1 ... i_n, and digit k of both belongs to site k:

    W[(o_1 ... o_n), (i_1 ... i_n)] = A_1[o_1 i_1] A_2[o_2 i_2] ... A_n[o_n i_n]

a product of matrices A_k[o_k i_k] of [X_(k-1), X_k], X_0 = X_n = 1. Bonds have at most `chi`, and never more than what
stands on either side of them could use: there the operator is exact. Of 216 x 216 on three sites of 6 x 6 it has
36 chi + 36 chi^2 + 36 chi numbers.

A core is stored as `Numbers` whose rows are its right bond (the last one's: its left bond), so that a component has a
scale of its own."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from itertools import pairwise
from math import prod
from typing import Any, ClassVar

from torch import Tensor

from kernels.formats.numbers import Numbers
from kernels.formats.packed import PackedLinear


class MpoLinear(PackedLinear):
    """Cores of `sites` sites, bonds of at most `chi`, numbers of `bits` bits."""

    format: ClassVar[str] = "mpo"
    takes_act_bits: ClassVar[bool] = False

    def __init__(
        self, in_features: int, out_features: int, bias: bool, *, chi: int, bits: int, sites: int = 3, **added: Any
    ) -> None:
        super().__init__(in_features, out_features, bias, chi=chi, bits=bits, sites=sites, **added)
        self.rows, self.columns = site_shapes(out_features, in_features, sites)  # o_k, i_k
        self.bonds = bond_dimensions(out_features, in_features, sites, chi)  # X_0 ... X_n
        for k, (left, right) in enumerate(pairwise(self.bonds)):
            inner = self.rows[k] * self.columns[k]
            shape = (right, left * inner) if k < sites - 1 else (left, inner)
            self.add_module(f"core_{k}", Numbers(*shape, bits))

    def cores(self) -> list[Tensor]:
        """A_1 ... A_n, fp32, each [X_(k-1), o_k, i_k, X_k]."""
        return [self._core(k, kept.decode()) for k, kept in enumerate(self._numbers)]

    def tensors(self, cores: list[Tensor]) -> dict[str, Tensor]:
        """Buffers of the base by name, rounded, for `fill`."""
        return {
            f"core_{k}.{name}": tensor
            for k, (kept, core) in enumerate(zip(self._numbers, cores, strict=True))
            for name, tensor in kept.tensors(self._flat(k, core)).items()
        }

    def decode_codes(self) -> Tensor:
        return self.weight(self.cores())

    def weight(self, cores: list[Tensor]) -> Tensor:
        """The matrix [O, I] that these cores stand for; differentiable."""
        whole = cores[0].reshape(-1, self.bonds[1])
        for core in cores[1:]:
            whole = (whole @ core.reshape(len(core), -1)).reshape(-1, core.shape[-1])
        return from_sites(whole, self.rows, self.columns)

    def base_learnt(self) -> dict[str, Tensor]:
        return {f"core_{k}": core for k, core in enumerate(self.cores())}

    def base_of(self, learnt: Mapping[str, Tensor], codes: Tensor) -> Tensor:
        return self.weight(self._listed(learnt))

    def base_tensors(self, learnt: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return self.tensors(self._listed(learnt))

    def _listed(self, learnt: Mapping[str, Tensor]) -> list[Tensor]:
        return [learnt[f"core_{k}"] for k in range(len(self.rows))]

    @property
    def contracts(self) -> bool:
        work, outputs, rest = 0, 1, self.in_features
        for k, (left, right) in enumerate(pairwise(self.bonds)):
            rest //= self.columns[k]
            work += outputs * left * self.columns[k] * rest * self.rows[k] * right
            outputs *= self.rows[k]
        return work < self.in_features * self.out_features and self.is_plain

    def contracted(self, x: Tensor) -> Tensor:
        """Site by site: a digit of the inputs and the bond in front of it go, a digit of the outputs and the bond
        behind it come."""
        batch = x.shape[:-1]
        rest, outputs = self.in_features, 1
        state = x.reshape(-1, 1, 1, rest)  # inputs, output digits so far, bond, input digits to come
        for core in self.cores():
            left, row, column, right = core.shape
            rest //= column
            state = state.reshape(-1, outputs, left, column, rest).permute(0, 1, 4, 2, 3)
            state = state.reshape(-1, outputs, rest, left * column)
            flat = core.permute(0, 2, 1, 3).reshape(left * column, row * right).to(x.dtype)
            state = (state @ flat).reshape(-1, outputs, rest, row, right).permute(0, 1, 3, 4, 2)
            outputs *= row
        return state.reshape(*batch, self.out_features)

    @property
    def _numbers(self) -> list[Numbers]:
        return [core for core in self.children() if isinstance(core, Numbers)]

    def _core(self, k: int, flat: Tensor) -> Tensor:
        shape = (self.bonds[k], self.rows[k], self.columns[k], self.bonds[k + 1])
        return (flat.t() if k < len(self.rows) - 1 else flat).reshape(shape)

    def _flat(self, k: int, core: Tensor) -> Tensor:
        last = k == len(self.rows) - 1
        return core.reshape(self.bonds[k], -1) if last else core.reshape(-1, self.bonds[k + 1]).t()


def to_sites(matrix_OI: Tensor, rows: tuple[int, ...], columns: tuple[int, ...]) -> Tensor:
    """The matrix as a tensor of sites [o_1 i_1, ..., o_n i_n]."""
    sites = len(rows)
    order = [axis for k in range(sites) for axis in (k, sites + k)]
    digits = matrix_OI.reshape(*rows, *columns).permute(order)
    return digits.reshape([row * column for row, column in zip(rows, columns, strict=True)])


def from_sites(tensor: Tensor, rows: tuple[int, ...], columns: tuple[int, ...]) -> Tensor:
    """Inverse of `to_sites`, from a tensor of as many numbers."""
    sites = len(rows)
    digits = tensor.reshape([size for pair in zip(rows, columns, strict=True) for size in pair])
    order = [*range(0, 2 * sites, 2), *range(1, 2 * sites, 2)]
    return digits.permute(order).reshape(prod(rows), prod(columns))


def site_shapes(out_features: int, in_features: int, sites: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """(o_1 ... o_n, i_1 ... i_n): exact products, as even as the sizes allow, the large digits of one side at the small
    ones of the other."""
    return even_factors(out_features, sites), even_factors(in_features, sites)[::-1]


@cache
def even_factors(size: int, count: int) -> tuple[int, ...]:
    """`count` factors of `size`, rising, whose largest is least (and then the second largest, and so on): 576 = 8 8 9,
    1536 = 8 12 16, 49152 = 32 32 48, and of a prime 1 1 577."""
    if count == 1:
        return (size,)
    found = [
        tuple(sorted((*even_factors(size // divisor, count - 1), divisor)))
        for divisor in range(1, size + 1)
        if size % divisor == 0
    ]
    return min(found, key=lambda factors: factors[::-1])


def bond_dimensions(out_features: int, in_features: int, sites: int, chi: int) -> tuple[int, ...]:
    """X_0 ... X_n under `chi`."""
    rows, columns = site_shapes(out_features, in_features, sites)
    sizes = [row * column for row, column in zip(rows, columns, strict=True)]
    return tuple(min(chi, prod(sizes[:k]), prod(sizes[k:])) if 0 < k < sites else 1 for k in range(sites + 1))


def full_bond(out_features: int, in_features: int, sites: int) -> int:
    """The least `chi` at which every matrix of this shape is exact."""
    return max(bond_dimensions(out_features, in_features, sites, out_features * in_features))
