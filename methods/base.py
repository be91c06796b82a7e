"""What a method is: a frozen configuration, candidates with exact bits, and a rule that turns a weight into a packed
layer.

The contract, in the order the harness calls it:

    candidates        what a layer may be stored as, from its shape alone
    expected_costs    what each of them is expected to cost
    needs             which statistics of the calibration tokens `compress` wants
    fit_tables        tables that layers share, if any
    compress          one layer: everything measured about it comes in one `LayerData`
    tune_block        a packed block as a whole, if `needs.outputs`

CONTRIBUTING.md has the legend of shape suffixes.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from functools import cache
from types import ModuleType
from typing import ClassVar, Protocol

import torch
from torch import Tensor, nn

from kernels.formats.bits import FULL, StoredBits
from kernels.formats.layer import LayerConfig, LayerSpec
from kernels.formats.packed import PackedLinear
from kernels.formats.tables import Table

__all__ = [
    "Adaptation",
    "Block",
    "Compressed",
    "Inputs",
    "LayerConfig",
    "LayerData",
    "LayerSpec",
    "Method",
    "Needs",
    "Pooled",
    "Sensitivity",
    "Track",
    "layer_seed",
]

Option = str | int | float | bool | None  # value of a method's option, or of a configuration's
SAMPLE_BANDS, BAND_ROWS = 4, 8  # of rows, for estimates; a band holds whole vectors of every codebook length


class Track(StrEnum):
    """What a method may look at; rows of different tracks are never ranked together."""

    DATA_FREE = "data-free"
    CALIBRATED = "calibrated"
    FINE_TUNED = "fine-tuned"
    DELTA = (
        "delta"  # what is stored is the difference of two models, of which the tuned one is what a row is held against
    )
    IMPORTED = "imported"  # made by another program, which does not say


@dataclass(frozen=True)
class Needs:
    """Statistics the harness collects before a layer is compressed; what is not asked for is None in `LayerData`."""

    hessian: bool = False
    drift: bool = False
    fisher: bool = False
    fisher_prices: bool = False  # errors are weighed with the Fisher information when an allocation is made, too
    pooled: bool = False  # mean and covariance of the inputs, windows apart
    inputs: bool = False  # their peaks, and some of them as they are
    outputs: bool = False  # the uncompressed model's outputs of every block, for `Method.tune_block`
    training_text: bool = False  # all of this is of the windows it will be trained on too (up to a limit)
    true_sequential: bool = True  # statistics behind the packed earlier layers of the same block, not the original ones

    @property
    def original(self) -> bool:
        """Whether the uncompressed model's activations are carried along beside those behind the packed prefix."""
        return self.drift or self.outputs

    @property
    def text(self) -> bool:
        """Whether anything is computed from calibration tokens."""
        return self.hessian or self.pooled or self.inputs or self.fisher or self.fisher_prices or self.original

    @property
    def sensitivity(self) -> str:
        """What an error is weighed with when costs are estimated (harness.plan.sensitivity.MEASURES)."""
        return "fisher" if self.fisher_prices else "feedback" if self.hessian or self.pooled else "plain"


@dataclass(frozen=True)
class Pooled:
    """How the inputs of a layer are distributed, fp32: the mean over windows of their means [I] and of their
    covariances [I, I], each about its window's own mean."""

    mean_I: Tensor
    covariance_II: Tensor


@dataclass(frozen=True)
class Inputs:
    """What reaches a layer behind the packed prefix, fp32."""

    peak_I: Tensor  # the largest magnitude over all calibration tokens
    sample_NI: Tensor  # of some of them, evenly spaced


@dataclass(frozen=True)
class LayerData:
    """Everything measured about one layer: the one argument through which statistics reach a method."""

    weight_OI: Tensor  # the original weight, fp32
    seed: int = 0  # the layer's own
    # The sum of x x^T over calibration tokens, fp32; x is the input behind the packed prefix.
    hessian_II: Tensor | None = None
    drift_II: Tensor | None = None  # fp32, sum of (x' - x) x^T; x' is the uncompressed model's input
    pooled: Pooled | None = None  # of the inputs behind the packed prefix
    fisher: Sensitivity | None = None  # mean squared gradient of the language-modelling loss, as rows x columns
    table: Table | None = None  # the shared table the layer's configuration names
    inputs: Inputs | None = None
    act_bits: int = FULL  # what the packed layer will round its inputs to


@dataclass(frozen=True, kw_only=True)
class Adaptation:
    """How a method's low-rank factors are trained, by the one loop there is (harness.compress.training): what text, for
    how many steps and in what order is the run's affair, and the same for all."""

    rate: float  # of AdamW
    dora: bool = False  # magnitudes of the rows too (Liu et al., arXiv 2402.09353); they are stored as row scales
    whole: bool = False  # not factors beside what is packed, but its own numbers (methods.trained_numbers)

    @property
    def option(self) -> str:
        """The method's option that the rate comes from."""
        return "distil_rate" if self.whole else "lora_rate"


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
        """SAMPLE_BANDS evenly spaced bands of rows [N, I], and a sensitivity that stands for the whole matrix: the
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
    """One packed decoder block as `Method.tune_block` sees it (harness.compress.block provides it)."""

    def lend(self, name: str, module: nn.Module) -> None:
        """Let `run` use this module in the layer's place."""

    def restore(self, name: str) -> None:
        """Let `run` use the original layer."""

    def weight(self, name: str) -> Tensor:
        """The layer's original weight, fp32 [O, I]."""

    def run(self, hidden_NTH: Tensor) -> Tensor:
        """The block as it is now on hidden states in front of it, with gradients if they are wanted."""

    def windows(self) -> tuple[Tensor, Tensor]:
        """Hidden states [N, T, H] of the calibration tokens: in front of the block, as the packed prefix leaves them,
        and behind it in the uncompressed model."""


@dataclass(frozen=True)
class Compressed:
    """A packed layer, and anything about its making that is worth a number: dead columns, damping used, rounds."""

    packed: PackedLinear
    report: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Method(ABC):
    """A method and its configuration: subclasses are frozen dataclasses, their fields the options, None meaning "the
    budget decides".

    `version` is part of every key, as are the `VERSION`s of the codecs a method uses (`codec_versions`): bump whichever
    changed when the same configuration would store other bytes. An option that is added with its default changes no
    key."""

    name: ClassVar[str]
    version: ClassVar[int]
    algorithm: ClassVar[str] = ""  # the variant this class is the default configuration of; "" for the method's default

    track: ClassVar[Track]
    budgeted: ClassVar[bool] = True  # False for a reference, which runs once, outside any budget
    # Whether the seed can change a byte: through calibration text, or the method's own draws.
    seeded: ClassVar[bool] = True
    later: ClassVar[tuple[str, ...]] = ("lora_rate", "distil_rate")  # options that no estimate of a cost depends on

    # Bits per weight from the budget beyond which a configuration is not considered for any layer.
    reach: ClassVar[float] = 2.0

    def __post_init__(self) -> None:  # noqa: B027  nothing to check is the usual case
        """Raises ValueError for a configuration that makes no sense."""

    @classmethod
    def variants(cls) -> dict[str, Method]:
        """Named configurations, of this class or of others of the same method."""
        return {}

    @property
    def variant(self) -> str:
        """The name of this configuration among `variants`, or ""."""
        return next((name for name, method in self.variants().items() if method == self), "")

    @property
    def changed(self) -> dict[str, Option]:
        """Options that differ from their defaults, by name."""
        default = type(self)()
        names = sorted(option.name for option in dataclasses.fields(self))
        return {name: getattr(self, name) for name in names if getattr(self, name) != getattr(default, name)}

    @property
    def text(self) -> str:
        """What to type for exactly this configuration: `methods.parse_method` reads it back."""
        options = [f"{name}={spelling(value)}" for name, value in self.changed.items()]
        return ":".join(filter(None, (self.name, ",".join(filter(None, (self.algorithm, *options))))))

    def identity(self, without: Sequence[str] = ()) -> dict[str, object]:
        """Everything about the method that can change a stored byte, as JSON for a key; `without` leaves options
        out."""
        left_out = {name: getattr(type(self)(), name) for name in without if hasattr(self, name)}
        codecs = codec_versions(type(self))
        identity: dict[str, object] = {"method": dataclasses.replace(self, **left_out).text, "version": self.version}
        return identity | ({"codecs": codecs} if codecs else {})

    @property
    def packs_differences(self) -> bool:
        """Whether the weights it packs may be the difference of two models (`--base`); those of the delta track pack
        nothing else."""
        return self.track == Track.DELTA

    @property
    def needs(self) -> Needs:
        return Needs()

    @property
    def adaptation(self) -> Adaptation | None:
        """None: nothing is trained once the blocks are packed."""
        return None

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

    def preference(self, config: LayerConfig, bits: StoredBits, weights: int) -> tuple[float, ...]:
        """Order among configurations that serve a whole model of `weights` weights with `bits`: index bits, then all
        bits."""
        return (bits.codes / weights, bits.total / weights)

    def expected_costs(
        self, weight_OI: Tensor, sensitivity: Sensitivity, layer: LayerSpec, configs: Sequence[LayerConfig], seed: int
    ) -> list[float]:
        """Predicted divergence (harness.plan.sensitivity) of packing the layer with each configuration.

        Here by packing a sample of its rows for real, with a diagonal Hessian; methods estimate what takes them longer.
        """
        sample_NI, seen = sensitivity.sample(weight_OI)
        few_rows = dataclasses.replace(layer, out_features=len(sample_NI))
        data = LayerData(sample_NI, seed, sensitivity.column_I.diag() if self.needs.hessian else None)
        return [seen.cost(sample_NI - self.compress(data, few_rows, config).packed.decode()) for config in configs]

    def fit_tables(
        self,
        configs: Mapping[str, LayerConfig],
        layers: Sequence[LayerSpec],
        weight: Callable[[str], Tensor],
        seed: int,
    ) -> dict[str, Table]:
        """The tables that layers of these configurations share, by key, from the original weights [O, I] that
        `weight(name)` gives."""
        return {}

    @abstractmethod
    def compress(self, data: LayerData, layer: LayerSpec, config: LayerConfig) -> Compressed:
        """Pack one matrix. Raises ValueError when its statistics are of no use (not finite, not definite)."""

    def tune_block(self, block: Block, packed: Mapping[str, PackedLinear], seed: int) -> dict[str, float]:
        """Train the stored numbers of a packed block in place; returns what is to be added to every layer's report.
        Called only with `needs.outputs`."""
        raise AssertionError(f"{type(self).__name__} needs outputs and must define tune_block()")


def spelling(value: object) -> str:
    """An option's value as it is typed."""
    return "auto" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def layer_seed(seed: int, name: str) -> int:
    """A seed of its own for every layer: results do not depend on the order layers are visited or resumed in."""
    return int.from_bytes(hashlib.sha256(json.dumps([seed, name]).encode()).digest()[:6])


@cache
def codec_versions(method: type[Method]) -> dict[str, int]:
    """The `VERSION`s above 1 of all modules that decide what `method` stores, by name: a change of shared code reaches
    every method that uses it, whoever forgot to say so.

    Those are its own modules and what they import, at module level, from `methods` and the formats. A module without
    a `VERSION` is at 1, and one at 1 is left out: a codec's first change does not touch the keys of methods without it.
    A module is found through a function or class that is imported from it, not through its constants.
    """
    own = (sys.modules[cls.__module__] for cls in method.__mro__ if issubclass(cls, Method))
    found: dict[str, int] = {}
    seen: set[str] = set()
    waiting = [module for module in own if module.__name__ != __name__]
    while waiting:
        module = waiting.pop()
        if module.__name__ in seen:
            continue
        seen.add(module.__name__)
        if (version := getattr(module, "VERSION", 1)) != 1:
            found[module.__name__.rpartition(".")[2]] = version
        waiting += [other for other in _imported(module) if other.__name__ not in seen]
    return dict(sorted(found.items()))


def _imported(module: ModuleType) -> Iterator[ModuleType]:
    """Modules of `methods` and of the formats that a module takes names from."""
    formats = PackedLinear.__module__.rpartition(".")[0]
    packages = (__name__.rpartition(".")[0] + ".", formats + ".")
    # What every method imports says nothing of what one stores.
    common = (__name__, LayerConfig.__module__)
    for value in list(vars(module).values()):
        name = value.__name__ if isinstance(value, ModuleType) else getattr(value, "__module__", None)
        if isinstance(name, str) and name.startswith(packages) and name not in common and name in sys.modules:
            yield sys.modules[name]
