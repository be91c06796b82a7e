"""Sums over calibration tokens that methods and sensitivities are computed from."""

from __future__ import annotations

from torch import Tensor


def add_gram(gram_II: Tensor, x_NI: Tensor, strip: int = 256) -> None:
    """Add x^T x to the upper triangle, in strips of rows: little more than half the work of the full product."""
    for start in range(0, len(gram_II), strip):
        gram_II[start : start + strip, start:].addmm_(x_NI[:, start : start + strip].t(), x_NI[:, start:])


def complete(gram_II: Tensor, strip: int = 256) -> Tensor:
    """The symmetric matrix whose upper triangle `add_gram` filled, in the same memory."""
    for start in range(0, len(gram_II), strip):
        corner_SS = gram_II[start : start + strip, start : start + strip]
        corner_SS.copy_(corner_SS.triu().add_(corner_SS.triu(1).t()))
        gram_II[start + strip :, start : start + strip] = gram_II[start : start + strip, start + strip :].t()
    return gram_II
