"""LQ-LoRA (Guo, Greengard, Xing, Kim; ICLR 2024, arXiv 2311.12023): W ~ Q + L1 L2, L fitted together with Q and then
trained.

    sec. 3.1   alternate L1, L2 = SVD_r(W - Q) and Q = NF(W - L1 L2)                 `decompose`
    sec. 3.2   NormalFloat with scales of b0 bits in groups of B1, steps in b1       kernels.formats.scales, "double"
    sec. 3.2   which (b, b0, b1, B0, B1) for which matrix: an integer programme      harness.plan.allocation
    sec. 3.3   errors weighted with the Fisher information, F ~ rows x columns       `Weighting`, `price`

LoftQ (Li et al., arXiv 2310.08659) is the same alternation, begun with Q, unweighted, for a fixed number of rounds:
variant `loftq`. `README.md` beside this file lists the divergences."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from typing import ClassVar

import torch
from torch import Tensor

from kernels.formats.codebook import CodebookLinear
from kernels.formats.normal_float import nearest, nf_levels
from kernels.formats.packed import PackedLinear
from kernels.formats.scales import ScaleForm
from methods.adapted import Adapted
from methods.base import Compressed, LayerConfig, LayerData, LayerSpec, Method, Needs, Sensitivity
from methods.codecs.svd import stored_lowrank, svd_factors
from methods.codecs.vector import Scales, absmax_scales

# b, b0, b1, B0, B1: bits of a weight, of its block's scale, type of the step those share; weights to a block, blocks to
# a step.
GRIDS = {
    "paper": ((2, 3, 4), (2, 3, 4), ("bfloat16", "float16", "float32"), (16, 32, 64), (16, 64, 256)),
    "released": ((2, 3, 4, 8), (2, 3, 4, 8), ("bfloat16", "float16", "float32"), (16, 32, 64), (16, 64, 256)),
}
PRICES = ("divergence", "fisher")
TABLE_ROUNDS = 3  # of the alternation, when only its error is wanted
FIRST = ("lowrank", "quantised")
FLOOR = 0.1  # least weight of a row or column, in units of their root mean square


@dataclass(frozen=True, kw_only=True)
class LQLoRA(Adapted):
    """NormalFloat with adapters fitted together with it."""

    name: ClassVar[str] = "lq-lora"
    version: ClassVar[int] = 2

    fisher: bool = True
    first: str = "lowrank"  # half of a round that is done first
    rounds: int = 10
    tolerance: float = 1e-3  # stop at a smaller relative gain
    grid: str = "paper"  # 243 configurations; "released": the code's 432
    # What an error costs when an allocation is made: as for every other method, or the paper's Fisher information.
    price: str = "divergence"
    bits: int | None = None
    block: int | None = None
    lora_rate: float = 5e-4  # factors that start fitted are many times larger than LoRA's own

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.first not in FIRST:
            raise ValueError(f"first must be one of {', '.join(FIRST)}")
        if self.rounds < 1 or not 0 <= self.tolerance < 1:
            raise ValueError("rounds must be at least 1, tolerance 0 to 1")
        if self.grid not in GRIDS:
            raise ValueError(f"grid must be one of {', '.join(GRIDS)}")
        if self.price not in PRICES:
            raise ValueError(f"price must be one of {', '.join(PRICES)}")
        if (self.bits or self.block) and not self._grid():
            raise ValueError("no configuration of the grid has these bits and this block")

    @classmethod
    def variants(cls) -> dict[str, Method]:
        return {
            "unweighted": cls(fisher=False),
            "loftq": cls(fisher=False, first="quantised", rounds=5, tolerance=0.0),
        }

    @property
    def needs(self) -> Needs:
        return Needs(fisher=self.fisher, fisher_prices=self.price == "fisher")

    def candidates(self, layer: LayerSpec) -> list[LayerConfig]:
        return [config.plus(**self.adapters(layer)) for config in self._grid()]

    def _grid(self) -> tuple[LayerConfig, ...]:
        wanted = {"index_bits": self.bits, "block": self.block}
        full = (_config(*choice) for choice in product(*GRIDS[self.grid]))
        return tuple(config for config in full if all(value in (None, config[key]) for key, value in wanted.items()))

    def expected_costs(
        self, weight_OI: Tensor, sensitivity: Sensitivity, layer: LayerSpec, configs: Sequence[LayerConfig], seed: int
    ) -> list[float]:
        """The decomposition once for each number of bits, cut short; then each configuration by rounding a sample of
        what the factors leave, which hardly depends on how scales are stored. Factors are weighted with whatever errors
        are priced with."""
        data = LayerData(weight_OI, seed, fisher=sensitivity if self.fisher else None)
        short, costs = replace(self, rounds=TABLE_ROUNDS), dict.fromkeys(configs, 0.0)
        for bits in {config["index_bits"] for config in configs}:
            alike = [config for config in configs if config["index_bits"] == bits]
            middle = sorted(alike, key=lambda config: config.stored_bits(layer).total)[len(alike) // 2]
            packed = short.compress(data, layer, middle).packed
            assert packed.lowrank is not None
            sample_NI, seen = sensitivity.sample(weight_OI - packed.lowrank.decode())
            rounded = {config: seen.cost(sample_NI - _rounded(sample_NI, config)) for config in alike}
            whole = sensitivity.cost(weight_OI - packed.decode())
            costs |= {config: cost * whole / (rounded[middle] or 1.0) for config, cost in rounded.items()}
        return [costs[config] for config in configs]

    def compress(self, data: LayerData, layer: LayerSpec, config: LayerConfig) -> Compressed:
        weighting = Weighting.of(data.fisher) if data.fisher is not None else None
        packed = config.layout(layer, data.weight_OI.device)
        tensors, report = decompose(
            data.weight_OI,
            packed,
            weighting,
            first=self.first,
            rounds=self.rounds,
            tolerance=self.tolerance,
            seed=data.seed,
        )
        packed.fill(**tensors)
        return Compressed(packed, report)


@dataclass(frozen=True)
class Weighting:
    """Errors E are measured as |diag(row) E diag(column)|: the root of the Fisher information, as far as it is a
    product."""

    row_O: Tensor
    column_I: Tensor

    @classmethod
    def of(cls, fisher: Sensitivity) -> Weighting:
        """Rows and columns that no gradient reached keep a little weight: their factors must stay finite, and in range
        of 8 bits."""
        return cls(*(_floored(mean.sqrt()) for mean in (fisher.row_O, fisher.column_I)))

    def __call__(self, matrix_OI: Tensor) -> Tensor:
        return self.row_O[:, None] * matrix_OI * self.column_I


def _floored(root: Tensor) -> Tensor:
    size = root.square().mean().sqrt()
    return (root / size).clamp_min(FLOOR) if size > 0 else torch.ones_like(root)


def decompose(
    weight_OI: Tensor,
    packed: PackedLinear,
    weighting: Weighting | None,
    *,
    first: str,
    rounds: int,
    tolerance: float,
    seed: int,
) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Buffers of `packed` (a laid out CodebookLinear with a low-rank part), and {rounds, relative_error}.

    Each half of a round fits one part to what the stored form of the other leaves. The low-rank half is the best there
    is for its norm; rounding is not, so the error may rise: then the loop ends, and the best round is kept."""
    assert isinstance(packed, CodebookLinear) and packed.lowrank is not None
    weigh: Callable[[Tensor], Tensor] = weighting or _plain
    norm = float(weigh(weight_OI).norm()) or 1.0
    parts = {name: torch.zeros_like(weight_OI) for name in FIRST}
    fit = {
        "lowrank": partial(_lowrank, packed=packed, weighting=weighting, seed=seed),
        "quantised": partial(_quantised, packed=packed),
    }
    order = (first, next(name for name in FIRST if name != first))
    best: dict[str, Tensor] = {}
    best_error, done = float("inf"), 0
    for done in range(1, rounds + 1):
        tensors: dict[str, Tensor] = {}
        for now, other in (order, order[::-1]):
            stored, parts[now] = fit[now](weight_OI - parts[other])
            tensors |= stored
        error = float(weigh(weight_OI - parts["lowrank"] - parts["quantised"]).norm()) / norm
        gain, previous = best_error - error, best_error
        if gain > 0:
            best, best_error = tensors, error
        if done > 1 and not gain > tolerance * previous:
            break
    return best, {"rounds": done, "relative_error": best_error}


def _plain(matrix_OI: Tensor) -> Tensor:
    """The weighting of a method that weighs all errors alike."""
    return matrix_OI


def _lowrank(
    rest_OI: Tensor, packed: CodebookLinear, weighting: Weighting | None, seed: int
) -> tuple[dict[str, Tensor], Tensor]:
    if weighting is None:
        return stored_lowrank(*svd_factors(rest_OI, packed.rank, None, seed), packed)
    left_OR, right_RI = svd_factors(weighting(rest_OI), packed.rank, None, seed)
    return stored_lowrank(left_OR / weighting.row_O[:, None], right_RI / weighting.column_I, packed)


def _quantised(rest_OI: Tensor, packed: CodebookLinear) -> tuple[dict[str, Tensor], Tensor]:
    """Nearest levels under absmax scales in their stored form; not weighted, as in the paper."""
    scales, codes_OI, decoded_OI = _nearest(rest_OI, packed.block, packed.scales.form, packed.index_bits)
    return packed.tensors(codes_OI, scales.stored), decoded_OI


def _rounded(rest_OI: Tensor, config: LayerConfig) -> Tensor:
    """What `rest_OI` decodes to in this configuration."""
    form = ScaleForm(config["scales"], config["scale_bits"], config["scale_group"], config["scale_dtype"])
    return _nearest(rest_OI, config["block"], form, config["index_bits"])[2]


def _nearest(rest_OI: Tensor, block: int, form: ScaleForm, bits: int) -> tuple[Scales, Tensor, Tensor]:
    """Scales, codes, and what they decode to."""
    scales = absmax_scales(rest_OI, block, form)
    levels = nf_levels(bits).to(rest_OI.device)
    codes_OI = nearest(rest_OI / scales.scale_OI, levels)
    return scales, codes_OI, levels[codes_OI] * scales.scale_OI


def _config(bits: int, scale_bits: int, dtype: str, block: int, group: int) -> LayerConfig:
    return LayerConfig.of(
        "codebook",
        dim=1,
        index_bits=bits,
        block=block,
        scales="double",
        scale_bits=scale_bits,
        scale_group=group,
        scale_dtype=dtype,
        table="nf",
    )
