"""Which product runs on which format and device: one table, filled by the kernel packages.

A pair without an entry, or a layer that its kernel does not serve, takes the reference path: decode the whole weight,
multiply, forget it (or keep it, in a format whose decoder is too slow to run for every product). What runs decides the
*kind* a leaderboard row carries, so a latency can never be attributed to a kernel that did not run. So does a product
that gradients must pass through."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from kernels.formats.packed import PackedLinear

Product = Callable[[PackedLinear, Tensor], Tensor]


@dataclass(frozen=True)
class Fused:
    product: Product
    serves: Callable[[PackedLinear], bool]  # the layer's layout is known to it, and it can be had on this machine


PRODUCTS: dict[tuple[str, str], Fused] = {}  # (format, device type) -> fused product


def reference(layer: PackedLinear, x: Tensor) -> Tensor:
    """The oracle: y = x W^T + b with W decoded in fp32 and rounded once to the dtype of x."""
    bias = None if layer.bias is None else layer.bias.to(x.dtype)
    weight_OI = layer.loaded(x.dtype) if layer.decode_on_load else layer.decode().to(x.dtype)
    return torch.nn.functional.linear(x, weight_OI, bias)


def linear(layer: PackedLinear, x: Tensor) -> Tensor:
    product = None if x.requires_grad and torch.is_grad_enabled() else fused(layer, x.device.type)
    return (product or reference)(layer, x)


_reference_only = False


@contextmanager
def reference_only() -> Iterator[None]:
    """Inside, in all threads, every product takes the reference path: what is compressed or trained must not depend on
    which kernels a machine has, for a difference in the last bit of an activation can flip a code."""
    global _reference_only
    before, _reference_only = _reference_only, True
    try:
        yield
    finally:
        _reference_only = before


def fused(layer: PackedLinear, device_type: str) -> Product | None:
    if _reference_only:
        return None
    _fill()
    entry = PRODUCTS.get((layer.format, device_type))
    return entry.product if entry is not None and entry.serves(layer) else None


def kind(layer: PackedLinear, device_type: str) -> str:
    """Row kind of this layer on this device: dense | fused | decode-per-call | decode-on-load."""
    if layer.format == "dense":
        return "dense"
    if fused(layer, device_type) is not None:
        return "fused"
    return "decode-on-load" if layer.decode_on_load else "decode-per-call"


@cache
def _fill() -> None:
    import kernels.cpu

    for name in ("uniform", "codebook"):
        PRODUCTS[name, "cpu"] = Fused(kernels.cpu.product, kernels.cpu.serves)
    if not torch.cuda.is_available():  # importing triton takes a second, for nothing
        return
    try:
        import kernels.triton
    except ImportError:
        return
    for name in ("uniform", "codebook"):
        PRODUCTS[name, "cuda"] = Fused(kernels.triton.product, kernels.triton.serves)
