"""Budgets: stored bits per weight, exactly as the user wrote them."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction


@dataclass(frozen=True)
class Budget:
    text: str  # as the user wrote it
    bpw: Fraction

    @classmethod
    def parse(cls, text: str) -> Budget:
        return cls(text.strip(), parse_budget(text))


def parse_budget(text: str) -> Fraction:
    """Stored bits per weight, exactly as written. Raises ValueError."""
    try:
        budget = Fraction(text.strip())
    except (ValueError, ZeroDivisionError):
        raise ValueError(f"'{text}' is not a number of bits per weight; write for example --bits 3.25") from None
    if not 0 < budget <= 16:
        raise ValueError(f"a budget of {text} bits per weight is outside (0, 16]")
    return budget
