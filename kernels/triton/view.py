"""A packed layer as the programs see it: its stored tensors, and what is fixed when they are compiled."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from kernels import views
from kernels.formats.codebook import CodebookLinear
from kernels.formats.normal_float import dynamic_map
from kernels.formats.packed import PackedLinear
from kernels.formats.uniform import UniformLinear
from kernels.triton.decode import Form, Stored, lanes


@dataclass(frozen=True)
class View:
    form: Form
    stored: Stored
    order_I: Tensor | None  # the columns of the input in the order of the codes, if that is another one

    @property
    def tensors(self) -> dict[str, Tensor]:
        held = {**self.stored._asdict(), "order": self.order_I}
        return {name: tensor for name, tensor in held.items() if isinstance(tensor, Tensor)}


def view(layer: PackedLinear) -> View:
    return views.view(layer, "_triton_view", _make)


def _make(layer: PackedLinear) -> View:
    form, tensors = _uniform(layer) if isinstance(layer, UniformLinear) else _codebook(layer)
    form |= dict(rows=layer.out_features, columns=layer.in_features, rank=layer.rank, lanes=lanes(form["bits"]))
    form |= dict(
        one_scale=form["group"] % form["lanes"] == 0 or form["groups"] == 1,
        shifted=form["offset"] in ("zero", "minimum"),
    )
    form |= dict(row_scale=layer.row_scale is not None, bias=layer.bias is not None)
    if layer.lowrank is not None:
        tensors |= {name: getattr(layer.lowrank, name) for name in ("left", "right", "left_scale", "right_scale")}
    tensors |= dict(codes=layer.codes, row_scale=layer.row_scale, bias=layer.bias)
    assert all(tensor is None or tensor.is_contiguous() for tensor in tensors.values())
    order = getattr(layer, "order", None)
    return View(
        Form(**form),
        Stored(**dict.fromkeys(Stored._fields[:-1]) | tensors),
        None if order is None else order.long() & 0xFFFF,
    )


def _uniform(layer: UniformLinear) -> tuple[dict, dict]:
    form = dict(bits=layer.bits, dim=1, table=False, group=layer.group, groups=layer.groups, offset=layer.offset)
    return form | dict(scale_bits=16, per_step=1, levels=False), dict(
        scales=layer.scales, minima=layer.minima, zeros=layer.zeros
    )


def _codebook(layer: CodebookLinear) -> tuple[dict, dict]:
    scales, kind = layer.scales, layer.scales.form
    form = dict(bits=layer.index_bits, dim=layer.dim, table=True, group=layer.block, groups=scales.blocks, offset="")
    # Entries are values of fp16 numbers, and gathered as such; NormalFloat's levels are not, and stay fp32.
    entry_KD = layer.entries().contiguous()
    tensors = dict(table=entry_KD if layer.codebook is None and not layer.table_key else entry_KD.half())
    if kind.kind == "half":
        return form | dict(scale_bits=16, per_step=1, levels=False), tensors | dict(scales=scales.direct)
    levels = dynamic_map().to(entry_KD.device) if kind.kind == "dynamic" else None
    tensors |= dict(scales=scales.codes, steps=scales.steps, levels=levels, scale_offset=scales.offset)
    return form | dict(scale_bits=kind.bits, per_step=kind.group, levels=levels is not None), tensors
