"""What a method is: a frozen configuration, candidates with exact bits, and a rule that turns weights into packed
layers.

Shape suffixes used throughout: `O` out_features, `I` in_features, `G` groups of input columns, `K` codebook entries,
`D` vector length, `V` vectors down a column, `R` rank, `N` samples. Weights are [out_features, in_features]."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

from kernels.formats.layer import LayerConfig, LayerSpec
from kernels.formats.packed import PackedLinear
from kernels.formats.stored import StoredBits
from kernels.formats.tables import Table

SAMPLE_BANDS, BAND_ROWS = 4, 8  # of rows, for estimates; a band holds whole vectors of every codebook length


class Track(StrEnum):
    """What a method may look at; rows of different tracks are never ranked together."""

    DATA_FREE = "data-free"
    CALIBRATED = "calibrated"
    FINE_TUNED = "fine-tuned"


@dataclass(frozen=True)
class Needs:
    """Statistics the harness must collect before a layer can be compressed."""

    hessian: bool = False  # sum over calibration tokens of x x^T, fp32 [I, I]
    original: bool = False  # the uncompressed model's activations beside those behind the packed prefix
    fisher: bool = (
        False  # mean squares of the gradient of the language-modelling loss, per row and per column of every weight
    )


@dataclass(frozen=True)
class Adaptation:
    """How a method's low-rank factors are trained, by the one loop there is (harness.compress.training): what text, for
    how many steps and in what order is the run's affair, and the same for all."""

    rate: float  # of AdamW
    dora: bool = False  # magnitudes of the rows too (Liu et al., arXiv 2402.09353); they are stored as row scales


@dataclass(frozen=True)
class Sensitivity:
    """What an error E [O, I] of a layer's weights costs: 1/2 sum_o row_o sum_i column_i E_oi^2
    (harness.plan.sensitivity)."""

    row_O: Tensor
    column_I: Tensor

    @property
    def flat(self) -> Sensitivity:
        """The same for every weight of the layer."""
        return Sensitivity(*(torch.full_like(vector, vector.mean().item()) for vector in (self.row_O, self.column_I)))

    def cost(self, error_OI: Tensor) -> float:
        return 0.5 * float(self.row_O @ error_OI.square() @ self.column_I)

    def sample(self, weight_OI: Tensor) -> tuple[Tensor, Sensitivity]:
        """SAMPLE_BANDS evenly spaced bands of rows [R, I], and a sensitivity that stands for the whole matrix: the
        share of the weights' own cost that the sample carries is the share of an error's cost it is taken to carry."""
        rows = weight_OI.shape[0]
        if rows <= SAMPLE_BANDS * BAND_ROWS:
            return weight_OI, self
        start_Z = torch.linspace(0, rows - BAND_ROWS, SAMPLE_BANDS).long()
        row_N = (start_Z[:, None] + torch.arange(BAND_ROWS)).flatten().to(weight_OI.device)
        sample_NI, seen = weight_OI[row_N], Sensitivity(self.row_O[row_N], self.column_I)
        share = seen.cost(sample_NI) / (self.cost(weight_OI) or 1.0)
        return (sample_NI, Sensitivity(seen.row_O / share, self.column_I)) if share > 0 else (weight_OI, self)


class Block(Protocol):
    """One decoder block as a method sees it (harness.compress.block provides it)."""

    layers: Mapping[str, LayerSpec]
    tables: Mapping[str, Table]  # those the method fitted, by key

    def stages(self) -> list[list[str]]:
        """Layer names in the order data takes; layers of one stage share one input."""

    def weight(self, name: str) -> Tensor:
        """The original weight, fp32 [O, I]."""

    def hessian(self, name: str) -> Tensor:
        """fp32 [I, I]: sum of x x^T over calibration tokens, x computed by the block as it is now."""

    def drift(self, name: str) -> Tensor:
        """fp32 [I, I]: sum of (x' - x) x^T, x' being the uncompressed model's input. Only with `Needs.original`."""

    def fisher(self, name: str) -> Sensitivity:
        """Mean squared gradients as a product of rows and columns (harness.plan.sensitivity). Only with
        `Needs.fisher`."""

    def install(self, name: str, packed: Compressed) -> None:
        """Replace the layer; everything later in the block now runs on the packed one."""

    def lend(self, name: str, module: nn.Module) -> None:
        """Let `run` use this module in the layer's place, until the next `install`."""

    def restore(self, name: str) -> None:
        """Let `run` use the original layer, until the next `install`."""

    def run(self, hidden_NTH: Tensor) -> Tensor:
        """The block as it is now on hidden states in front of it, with gradients if they are wanted."""

    def windows(self) -> tuple[Tensor, Tensor]:
        """Hidden states [N, T, H] of the calibration tokens: in front of the block, as the packed prefix leaves them,
        and behind it in the uncompressed model. Only with `Needs.original`."""


@dataclass(frozen=True)
class Compressed:
    packed: PackedLinear
    report: dict[str, float] = field(
        default_factory=dict
    )  # anything worth a number: dead columns, damping used, rounds


@dataclass(frozen=True, kw_only=True)
class Method(ABC):
    """Subclasses are frozen dataclasses: their fields are the method's configuration, None meaning "the budget
    decides"."""

    name: ClassVar[str]
    version: ClassVar[int]  # part of every key: bump it when the same configuration would store other bytes
    variants: ClassVar[dict[str, dict[str, Any]]] = {}  # name -> field overrides

    track: ClassVar[Track]  # a property where it depends on the configuration
    budgeted: ClassVar[bool] = True  # False for a reference, which runs once, outside any budget
    seeded: ClassVar[bool] = (
        True  # whether the seed can change a byte: through calibration text, or the method's own draws
    )

    later: ClassVar[tuple[str, ...]] = ("lora_rate",)  # options that matter only once the blocks are packed

    def __post_init__(self) -> None:  # noqa: B027  nothing to check is the usual case
        """Raises ValueError for a configuration that makes no sense."""

    @property
    def needs(self) -> Needs:
        return Needs()

    @property
    def adaptation(self) -> Adaptation | None:
        """None: nothing is trained once the blocks are packed."""
        return None

    @property
    def variant(self) -> str:
        """The named variant this configuration is, or "" for the default or any other configuration."""
        return next((name for name, over in self.variants.items() if type(self)(**over) == self), "")

    @abstractmethod
    def candidates(self, layer: LayerSpec) -> list[LayerConfig]:
        """Configurations this method could store for the layer, from its shape alone."""

    def family(self, config: LayerConfig) -> LayerConfig:
        """What the configurations of unlike layers share where one is to serve a whole model: by default all of it."""
        return config

    def mixed_candidates(self, layer: LayerSpec) -> list[LayerConfig]:
        """Those of `candidates` worth mixing over the layers of one model; fine steps in between are what mixing is
        for."""
        return self.candidates(layer)

    def expected_costs(
        self, weight_OI: Tensor, sensitivity: Sensitivity, layer: LayerSpec, configs: Sequence[LayerConfig], seed: int
    ) -> list[float]:
        """Predicted divergence (harness.plan.sensitivity) of packing the layer with each configuration.

        Here by packing a sample of its rows for real, with a diagonal Hessian; methods estimate what takes them longer.
        """
        sample_NI, seen = sensitivity.sample(weight_OI)
        few = dataclasses.replace(layer, out_features=len(sample_NI))
        hessian_II = sensitivity.column_I.diag() if self.needs.hessian else None
        return [
            seen.cost(sample_NI - self.compress(sample_NI, hessian_II, few, config, seed).packed.decode())
            for config in configs
        ]

    def preference(self, config: LayerConfig, bits: StoredBits, weights: int) -> tuple[float, ...]:
        """Order among configurations that serve a whole model of `weights` weights with `bits`: index bits, then all
        bits."""
        return (bits.codes / weights, bits.total / weights)

    def fit_tables(
        self, plan: Mapping[str, LayerConfig], layers: Sequence[LayerSpec], weight: Callable[[str], Tensor], seed: int
    ) -> dict[str, Table]:
        """The tables that the plan's layers share, by key, from the original weights [O, I] that `weight(name)`
        gives."""
        return {}

    @abstractmethod
    def compress(
        self, weight_OI: Tensor, hessian_II: Tensor | None, layer: LayerSpec, config: LayerConfig, seed: int
    ) -> Compressed:
        """Pack one matrix. `hessian_II` is None unless `needs.hessian`; `seed` is already specific to the layer."""

    def compress_block(self, block: Block, plan: Mapping[str, LayerConfig], seed: int) -> None:
        """Pack the layers of a block in true-sequential order: later stages see the packed earlier ones."""
        for stage in block.stages():
            hessian_II = block.hessian(stage[0]) if self.needs.hessian else None
            for name in stage:
                self._install(block, name, hessian_II, plan[name], seed)

    def _install(self, block: Block, name: str, hessian_II: Tensor | None, config: LayerConfig, seed: int) -> None:
        layer = block.layers[name]
        block.install(name, self.compress(block.weight(name), hessian_II, layer, config, layer_seed(seed, name)))

    def to_json(self) -> dict[str, Any]:
        return {"method": self.name, "version": self.version, **dataclasses.asdict(self)}

    def estimates_key(self) -> dict[str, Any]:
        """What `expected_costs` may depend on."""
        return {key: value for key, value in self.to_json().items() if key not in self.later}


def layer_seed(seed: int, name: str) -> int:
    """A seed of its own for every layer: results do not depend on the order layers are visited or resumed in."""
    return int.from_bytes(hashlib.sha256(json.dumps([seed, name]).encode()).digest()[:6])
