"""QLoRA (Dettmers, Pagnoni, Holtzman, Zettlemoyer; NeurIPS 2023, arXiv 2305.14314): LoRA on a frozen NormalFloat base.

The base is `nf` (methods.nf): NF-b with block scales in 8 bits. Adapters on every linear layer start at zero and are
trained; `README.md` beside this file lists the divergences."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from methods.adapted import Adapted
from methods.base import Method
from methods.nf import NormalFloat


@dataclass(frozen=True, kw_only=True)
class QLoRA(Adapted, NormalFloat):
    """NormalFloat with adapters that start at zero."""

    name: ClassVar[str] = "qlora"
    version: ClassVar[int] = 2

    @classmethod
    def variants(cls) -> dict[str, Method]:
        return {"published": cls(bits=4, block=64, rank=64, adapter_bits=16)}
