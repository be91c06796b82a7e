"""An ingredient that any method may take: once all is packed, the real numbers that it stores are trained end to end
against the uncompressed model, by the loop of the fine-tuned track (harness.compress.training). Codes stay, nothing is
added, so a cell has the bits and the plan that it had without. Before, its statistics are of all the text that the
track may see, calibration and training: codes are most of what there is to fit, and more text fits them better than it
trains scales (docs/methods.md, "Fine-tuned methods")."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from methods.adapted import check_rate
from methods.base import Adaptation, Method, Needs, Track


@dataclass(frozen=True, kw_only=True)
class Distils(Method):
    """A mixin: the method it is combined with, and its numbers trained."""

    algorithm: ClassVar[str] = "distilled"
    track: ClassVar[Track] = Track.FINE_TUNED
    seeded: ClassVar[bool] = True

    distil_rate: float = 1e-3  # of AdamW, in units of each number's size (methods.trained_numbers)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_rate(self.distil_rate, "distil_rate")

    @property
    def needs(self) -> Needs:
        return replace(super().needs, training_text=True)

    @property
    def adaptation(self) -> Adaptation:
        return Adaptation(rate=self.distil_rate, whole=True)
