"""Matrix product operators (CompactifAI: Tomut et al., arXiv 2401.14109): every matrix cut into small tensors, with
bonds of at most chi between them.

    decomposition       a matrix as a chain of tensors, by sequential SVDs     methods.codecs.mpo, kernels.formats.mpo
    truncation          bond dimension chi says how much is kept               `candidates`
    profiling           layers are chosen by how sensitive they are            the plan: chi, or 16 bits as it was
    healing             less than an epoch of training                         `mpo:healed`, the one training loop
    precision           16 bits for the tensors' numbers                       16 bits, or 8 with a scale per component

Where it departs from the paper: README.md. `mpo` itself looks at no text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from kernels.formats.mpo import MpoLinear, full_bond
from methods.base import Compressed, LayerConfig, LayerData, LayerSpec, Method, Sensitivity, Track
from methods.codecs.mpo import decompose
from methods.distilled import Distils
from methods.factored import DENSE, check_bits, in_steps

CORE_BITS = (16, 8)
MAX_SITES = 6
STEP = 4  # between bond dimensions
FINEST, MIXED = 96, 18  # bond dimensions of a matrix at most, and of those that are mixed over the layers of a model


@dataclass(frozen=True, kw_only=True)
class MPO(Method):
    """Cores of a matrix product operator."""

    name: ClassVar[str] = "mpo"
    version: ClassVar[int] = 1
    track: ClassVar[Track] = Track.DATA_FREE
    seeded: ClassVar[bool] = False
    reach: ClassVar[float] = 64.0  # as factors (methods.factored)

    chi: int | None = None  # bond dimension of every matrix that can use as much; None: the plan's, or 16 bits whole
    bits: int | None = None  # of a number of the cores
    sites: int = 3

    def __post_init__(self) -> None:
        if self.chi is not None and self.chi < 1:
            raise ValueError("chi must be at least 1")
        check_bits(self.bits, CORE_BITS)
        if not 2 <= self.sites <= MAX_SITES:
            raise ValueError(f"sites must be 2 to {MAX_SITES}")

    @classmethod
    def variants(cls) -> dict[str, Method]:
        return {"healed": Healed()}

    def candidates(self, layer: LayerSpec) -> list[LayerConfig]:
        return self._configs(layer, FINEST)

    def mixed_candidates(self, layer: LayerSpec) -> list[LayerConfig]:
        return self._configs(layer, MIXED)

    def _configs(self, layer: LayerSpec, most: int) -> list[LayerConfig]:
        full = full_bond(layer.out_features, layer.in_features, self.sites)
        chosen = in_steps(full, STEP, most) if self.chi is None else [min(self.chi, full)]
        cores = [
            LayerConfig.of("mpo", chi=chi, bits=bits, sites=self.sites)
            for bits in (CORE_BITS if self.bits is None else (self.bits,))
            for chi in chosen
        ]
        return cores if self.chi is not None else [*cores, DENSE]

    def expected_costs(
        self, weight_OI: Tensor, sensitivity: Sensitivity, layer: LayerSpec, configs: Sequence[LayerConfig], seed: int
    ) -> list[float]:
        """Of the whole matrix, for no sample of rows has the same sites; one decomposition for each chi."""
        costs, cores_of = {}, {}
        for config in configs:
            packed = config.layout(layer, weight_OI.device)
            if isinstance(packed, MpoLinear):
                if config["chi"] not in cores_of:
                    cores_of[config["chi"]] = decompose(weight_OI, packed)
                packed.fill(**packed.tensors(cores_of[config["chi"]]))
            else:
                packed.fill(weight=weight_OI.half())
            costs[config] = sensitivity.cost(weight_OI - packed.decode())
        return [costs[config] for config in configs]

    def compress(self, data: LayerData, layer: LayerSpec, config: LayerConfig) -> Compressed:
        packed = config.layout(layer, data.weight_OI.device)
        if isinstance(packed, MpoLinear):
            packed.fill(**packed.tensors(decompose(data.weight_OI, packed)))
        else:
            packed.fill(weight=data.weight_OI.half())
        return Compressed(packed)


@dataclass(frozen=True, kw_only=True)
class Healed(Distils, MPO):
    """Cores that are trained afterwards, all of their numbers."""

    algorithm: ClassVar[str] = "healed"
    version: ClassVar[int] = MPO.version + 1  # steps are relative to a core's numbers
