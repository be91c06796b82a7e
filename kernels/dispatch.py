"""Which product runs on which layer and device: each backend says itself which layouts it serves.

A device without a backend, or a layer that its backend does not serve, takes the reference path: decode the whole
weight, multiply, forget it (or keep it, in a format whose decoder is too slow to run for every product). A layer whose
weight is itself a product (factors, cores) takes its parts one after the other, on any device, where its shapes say
that this is less work. What runs decides the *kind* a leaderboard row carries, so a latency can never be attributed to
a kernel that did not run. A product that gradients must pass through takes the reference path as well.

This module imports neither formats nor backends: every format calls `linear`, and every backend reads formats.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from kernels.registry import Registry


class Layer(Protocol):
    """What is asked of a layer here; in fact every one is a `kernels.formats.packed.PackedLinear`."""

    format: ClassVar[str]
    decode_on_load: ClassVar[bool]

    @property
    def rounds(self) -> bool: ...

    @property
    def constant(self) -> Tensor | None: ...

    @property
    def multiplied(self) -> Layer: ...

    @property
    def contracts(self) -> bool: ...

    def contracted(self, x: Tensor) -> Tensor: ...

    def decode(self) -> Tensor: ...

    def product_of_rounded(self, x: Tensor) -> Tensor: ...

    def loaded(self, dtype: torch.dtype) -> Tensor: ...


Product = Callable[[Any, Tensor], Tensor]  # (layer, x [..., I]) -> x W^T + bias, in the dtype of x


@dataclass(frozen=True)
class Layout:
    """How a backend reads the layers of one format."""

    parts: Callable[[Any], Any]  # layer -> what the kernel is handed of its base; made once per layer
    # Whether a layer of the format is among those it reads; None: all are.
    readable: Callable[[Any], bool] | None = None


@dataclass(frozen=True)
class Backend:
    """The fused products on one type of device."""

    layouts: Mapping[str, Layout]  # by format; layers of others are not served
    product: Product
    available: Callable[[], bool] | None = None  # whether the kernels can be had on this machine; None: they can
    # (weight [O, I], whether there is room for a copy of it) -> the product x [..., I] -> x W^T, made ready for many
    # inputs, where there is one that is faster than torch's and errs no more; None: there is none for this weight.
    prepared: Callable[[Tensor, bool], Callable[[Tensor], Tensor] | None] | None = None

    def serves(self, layer: Layer) -> bool:
        layout = self.layouts.get(layer.format)
        if layout is None or not (layout.readable is None or layout.readable(layer)):
            return False
        return self.available is None or self.available()


# By device type.
BACKENDS: Registry[Backend] = Registry(
    "backend", Backend, {"cpu": "kernels.cpu:BACKEND", "cuda": "kernels.triton:BACKEND"}, group="ptq_harness.backends"
)


@cache
def backend(device_type: str) -> Backend | None:
    """The backend of devices of this type; None where there is none, or what it needs is not installed."""
    if device_type == "cuda" and not torch.cuda.is_available():  # importing triton takes a second, for nothing
        return None
    if device_type not in BACKENDS:
        return None
    try:
        return BACKENDS.get(device_type)
    except ImportError:
        return None


def reference(layer: Layer, x: Tensor) -> Tensor:
    """The oracle: y = x W^T + b with W decoded in fp32 and rounded once to the dtype of x."""
    bias = None if layer.constant is None else layer.constant.to(x.dtype)
    if layer.rounds:
        y = layer.product_of_rounded(x)
        return y if bias is None else y + bias
    weight_OI = layer.loaded(x.dtype) if layer.decode_on_load else layer.decode().to(x.dtype)
    return torch.nn.functional.linear(x, weight_OI, bias)


def contraction(layer: Layer, x: Tensor) -> Tensor:
    """y = x W^T + b of a layer whose weight is a product, by its parts one after the other."""
    y = layer.contracted(x)
    return y if layer.constant is None else y + layer.constant.to(x.dtype)


def linear(layer: Layer, x: Tensor) -> Tensor:
    """x W^T + bias for x [..., I] in the dtype of x, by the fused product where there is one."""
    if x.requires_grad and torch.is_grad_enabled():
        return reference(layer, x)
    product = fused(layer, x.device.type) or (contraction if _contracts(layer) else reference)
    return product(layer, x)


def prepared(weight_OI: Tensor, copied: bool) -> Callable[[Tensor], Tensor]:
    """The product x [..., I] -> x W^T with a weight that is no packed layer's (a head's), and that many inputs will be
    multiplied by; `copied`: whether there is room for a copy of it. Gradients pass through where they do in torch's."""
    found = None if _reference_only else backend(weight_OI.device.type)
    faster = found.prepared(weight_OI, copied) if found is not None and found.prepared is not None else None

    def product(x: Tensor) -> Tensor:
        if faster is None or (torch.is_grad_enabled() and (x.requires_grad or weight_OI.requires_grad)):
            return torch.nn.functional.linear(x, weight_OI)
        return faster(x)

    return product


def _contracts(layer: Layer) -> bool:
    return not _reference_only and layer.contracts


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


def fused(layer: Layer, device_type: str) -> Product | None:
    """The fused product of this layer on this type of device; None where the reference path is taken."""
    if _reference_only:
        return None
    found = backend(device_type)
    return found.product if found is not None and found.serves(layer) else None


def kind(layer: Layer, device_type: str) -> str:
    """Row kind of this layer on this type of device: dense | fused | fused-16 | decode-per-call | decode-on-load."""
    layer = layer.multiplied
    if layer.format == "dense":
        return "dense"
    if fused(layer, device_type) is not None and layer.rounds:
        return "fused-16"  # inputs of fewer bits are rounded, and multiplied as wider numbers all the same
    if fused(layer, device_type) is not None or _contracts(layer):
        return "fused"
    return "decode-on-load" if layer.decode_on_load and not layer.rounds else "decode-per-call"
