"""Activations of a few bits: every token's inputs on a uniform grid of its own.

    step = (max(x, 0) - min(x, 0)) / (2**bits - 1)      x ~ step * (q - zero),  q in [0, 2**bits)

Dynamic, per token and asymmetric, as QLLM (arXiv 2310.08041) and OmniQuant (arXiv 2308.13137) evaluate W4A8 and W4A4.
Zero is always a level, so that what was zero stays so. Nothing of it is stored: a layer's description holds the number
of bits alone."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.formats.bits import FULL


def quantised(x: Tensor, bits: int) -> Tensor:
    """x [..., I] as `bits`-wide numbers stand for it, in its dtype; the gradient passes straight through."""
    if bits == FULL:
        return x
    wide = x.detach().float()
    low, high = wide.amin(dim=-1, keepdim=True).clamp_max(0), wide.amax(dim=-1, keepdim=True).clamp_min(0)
    step = (high - low) / (2**bits - 1)
    step = torch.where(step > 0, step, 1.0)  # a token of zeros
    zero = torch.round(-low / step)
    code = torch.round(wide / step).add_(zero).clamp_(0, 2**bits - 1)
    rounded = code.sub_(zero).mul_(step).to(x.dtype)
    return x + (rounded - x).detach() if x.requires_grad and torch.is_grad_enabled() else rounded
