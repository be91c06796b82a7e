"""The base of methods that store two factors in a matrix's place (`svd`, `bolaco`): their common options, candidates
and estimates."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from kernels.formats.factors import FactorsLinear
from kernels.formats.numbers import NUMBER_BITS, Numbers
from methods.base import Compressed, LayerConfig, LayerData, LayerSpec, Method, Pooled, Sensitivity

STEP = 8  # between ranks; Bolaco's released code rounds to multiples of it too
FINEST = 128  # ranks of a matrix, at most
MIXED = 24  # of them that are mixed over the layers of a model
DENSE = LayerConfig.of("dense", dtype="float16")  # a matrix that is left as it is


@dataclass(frozen=True, kw_only=True)
class Factored(Method):
    """Fields and candidates shared by the methods that store `FactorsLinear`s."""

    shifted: ClassVar[bool] = False  # whether a number per output is stored beside the factors
    # Error does not fall with bits alone: all components at 4 bits a number are nearer than a part of them at 8, and a
    # matrix may be worth next to none. One estimate then serves every budget, too.
    reach: ClassVar[float] = 64.0
    whole: ClassVar[bool] = False  # whether a matrix may stay as it is, at 16 bits

    rank: int | None = None  # of every matrix that has as many
    bits: int | None = None  # of a number of the factors

    def __post_init__(self) -> None:
        if self.rank is not None and self.rank < 1:
            raise ValueError("rank must be at least 1")
        check_bits(self.bits, NUMBER_BITS)

    def candidates(self, layer: LayerSpec) -> list[LayerConfig]:
        return self._configs(ranks(layer, FINEST))

    def mixed_candidates(self, layer: LayerSpec) -> list[LayerConfig]:
        return self._configs(ranks(layer, MIXED))

    def _configs(self, on_offer: Sequence[int]) -> list[LayerConfig]:
        chosen = on_offer if self.rank is None else (min(self.rank, on_offer[-1]),)
        widths = NUMBER_BITS if self.bits is None else (self.bits,)
        added = {"shifted": True} if self.shifted else {}
        found = [LayerConfig.of("factors", components=rank, bits=bits, **added) for bits in widths for rank in chosen]
        return [*found, DENSE] if self.whole and self.rank is None else found

    def shift(self, data: LayerData, decoded_OI: Tensor) -> dict[str, Tensor]:
        """What is stored beside the factors, by name, given what these decode to."""
        return {}

    @abstractmethod
    def factors(self, data: LayerData) -> tuple[Tensor, Tensor]:
        """(left [O, R], right [R, I]) of all components, the most important first. Raises what a Hessian may."""

    def expected_costs(
        self, weight_OI: Tensor, sensitivity: Sensitivity, layer: LayerSpec, configs: Sequence[LayerConfig], seed: int
    ) -> list[float]:
        """One factorisation, with a diagonal Hessian or covariance where one is asked for. A component is rounded by
        itself: the sums of the first 8, 16, ... rounded ones are what each candidate would decode to."""
        diagonal_II = sensitivity.column_I.diag()
        data = LayerData(
            weight_OI,
            seed,
            hessian_II=diagonal_II if self.needs.hessian else None,
            pooled=Pooled(torch.zeros_like(sensitivity.column_I), diagonal_II) if self.needs.pooled else None,
        )
        left_OR, right_RI = self.factors(data)
        costs = {DENSE: sensitivity.cost(weight_OI - weight_OI.half())}
        factored = [config for config in configs if config != DENSE]
        for bits in {config["bits"] for config in factored}:
            left_RO = _rounded(left_OR.t(), bits)
            rounded_RI = _rounded(right_RI, bits)
            rest_OI, done = weight_OI.clone(), 0
            alike = [config for config in factored if config["bits"] == bits]
            for config in sorted(alike, key=lambda config: config["components"]):
                rank = config["components"]
                rest_OI -= left_RO[done:rank].t() @ rounded_RI[done:rank]
                costs[config], done = sensitivity.cost(rest_OI), rank
        return [costs[config] for config in configs]

    def compress(self, data: LayerData, layer: LayerSpec, config: LayerConfig) -> Compressed:
        packed = config.layout(layer, data.weight_OI.device)
        if isinstance(packed, FactorsLinear):
            left_OR, right_RI = self.factors(data)
            packed.refill(**packed.tensors(left_OR[:, : packed.components], right_RI[: packed.components]))
            packed.refill(**self.shift(data, packed.decode()))
        else:
            packed.fill(weight=data.weight_OI.half())
        return Compressed(packed)


def _rounded(values_RN: Tensor, bits: int) -> Tensor:
    rows, columns = values_RN.shape
    return Numbers(rows, columns, bits).rounded(values_RN)


def ranks(layer: LayerSpec, most: int) -> list[int]:
    """At most about `most` ranks, up to the full one."""
    return in_steps(min(layer.in_features, layer.out_features), STEP, most)


def in_steps(full: int, unit: int, most: int) -> list[int]:
    """At most about `most` numbers in even steps of a multiple of `unit`, up to `full`."""
    step = unit * max(1, round(full / (unit * most)))
    return sorted({*range(step, full + 1, step), full})


def check_bits(bits: int | None, widths: Sequence[int]) -> None:
    """Raises ValueError."""
    if bits not in (None, *widths):
        raise ValueError(f"bits must be one of {', '.join(map(str, widths))}")
