"""GPTQ as its reference runs it: the quantiser of a package itself, on our Hessians, in our ledger.

A row to hold `gptq` against. Nothing is written anew: the `GPTQ` of auto-gptq 0.7, or where that is not installed of
its successor gptqmodel 7.6, makes every matrix, and what its `QuantLinear` would store of it (fp16 scales, integer zero
points, codes of the fp32 grid) is what is stored. Of auto-gptq only the two modules of the algorithm are loaded: the
rest asks for a transformers of 2024. Which of the two ran is in a cell's key.

    pip install auto-gptq==0.7.1 --no-deps        or        pip install gptqmodel==7.6.0 optimum

One thing both do otherwise than their paper says: with groups of fewer than 128 columns that are not static, a grid is
placed on weights that the errors of its own lazy block have not reached yet. With static groups, or of 128, their codes
are those of `gptq:grid=minmax,damp=0.01,follow=0` (tests/methods/test_gptq_ref.py).

Defaults are those of auto-gptq's `BaseQuantizeConfig` but for `act_order`, which it switches on and vLLM and others
advise against for speed; gptqmodel's order of columns inside groups (its `act_group_aware`) is off, for it is none of
the paper's. A Hessian is that of the calibration text behind packed blocks, as for every method here."""

from __future__ import annotations

import importlib
import sys
import types
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from typing import Any, ClassVar
from unittest import mock

import torch
from torch import Tensor

from kernels.formats.uniform import UniformLinear
from methods.base import Compressed, LayerConfig, LayerData, LayerSpec, Needs, Track
from methods.codecs.error_feedback import NotFinite, check_damp
from methods.uniform_grid import UniformGridMethod

AUTO_GPTQ, GPTQMODEL = "auto-gptq", "gptqmodel"
MODULES = {AUTO_GPTQ: "auto_gptq", GPTQMODEL: "gptqmodel"}
INSTALL = {
    AUTO_GPTQ: "auto-gptq==0.7.1 --no-deps",
    GPTQMODEL: "gptqmodel==7.6.0 optimum",
}  # peft refuses gptqmodel alone
NORM = 2.4  # of a search for a grid, auto-gptq's own


@dataclass(frozen=True, kw_only=True)
class Reference(UniformGridMethod):
    """The quantiser of auto-gptq or gptqmodel."""

    name: ClassVar[str] = "gptq-ref"
    version: ClassVar[int] = 1
    track: ClassVar[Track] = Track.CALIBRATED

    act_order: bool = False  # its desc_act
    static_groups: bool = False
    damp: float = 0.01  # its damp_percent
    package: str | None = None  # None: what is installed, auto-gptq before gptqmodel

    def __post_init__(self) -> None:
        super().__post_init__()
        check_damp(self.damp)
        if self.offset == "minimum" or self.grid not in ("minmax", "mse"):
            raise ValueError("the reference has offset=symmetric and offset=zero, grid=minmax and grid=mse")
        if self.static_groups and self.group == 0:
            raise ValueError("static_groups=true needs groups: write group=128")
        if self.package not in (None, *MODULES):
            raise ValueError(f"package={self.package} is not one of {', '.join(MODULES)}")

    @property
    def runs(self) -> str:
        """The package that makes the codes; auto-gptq where none is installed."""
        if self.package is not None:
            return self.package
        return GPTQMODEL if find_spec(MODULES[GPTQMODEL]) and not find_spec(MODULES[AUTO_GPTQ]) else AUTO_GPTQ

    def identity(self, without: Sequence[str] = ()) -> dict[str, object]:
        """With the package, where it is not the first: the same options would store other bytes."""
        return super().identity(without) | ({"package": GPTQMODEL} if self.runs == GPTQMODEL else {})

    @property
    def needs(self) -> Needs:
        return Needs(hessian=True)

    @property
    def permuted(self) -> bool:
        return self.act_order and not self.static_groups

    def candidates(self, layer: LayerSpec) -> list[LayerConfig]:
        found = super().candidates(layer)
        return [config for config in found if config["group"]] if self.static_groups else found

    def compress(self, data: LayerData, layer: LayerSpec, config: LayerConfig) -> Compressed:
        """Raises ValueError where the package is not installed."""
        assert data.hessian_II is not None
        if not bool(torch.isfinite(data.hessian_II).all()):
            raise NotFinite("the inputs of this layer are not finite on the calibration text")
        packed = config.layout(layer, data.weight_OI.device)
        assert isinstance(packed, UniformLinear)
        linear = torch.nn.Linear(layer.in_features, layer.out_features, bias=False, device=data.weight_OI.device)
        linear.weight.data = data.weight_OI.clone()
        quantise = _by_gptqmodel if self.runs == GPTQMODEL else _by_auto_gptq
        scale_OG, zero_OG, group_I = quantise(self, linear, data.hessian_II.clone(), packed)
        in_place = self.static_groups or not self.act_order
        of_column_I = torch.arange(layer.in_features) // packed.group if in_place else group_I.long()
        scale_OI, zero_OI = scale_OG[:, of_column_I].float(), zero_OG[:, of_column_I].float()
        codes_OI = torch.round(linear.weight.data / scale_OI + zero_OI).clamp_(0, 2**packed.bits - 1).int()
        order_I = None if packed.order is None else torch.argsort(of_column_I, stable=True)
        packed.fill(
            **packed.tensors(
                codes_OI if order_I is None else codes_OI[:, order_I],
                scale_OG.half(),
                None if packed.zeros is None else zero_OG.int(),
                order_I=order_I,
            )
        )
        return Compressed(packed)


def _by_auto_gptq(
    method: Reference, linear: torch.nn.Linear, hessian_II: Tensor, packed: UniformLinear
) -> tuple[Tensor, Tensor, Tensor]:
    """(scales [O, G], zero points [O, G], the group of every column) that auto-gptq finds for the weight, which it
    rounds in place."""
    quantiser = reference(AUTO_GPTQ).GPTQ(linear)
    quantiser.quantizer.configure(
        packed.bits, perchannel=True, sym=packed.offset == "symmetric", mse=method.grid == "mse"
    )
    quantiser.H, quantiser.nsamples = hessian_II, 1
    with _without_cuda(hessian_II.device):
        scale_OG, zero_OG, group_I = quantiser.fasterquant(**_settings(method, packed))
    return scale_OG, zero_OG, group_I


def _by_gptqmodel(
    method: Reference, linear: torch.nn.Linear, hessian_II: Tensor, packed: UniformLinear
) -> tuple[Tensor, Tensor, Tensor]:
    """The same by gptqmodel."""
    module = reference(GPTQMODEL)
    settings = _settings(method, packed)
    config = module.QuantizeConfig(
        bits=packed.bits,
        group_size=settings["group_size"],
        sym=packed.offset == "symmetric",
        desc_act=method.act_order,
        act_group_aware=False,
        mse=NORM if method.grid == "mse" else 0.0,
        fallback=None,  # it rounds plainly where it has seen few samples, and counts one here
    )
    quantiser = module.GPTQ(linear, config)
    quantiser.quantizer.configure(perchannel=True)
    quantiser.H, quantiser.nsamples, quantiser._hessian_total_samples = hessian_II, 1, 1
    scale_OG, zero_OG, group_I, *_ = quantiser.hf_quantize(**settings, act_group_aware=False)
    return scale_OG, zero_OG, group_I


def _settings(method: Reference, packed: UniformLinear) -> dict[str, Any]:
    """What both call by the same names."""
    return {
        "percdamp": method.damp,
        "group_size": packed.group if packed.groups > 1 else -1,
        "actorder": method.act_order,
        "static_groups": method.static_groups and packed.groups > 1,
    }


@cache
def reference(package: str) -> Any:
    """The package's module of the algorithm. Raises ValueError where it is not installed."""
    found = find_spec(MODULES[package])
    if found is None or not found.submodule_search_locations:
        raise ValueError(f"gptq-ref needs the reference: pip install {INSTALL[package]}")
    if package == GPTQMODEL:
        return importlib.import_module("gptqmodel.quantization.gptq")
    # A package of our own around its folder: its own __init__ would import all models it knew.
    name = f"{MODULES[package]}_quantization"
    around = types.ModuleType(name)
    around.__path__ = [f"{place}/quantization" for place in found.submodule_search_locations]
    sys.modules[name] = around
    return importlib.import_module(f"{name}.gptq")


@contextmanager
def _without_cuda(device: torch.device) -> Iterator[None]:
    """It waits for a GPU whether there is one or not."""
    if device.type == "cuda":
        yield
    else:
        with mock.patch.object(torch.cuda, "synchronize", lambda *_: None):
            yield
