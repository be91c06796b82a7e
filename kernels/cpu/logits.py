"""What is asked of rows of logits, in one go (logits.h): torch reads and writes them ten times for the same numbers."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from kernels.cpu.build import library

FIELDS = 5  # of eight bytes each: `Compared` of logits.h


class Compared(NamedTuple):
    """Of every row [N], fp64; divergences in nats, nothing where there is no reference."""

    lse_N: Tensor  # log of the sum of exponentials
    kld_N: Tensor  # KL(reference || model)
    reverse_N: Tensor  # KL(model || reference)
    highest_N: Tensor  # logit
    first_N: Tensor  # int64: where it stands


def compare(model_NV: Tensor, reference_NV: Tensor | None) -> Compared | None:
    """None where it cannot be had: on another device, without a compiler, or where a logit is not finite."""
    given = [rows_NV for rows_NV in (model_NV, reference_NV) if rows_NV is not None]
    if not all(t.device.type == "cpu" and t.dtype == torch.float32 and t.is_contiguous() for t in given):
        return None
    compiled = library()
    if compiled is None:
        return None
    count, vocabulary = model_NV.shape
    assert reference_NV is None or reference_NV.shape == model_NV.shape
    found_NF = torch.empty(count, FIELDS, dtype=torch.float64)
    other = None if reference_NV is None else reference_NV.data_ptr()
    compiled.compare(model_NV.data_ptr(), other, count, vocabulary, found_NF.data_ptr(), torch.get_num_threads())
    if not found_NF[:, 0].isfinite().all():
        return None
    lse_N, kld_N, reverse_N, highest_N, _ = found_NF.unbind(dim=1)
    return Compared(lse_N, kld_N, reverse_N, highest_N, found_NF.view(torch.int64)[:, 4])
