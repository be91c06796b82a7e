"""Trellis-coded quantisation of rotated weights, with error feedback: kin of QTIP (Tseng, Sun, Hou, De Sa, arXiv
2406.11235).

    incoherence   inputs rotated by a Hadamard-Hartley transform with random signs      kernels.formats.rotation
    code          windows of 12 bits that slide down a column, computed levels          kernels.formats.trellis
    rounding      the best path for every column, errors fed back after each            methods.codecs.trellis

Divergences from QTIP: inputs alone are rotated (rotating outputs too gained nothing: relative error .691 against .660
of the same reference); the path runs down a whole column and not through tiles of 16 x 16, so that nothing has to
bite its tail and feedback is GPTQ's; windows of 12 bits, not 16; levels by a multiplication and 256 integers; a scale
for each row; fine-tuning is that of the scales (`trellis:distilled`). Each matrix has its own rate, of eight, as the
allocation decides.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from kernels.formats.trellis import WINDOWS, TrellisLinear
from methods.base import Compressed, LayerConfig, LayerData, LayerSpec, Method, Needs, Sensitivity, Track
from methods.codecs.basis import turned
from methods.codecs.drift import check_follow, followed
from methods.codecs.error_feedback import check_damp, check_shrink, prepare, shrunk
from methods.codecs.trellis import CODES, expected_cost, quantise_paths
from methods.distilled import Distils


@dataclass(frozen=True, kw_only=True)
class Trellis(Method):
    """Paths through a trellis, column by column, under the Hessian of rotated inputs."""

    name: ClassVar[str] = "trellis"
    version: ClassVar[int] = 2  # correlations of inputs are shrunk
    track: ClassVar[Track] = Track.CALIBRATED
    later: ClassVar[tuple[str, ...]] = (*Method.later, "shrink")

    bits: float | None = None
    window: int = 12
    act_order: bool = True
    damp: float = 0.1
    shrink: float = 0.15  # share of every column's own diag(H) added to it
    follow: float = 0.5  # share of the inputs' drift that weights take back

    def __post_init__(self) -> None:
        check_damp(self.damp)
        check_shrink(self.shrink)
        rates = [bits / dim for bits, dim in CODES]
        if self.bits not in (None, *rates):
            raise ValueError(f"bits={self.bits:g} is not one of {', '.join(f'{rate:g}' for rate in rates)}")
        if self.window not in WINDOWS:
            raise ValueError(f"window must be {WINDOWS[0]} to {WINDOWS[-1]}")
        check_follow(self.follow)

    @classmethod
    def variants(cls) -> dict[str, Method]:
        return {"distilled": Distilled()}

    @property
    def needs(self) -> Needs:
        return Needs(hessian=True, drift=self.follow > 0)

    def candidates(self, layer: LayerSpec) -> list[LayerConfig]:
        return [
            LayerConfig.of("trellis", bits=bits, dim=dim, window=self.window, rotated=True)
            for bits, dim in CODES
            if self.bits in (None, bits / dim)
        ]

    def expected_costs(
        self, weight_OI: Tensor, sensitivity: Sensitivity, layer: LayerSpec, configs: Sequence[LayerConfig], seed: int
    ) -> list[float]:
        return [expected_cost(weight_OI, sensitivity, c["bits"], c["dim"], c["window"]) for c in configs]

    def compress(self, data: LayerData, layer: LayerSpec, config: LayerConfig) -> Compressed:
        assert data.hessian_II is not None
        packed = config.layout(layer, data.weight_OI.device)
        assert isinstance(packed, TrellisLinear)
        target_OI, hessian_II = data.weight_OI, shrunk(data.hessian_II, self.shrink)
        if data.drift_II is not None:
            target_OI = followed(target_OI, hessian_II, data.drift_II, self.follow)
        target_OI, hessian_II, rotation = turned(packed, target_OI, hessian_II, data.seed)
        feedback = prepare(hessian_II, act_order=self.act_order, damp=self.damp)
        packed.fill(**rotation, **quantise_paths(target_OI, packed, feedback))
        return Compressed(packed, {"dead_columns": feedback.dead, "damp": feedback.damp})


@dataclass(frozen=True, kw_only=True)
class Distilled(Distils, Trellis):
    """The scales of rows are trained afterwards."""

    version: ClassVar[int] = Trellis.version + 1  # statistics of all text, a smaller step

    distil_rate: float = 3e-4
