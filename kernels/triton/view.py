"""A packed layer as the programs see it: its stored tensors, and what is fixed when they are compiled."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from kernels import views
from kernels.dispatch import Layout
from kernels.formats.activations import quantised
from kernels.formats.codebook import CodebookLinear
from kernels.formats.normal_float import dynamic_map
from kernels.formats.packed import PackedLinear
from kernels.formats.reassembly import Links, reassembled
from kernels.formats.rotation import mixed
from kernels.formats.trellis import MULTIPLIERS, TrellisLinear, gaussian_levels
from kernels.formats.uniform import UniformLinear
from kernels.triton.decode import Form, Stored, lanes
from kernels.views import readable_codebook, readable_uniform


@dataclass(frozen=True)
class View:
    form: Form
    stored: Stored
    order_I: Tensor | None  # the columns of the input in the order of the codes, if that is another one
    sign_I: Tensor | None  # of inputs that are turned
    scale_I: Tensor | None  # fp16, in that order: what inputs of the base are multiplied by
    links: Links | None  # of inputs that are reassembled
    act_bits: int  # that inputs of the base are rounded to, after all that

    def arranged(self, x_NI: Tensor) -> Tensor:
        """Inputs as the codes are multiplied with them: turned, or in another order, and scaled."""
        if self.sign_I is not None:
            x_NI = mixed(x_NI.float() * self.sign_I).to(x_NI.dtype).contiguous()
        elif self.order_I is not None:
            x_NI = x_NI.index_select(1, self.order_I)
        elif self.links is not None:
            x_NI = reassembled(x_NI, self.links)
        return quantised(x_NI if self.scale_I is None else (x_NI * self.scale_I).to(x_NI.dtype), self.act_bits)

    @property
    def tensors(self) -> dict[str, Tensor]:
        held = {**self.stored._asdict(), "order": self.order_I, "sign": self.sign_I, "column_scale": self.scale_I}
        held |= zip(("channel", "place", "share"), self.links or (), strict=False)
        return {name: tensor for name, tensor in held.items() if isinstance(tensor, Tensor)}


def view(layer: PackedLinear) -> View:
    """The layer's view, kept with it for as long as its tensors stay as they are."""
    return views.view(layer, "_triton_view", _make)


def _make(layer: PackedLinear) -> View:
    form, tensors, order_I = LAYOUTS[layer.format].parts(layer)
    form |= dict(rows=layer.out_features, columns=layer.in_features, rank=layer.rank, lanes=lanes(form["bits"]))
    form |= dict(
        one_scale=form["group"] % form["lanes"] == 0 or form["groups"] == 1,
        shifted=form["offset"] in ("zero", "minimum"),
    )
    form |= dict(row_scale=layer.row_scale is not None, bias=layer.bias is not None)
    if layer.lowrank is not None:
        tensors |= {name: getattr(layer.lowrank, name) for name in ("left", "right", "left_scale", "right_scale")}
    tensors |= dict(row_scale=layer.row_scale, bias=layer.bias)
    sign_I = None if layer.rotation is None else layer.rotation.sign()
    assert all(tensor is None or tensor.is_contiguous() for tensor in tensors.values())
    scale_I = layer.column_scale if isinstance(layer, UniformLinear) else None
    if scale_I is not None and order_I is not None:
        scale_I = scale_I[order_I]
    links = None if layer.reassembly is None else layer.reassembly.links()
    stored = Stored(**dict.fromkeys(Stored._fields[:-1]) | tensors)
    return View(Form(**form), stored, order_I, sign_I, scale_I, links, layer.act_bits)


# Fields of `Form` and of `Stored` that a format decides, and the order of columns, int64 [I], if that is another one.
Parts = tuple[dict[str, Any], dict[str, Tensor | None], Tensor | None]


def _uniform(layer: UniformLinear) -> Parts:
    form = dict(
        bits=layer.bits, dim=1, table=False, window=0, group=layer.group, groups=layer.groups, offset=layer.offset
    )
    form |= dict(scale_bits=16, per_step=1, levels=False)
    tensors = dict(codes=layer.codes, scales=layer.scales, minima=layer.minima, zeros=layer.zeros)
    return form, tensors, None if layer.order is None else layer.order.long() & 0xFFFF


def _codebook(layer: CodebookLinear) -> Parts:
    stored, scales = layer.scales, layer.scales.form
    form = dict(
        bits=layer.index_bits, dim=layer.dim, table=True, window=0, group=layer.block, groups=stored.blocks, offset=""
    )
    # Entries are values of fp16 numbers, and gathered as such; NormalFloat's levels are not, and stay fp32.
    entry_KD = layer.entries().contiguous()
    table_KD = entry_KD if layer.codebook is None and not layer.table_key else entry_KD.half()
    tensors: dict[str, Tensor | None] = dict(codes=layer.codes, table=table_KD)
    if scales.scheme == "half":
        return form | dict(scale_bits=16, per_step=1, levels=False), tensors | dict(scales=stored.direct), None
    levels = dynamic_map().to(entry_KD.device) if scales.scheme == "dynamic" else None
    tensors |= dict(scales=stored.codes, steps=stored.steps, levels=levels, scale_offset=stored.offset)
    return form | dict(scale_bits=scales.bits, per_step=scales.group, levels=levels is not None), tensors, None


def _trellis(layer: TrellisLinear) -> Parts:
    first, *second = MULTIPLIERS[layer.bits, layer.dim]
    form: dict[str, Any] = dict(bits=layer.bits, dim=layer.dim, table=True, window=layer.window)
    form |= dict(
        first=first,
        second=sum(second),
        group=layer.in_features,
        groups=1,
        offset="",
        scale_bits=layer.scales.form.bits,
        levels=False,
    )
    table_K = gaussian_levels().half().to(layer.codes.device)
    tensors: dict[str, Tensor | None] = dict(codes=layer.codes, table=table_K, scales=layer.scales.codes)
    tensors |= dict(steps=layer.scales.steps, scale_offset=layer.scales.offset)
    return form | dict(per_step=layer.scales.form.group), tensors, None


# Every format that is served, said once.
LAYOUTS = {
    UniformLinear.format: Layout(_uniform, readable_uniform),
    CodebookLinear.format: Layout(_codebook, readable_codebook),
    TrellisLinear.format: Layout(_trellis),
}
