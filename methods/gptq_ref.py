"""GPTQ as auto-gptq runs it: the quantiser of the package itself, on our Hessians, in our ledger.

A row to hold `gptq` against. Nothing is written anew: `GPTQ.fasterquant` of auto-gptq 0.7 makes every matrix, and what
its `QuantLinear` would store of it (fp16 scales, integer zero points, codes of the fp32 grid) is what is stored. Of the
package only the two modules of the algorithm are loaded: the rest asks for a transformers of 2024.

    pip install auto-gptq==0.7.1 --no-deps

One thing it does otherwise than its paper says: with groups of fewer than 128 columns that are not static, a grid is
placed on weights that the errors of its own lazy block have not reached yet. With static groups, or of 128, its codes
are those of `gptq:grid=minmax,damp=0.01,follow=0` (tests/methods/test_gptq_ref.py).

Defaults are those of its `BaseQuantizeConfig` but for `act_order`, which it switches on and vLLM and others advise
against for speed; a Hessian is that of the calibration text behind packed blocks, as for every method here."""

from __future__ import annotations

import importlib
import sys
import types
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from typing import Any, ClassVar
from unittest import mock

import torch

from kernels.formats.uniform import UniformLinear
from methods.base import Compressed, LayerConfig, LayerData, LayerSpec, Needs, Track
from methods.codecs.error_feedback import NotFinite, check_damp
from methods.uniform_grid import UniformGridMethod

PACKAGE = "auto_gptq"
MISSING = "gptq-ref needs the reference: pip install auto-gptq==0.7.1 --no-deps"


@dataclass(frozen=True, kw_only=True)
class Reference(UniformGridMethod):
    """auto-gptq's quantiser."""

    name: ClassVar[str] = "gptq-ref"
    version: ClassVar[int] = 1
    track: ClassVar[Track] = Track.CALIBRATED

    act_order: bool = False  # its desc_act
    static_groups: bool = False
    damp: float = 0.01  # its damp_percent

    def __post_init__(self) -> None:
        super().__post_init__()
        check_damp(self.damp)
        if self.offset == "minimum" or self.grid not in ("minmax", "mse"):
            raise ValueError("the reference has offset=symmetric and offset=zero, grid=minmax and grid=mse")
        if self.static_groups and self.group == 0:
            raise ValueError("static_groups=true needs groups: write group=128")

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
        quantiser = reference().GPTQ(linear)
        quantiser.quantizer.configure(
            packed.bits, perchannel=True, sym=packed.offset == "symmetric", mse=self.grid == "mse"
        )
        quantiser.H, quantiser.nsamples = data.hessian_II.clone(), 1
        with _without_cuda(data.weight_OI.device):
            scale_OG, zero_OG, group_I = quantiser.fasterquant(
                percdamp=self.damp,
                group_size=packed.group if packed.groups > 1 else -1,
                actorder=self.act_order,
                static_groups=self.static_groups and packed.groups > 1,
            )
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


@cache
def reference() -> Any:
    """The package's module of the algorithm. Raises ValueError where it is not installed."""
    found = find_spec(PACKAGE)
    if found is None or not found.submodule_search_locations:
        raise ValueError(MISSING)
    # A package of our own around its folder: its own __init__ would import all models it knew.
    name = f"{PACKAGE}_quantization"
    package = types.ModuleType(name)
    package.__path__ = [f"{place}/quantization" for place in found.submodule_search_locations]
    sys.modules[name] = package
    return importlib.import_module(f"{name}.gptq")


@contextmanager
def _without_cuda(device: torch.device) -> Iterator[None]:
    """It waits for a GPU whether there is one or not."""
    if device.type == "cuda":
        yield
    else:
        with mock.patch.object(torch.cuda, "synchronize", lambda *_: None):
            yield
