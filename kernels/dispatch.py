"""Which product runs on which format and device: one table, filled by the kernel packages.

A pair without an entry takes the reference path: decode the whole weight, multiply, forget it (or keep it, in a format whose
decoder is too slow to run for every product). What runs decides the *kind* a leaderboard row carries, so a latency can never be
attributed to a kernel that did not run.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from kernels.packed import PackedLinear

Product = Callable[[PackedLinear, Tensor], Tensor]
PRODUCTS: dict[tuple[str, str], Product] = {}  # (format, device type) -> fused product


def reference(layer: PackedLinear, x: Tensor) -> Tensor:
    """The oracle: y = x W^T + b with W decoded in fp32 and rounded once to the dtype of x."""
    bias = None if layer.bias is None else layer.bias.to(x.dtype)
    weight_OI = layer.loaded(x.dtype) if layer.decode_on_load else layer.decode().to(x.dtype)
    return torch.nn.functional.linear(x, weight_OI, bias)


def linear(layer: PackedLinear, x: Tensor) -> Tensor:
    return PRODUCTS.get((layer.format, x.device.type), reference)(layer, x)


def kind(layer: PackedLinear, device_type: str) -> str:
    """Row kind of this layer on this device: dense | fused | decode-per-call | decode-on-load."""
    if layer.format == "dense":
        return "dense"
    if (layer.format, device_type) in PRODUCTS:
        return "fused"
    return "decode-on-load" if layer.decode_on_load else "decode-per-call"
