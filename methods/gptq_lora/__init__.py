"""GPTQ-LoRA: LoRA on a frozen GPTQ base, the baseline LQ-LoRA compares itself with (Guo et al., arXiv 2311.12023, sec.
4).

The base is `gptq` (methods.gptq) with its own defaults. Adapters start at zero and are trained; `README.md` beside this
file lists the divergences."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from methods.adapted import Adapted
from methods.base import Method
from methods.gptq import GPTQ


@dataclass(frozen=True, kw_only=True)
class GPTQLoRA(Adapted, GPTQ):
    """GPTQ with adapters that start at zero."""

    name: ClassVar[str] = "gptq-lora"
    version: ClassVar[int] = 3

    @classmethod
    def variants(cls) -> dict[str, Method]:
        # Groups of 128 with an integer zero point: 3 + 19/128 = 3.148 bits, LQ-LoRA's table.
        base = cls(bits=3, group=128, offset="zero", damp=0.1, shrink=0.0, act_order=False, grid="minmax", follow=0.0)
        return {"published": replace(base, rank=64, adapter_bits=16)}
