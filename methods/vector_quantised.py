"""The base of methods that store vector codebooks (`gptvq`, `reallm`): their common options, candidates and
estimates."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.formats.bits import StoredBits
from methods.base import LayerConfig, LayerSpec, Method, Option, Sensitivity
from methods.codecs.svd import svd_factors
from methods.codecs.vector import block_absmax, gaussian_error

# (vector length, index bits) of a codebook of a matrix's own: 1.5 to 6 bits a weight; longer ones cost small matrices
# more than they gain.
SHAPES = ((2, 3), (4, 6), (4, 7), (2, 4), (4, 8), (2, 5), (2, 6), (2, 7), (2, 8), (2, 9), (1, 5), (1, 6))
BLOCKS = (64, 128)  # columns under one scale
# Squared error of a table drawn by a decoder over that of the plain one: 1.01 to 1.05 for K = 256 to 4096.
MLP_LOSS = 1.03
# The same of rounded block scales: of blocks of 64 in five matrices of the default model 1.01 to 1.04 with 4 bits,
# 1.02 to 1.18 with 3. At equal bits 4 are up to 7 % better than 8, and never worse than 3 or 6 by more than 1 %.
SCALE_LOSS = {3: 1.07, 4: 1.025, 6: 1.01, 8: 1.0}

Shape = tuple[int, int, Mapping[str, str]]  # vector length, index bits, and where the table comes from


@dataclass(frozen=True, kw_only=True)
class VectorQuantised(Method):
    """W ~ codebook[codes] * scales, and in subclasses a low-rank part beside it."""

    dim: int | None = None
    index_bits: int | None = None
    block: int | None = None
    scales: str = "double"
    scale_bits: int = 4  # of a block scale, if double

    def __post_init__(self) -> None:
        if (self.dim is None) != (self.index_bits is None):
            raise ValueError("give dim and index_bits together")
        if self.dim is not None and (self.dim not in (1, 2, 4, 8) or not 1 <= (self.index_bits or 0) <= 12):
            raise ValueError("dim must be 1, 2, 4 or 8 and index_bits 1 to 12")
        if self.block is not None and self.block < 1:
            raise ValueError("block must be at least 1")
        if self.scales not in ("half", "double"):
            raise ValueError("scales must be half or double")
        if self.scale_bits not in SCALE_LOSS:
            raise ValueError(f"scale_bits must be one of {', '.join(map(str, SCALE_LOSS))}")

    def shapes(self, layer: LayerSpec) -> list[Shape]:
        """Codebooks on offer for a layer."""
        if self.dim is not None and self.index_bits is not None:
            return [(self.dim, self.index_bits, {"table": "learnt"})]
        return [(dim, bits, {"table": "learnt"}) for dim, bits in SHAPES]

    def ranks(self, layer: LayerSpec) -> Iterable[int]:
        """Ranks of a low-rank part on offer for a layer."""
        return (0,)

    def extras(self) -> dict[str, Option]:
        """What else is in every configuration."""
        return {}

    def candidates(self, layer: LayerSpec) -> list[LayerConfig]:
        blocks = BLOCKS if self.block is None else (self.block,)
        fixed: dict[str, Option] = {"scales": self.scales, **self.extras()}
        if self.scales == "double" and self.scale_bits != 8:
            fixed["scale_bits"] = self.scale_bits
        return [
            LayerConfig.of("codebook", dim=dim, index_bits=bits, block=block, rank=rank, **table, **fixed)
            for dim, bits, table in self.shapes(layer)
            for block in blocks
            for rank in self.ranks(layer)
            if rank < min(layer.in_features, layer.out_features)
        ]

    def expected_costs(
        self, weight_OI: Tensor, sensitivity: Sensitivity, layer: LayerSpec, configs: Sequence[LayerConfig], seed: int
    ) -> list[float]:
        """The low-rank part for real (diagonally whitened), the codebook by what it leaves of normal weights of that
        scale."""
        ranks = {config["rank"] for config in configs}
        blocks = {config["block"] for config in configs if config.format == "codebook"}
        scale_cost: dict[tuple[int, int], float] = {}
        other: dict[LayerConfig, float] = {}
        for rank, rest_OI in rests(weight_OI, sensitivity.column_I, ranks, seed):
            for block in blocks:
                padded_I = torch.nn.functional.pad(sensitivity.column_I, (0, -layer.in_features % block))
                column_G = padded_I.view(-1, block).sum(dim=1)
                absmax_OG = block_absmax(rest_OI, block)
                scale_cost[rank, block] = float(sensitivity.row_O @ absmax_OG.square() @ column_G)
            drawn = [config for config in configs if config.format != "codebook" and config["rank"] == rank]
            other |= self.other_costs(weight_OI, rest_OI, sensitivity, layer, drawn, seed)
        return [other[c] if c in other else 0.5 * _unit_error(c) * scale_cost[c["rank"], c["block"]] for c in configs]

    def other_costs(
        self,
        weight_OI: Tensor,
        rest_OI: Tensor,
        sensitivity: Sensitivity,
        layer: LayerSpec,
        configs: Sequence[LayerConfig],
        seed: int,
    ) -> dict[LayerConfig, float]:
        """`expected_costs` of configurations of another format than codebooks; `rest_OI` is what their low-rank part
        leaves."""
        assert not configs, f"{self.name} has no estimate for {configs[0]}"
        return {}

    def preference(self, config: LayerConfig, bits: StoredBits, weights: int) -> tuple[float, ...]:
        """Index bits first; at equal ones longer vectors, then smaller blocks, then the largest rank that fits."""
        total = super().preference(config, bits, weights)[1]
        return (config["index_bits"] / config["dim"], config["dim"], -config["block"], total)


def rests(weight_OI: Tensor, column_I: Tensor, ranks: set[int], seed: int) -> Iterator[tuple[int, Tensor]]:
    """(rank, what the best low-rank part of that rank leaves of the weight [O, I]) for each of `ranks`, errors weighed
    by column."""
    root_I = column_I.sqrt().clamp_min(torch.finfo(torch.float32).tiny)
    left_OR, right_RI = svd_factors(weight_OI * root_I, max(ranks), None, seed)
    for rank in ranks:
        yield rank, weight_OI - left_OR[:, :rank] @ right_RI[:rank] / root_I


def _unit_error(config: LayerConfig) -> float:
    """Squared error per weight under scales of one."""
    error = gaussian_error(config["dim"], 2 ** config["index_bits"], config["block"])
    error *= SCALE_LOSS[dict(config.hyper).get("scale_bits", 8)]
    return MLP_LOSS * error if config["table"] == "mlp" else error
