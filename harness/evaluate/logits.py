"""What scoring asks of logits: loss, both divergences, and which token is first."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.cpu import logits as cpu
from kernels.cpu.logits import Compared


def compare(model_NV: Tensor, reference_NV: Tensor | None) -> Compared:
    """Of rows of a model's logits and of the reference's. Overwrites `reference_NV`."""
    return cpu.compare(model_NV, reference_NV) or by_torch(model_NV, reference_NV)


def by_torch(model_NV: Tensor, reference_NV: Tensor | None) -> Compared:
    """sum p (a - b) - lse(a) + lse(b) for logits a, b and p = softmax(a), and its mirror image with q = softmax(b):
    two passes fewer than through log_softmax. Overwrites `reference_NV`."""
    lse_N = model_NV.logsumexp(dim=-1)
    highest_N, first_N = model_NV.max(dim=-1)
    kld_N = reverse_N = torch.full_like(lse_N, torch.nan)
    if reference_NV is not None:
        reference_lse_N = reference_NV.logsumexp(dim=-1)
        difference_NV = reference_NV - model_NV
        offset_N = lse_N - reference_lse_N
        p_NV = reference_NV.sub_(reference_lse_N[:, None]).exp_()
        kld_N = torch.linalg.vecdot(p_NV, difference_NV) + offset_N
        q_NV = torch.sub(model_NV, lse_N[:, None], out=p_NV).exp_()
        reverse_N = -torch.linalg.vecdot(q_NV, difference_NV) - offset_N
    lse_N, kld_N, reverse_N, highest_N = (t.double().cpu() for t in (lse_N, kld_N, reverse_N, highest_N))
    return Compared(lse_N, kld_N, reverse_N, highest_N, first_N.cpu())
