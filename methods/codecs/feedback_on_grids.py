"""GPTQ's column loop on grids that were placed before it (arXiv 2210.17323; "static groups" of the released code)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from methods.codecs.error_feedback import Feedback, run


def codes_on_grids(
    weight_OI: Tensor,
    feedback: Feedback,
    scale_IO: Tensor,
    base_IO: Tensor,
    tops: Sequence[int | Tensor],
    first_O: Tensor | None = None,
) -> Tensor:
    """Codes, fp32 [I, O], of every column on a grid of its own: levels base + scale * q, q from 0 to the column's top,
    one for all rows or fp32 [O]. `first_O` as in `error_feedback.run`."""
    codes_IO = torch.empty_like(scale_IO)

    def quantise(position: int, column: int, values_O: Tensor) -> Tensor:
        return round_column(values_O, scale_IO[column], base_IO[column], tops[column], codes_IO[column])

    run(weight_OI, feedback, quantise, first_O=first_O)
    return codes_IO


def round_column(values_O: Tensor, scale_O: Tensor, base_O: Tensor, top: int | Tensor, codes_O: Tensor) -> Tensor:
    """Nearest level of every row's grid; writes the codes and returns the decoded values."""
    torch.sub(values_O, base_O, out=codes_O).div_(scale_O).round_()
    if isinstance(top, int):
        codes_O.clamp_(0, top)
    else:
        torch.minimum(codes_O.clamp_(min=0), top, out=codes_O)
    return codes_O * scale_O + base_O
