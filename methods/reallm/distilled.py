"""`reallm:distilled`: tuned block by block where `epochs` says so, and then everything that is stored in real numbers
trained end to end (methods.distilled)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from methods.distilled import Distils
from methods.reallm.blockwise import Blockwise


@dataclass(frozen=True, kw_only=True)
class Distilled(Distils, Blockwise):
    """Calibrated, then trained end to end."""

    version: ClassVar[int] = Blockwise.version + 1  # statistics of all text, a smaller step
    fewest_epochs: ClassVar[int] = 0

    epochs: int = 0
    distil_rate: float = 3e-4
