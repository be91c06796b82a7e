"""Budgets: stored bits per weight, exactly as the user wrote them."""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction

MODES = ("ilp", "bayes", "uniform")  # of allocation
MIXED = ("ilp", "bayes")  # give every matrix its own configuration, from estimates that need the weights


@dataclass(frozen=True)
class Budget:
    text: str  # as the user wrote it
    bpw: Fraction

    @classmethod
    def parse(cls, text: str) -> Budget:
        return cls(text.strip(), parse_budget(text))


def parse_budget(text: str) -> Fraction:
    """Stored bits per weight, exactly as written. Raises ValueError."""
    if not re.fullmatch(r"[0-9]{1,4}(\.[0-9]{0,20})?|\.[0-9]{1,20}|[0-9]{1,9}/0*[1-9][0-9]{0,8}", text.strip()):
        raise ValueError(f"'{text[:40]}' is not a number of bits per weight; write for example --bits 3.25")
    budget = Fraction(text.strip())
    if not 0 < budget <= 16:
        raise ValueError(f"a budget of {text} bits per weight is outside (0, 16]")
    return budget
