"""Sums over calibration tokens that methods and sensitivities are computed from."""

from __future__ import annotations

from torch import Tensor


def add_gram(gram_II: Tensor, x_NI: Tensor, strip: int = 256) -> None:
    """Add x^T x to the upper triangle, in strips of rows: little more than half the work of the full product."""
    for start in range(0, len(gram_II), strip):
        gram_II[start : start + strip, start:].addmm_(x_NI[:, start : start + strip].t(), x_NI[:, start:])


def completed(gram_II: Tensor) -> Tensor:
    """The symmetric matrix whose upper triangle `add_gram` filled."""
    return gram_II.triu().add_(gram_II.triu(1).t())
