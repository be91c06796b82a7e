"""A packed layer as fused.cpp sees it: pointers to the stored tensors, and to a table in the forms that its decoders
read."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels import views
from kernels.dispatch import Layout
from kernels.formats.codebook import CodebookLinear
from kernels.formats.dense import DenseLinear
from kernels.formats.normal_float import dynamic_map
from kernels.formats.packed import PackedLinear
from kernels.formats.rotation import hartley
from kernels.formats.tables import Table
from kernels.formats.trellis import MULTIPLIERS, TrellisLinear, gaussian_levels
from kernels.formats.uniform import UniformLinear
from kernels.views import readable_codebook, readable_uniform

FIXED = 16383  # the largest entry of a table in fixed point: four products with 16-bit inputs are a sum of 32 bits


class Layer(ctypes.Structure):
    """`Layer` of layer.h, field by field."""

    _fields_ = [
        ("rows", ctypes.c_int64),
        ("columns", ctypes.c_int64),
        ("bits", ctypes.c_int64),
        ("dim", ctypes.c_int64),
        ("uniform", ctypes.c_int64),
        ("words", ctypes.c_int64),
        ("vectors", ctypes.c_int64),
        ("codes", ctypes.c_void_p),
        ("table", ctypes.c_void_p),
        ("half_table", ctypes.c_void_p),
        ("planes", ctypes.c_void_p),
        ("plane", ctypes.c_int64),
        ("fixed", ctypes.c_void_p),
        ("entries", ctypes.c_void_p),
        ("fixed_step", ctypes.c_double),
        ("group", ctypes.c_int64),
        ("groups", ctypes.c_int64),
        ("half", ctypes.c_void_p),
        ("scale_codes", ctypes.c_void_p),
        ("scale_bits", ctypes.c_int64),
        ("map", ctypes.c_void_p),
        ("steps", ctypes.c_void_p),
        ("per_step", ctypes.c_int64),
        ("offset", ctypes.c_double),
        ("minima", ctypes.c_void_p),
        ("zeros", ctypes.c_void_p),
        ("centre", ctypes.c_double),
        ("window", ctypes.c_int64),
        ("first", ctypes.c_int64),
        ("second", ctypes.c_int64),
        ("levels", ctypes.c_void_p),
        ("signs", ctypes.c_void_p),
        ("hartley", ctypes.c_void_p),
        ("order", ctypes.c_void_p),
        ("column_scale", ctypes.c_void_p),
        ("act_bits", ctypes.c_int64),
        ("dense", ctypes.c_void_p),
        ("dense_kind", ctypes.c_int64),
        ("rank", ctypes.c_int64),
        ("left", ctypes.c_void_p),
        ("right", ctypes.c_void_p),
        ("left_scale", ctypes.c_void_p),
        ("right_scale", ctypes.c_void_p),
        ("row_scale", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
    ]


DENSE_KINDS = {torch.float16: 0, torch.bfloat16: 1, torch.float32: 2}  # `Dense` of layer.h


@dataclass(frozen=True)
class Parts:
    """What a format adds to a layer's structure: fields that are numbers, and tensors whose addresses are fields."""

    numbers: dict[str, float]
    tensors: dict[str, Tensor | None]
    order_I: Tensor | None = None  # int32: the column that stands at every place of the codes, if that is another one


class View:
    """A layer's structure, and the tensors it points to."""

    def __init__(self, layer: PackedLinear) -> None:
        parts = LAYOUTS[layer.format].parts(layer)
        numbers, tensors, self.order_I = dict(parts.numbers), dict(parts.tensors), parts.order_I
        if layer.lowrank is not None:
            numbers["rank"] = layer.rank
            tensors |= {name: getattr(layer.lowrank, name) for name in ("left", "right", "left_scale", "right_scale")}
            if self.order_I is not None:  # inputs come in the base's order of columns
                tensors["right"] = layer.lowrank.right[:, self.order_I].contiguous()
        if self.order_I is not None:
            tensors["order"] = self.order_I
        self.links = None if layer.reassembly is None else layer.reassembly.links()
        if layer.rotation is not None:
            assert self.order_I is None
            columns = layer.in_features
            tensors |= dict(signs=layer.rotation.signs, hartley=hartley(columns // (columns & -columns)))
        numbers["act_bits"] = layer.act_bits
        tensors |= {"row_scale": layer.row_scale, "bias": layer.bias}
        self.tensors = {name: tensor for name, tensor in tensors.items() if tensor is not None}  # kept alive
        self.structure = structure(layer.out_features, layer.in_features, numbers, self.tensors)
        self.address = ctypes.addressof(self.structure)


def structure(rows: int, columns: int, numbers: Mapping[str, float], tensors: Mapping[str, Tensor]) -> Layer:
    """The structure of a weight [rows, columns]; the tensors must outlive it."""
    assert all(tensor.is_contiguous() for tensor in tensors.values())
    assert tensors.keys() | numbers.keys() <= {field[0] for field in Layer._fields_}
    pointers = {name: tensor.data_ptr() for name, tensor in tensors.items()}
    vectors = -(-rows // int(numbers["dim"]))
    return Layer(rows=rows, columns=columns, vectors=vectors, **numbers, **pointers)


def view(layer: PackedLinear) -> View:
    """The layer's view, kept with it for as long as its tensors stay as they are."""
    return views.view(layer, "_cpu_view", View)


def _dense(layer: DenseLinear) -> Parts:
    return Parts(dict(dim=1, dense_kind=DENSE_KINDS[layer.weight.dtype]), {"dense": layer.weight})


def _uniform(layer: UniformLinear) -> Parts:
    numbers: dict[str, float] = dict(bits=layer.bits, dim=1, uniform=1, group=layer.group, groups=layer.groups)
    numbers |= dict(words=layer.codes.shape[1], centre=2.0 ** (layer.bits - 1) if layer.offset == "symmetric" else 0.0)
    tensors = {"codes": layer.codes, "half": layer.scales, "minima": layer.minima, "zeros": layer.zeros}
    order_I = None if layer.order is None else layer.order.int() & 0xFFFF
    if layer.column_scale is not None:
        scale_I = layer.column_scale.float()
        tensors["column_scale"] = scale_I if order_I is None else scale_I[order_I]
    return Parts(numbers, tensors, order_I)


def _codebook(layer: CodebookLinear) -> Parts:
    scales, form = layer.scales, layer.scales.form
    forms = views.view(layer.shared, "_cpu_forms", TableForms) if layer.table_key else TableForms(layer)
    numbers = forms.numbers | dict(group=layer.block, groups=scales.blocks, words=layer.codes.shape[1])
    tensors: dict[str, Tensor | None] = {"codes": layer.codes, **forms.tensors}
    if scales.direct is not None:
        return Parts(numbers, tensors | {"half": scales.direct})
    assert scales.steps is not None and scales.offset is not None
    numbers |= dict(scale_bits=form.bits, per_step=form.group, offset=scales.offset.item())
    tensors["map"] = dynamic_map() if form.scheme == "dynamic" else None
    return Parts(numbers, tensors | {"scale_codes": scales.codes, "steps": scales.steps.float()})


def _trellis(layer: TrellisLinear) -> Parts:
    scales = layer.scales
    assert scales.steps is not None and scales.offset is not None
    first, *second = MULTIPLIERS[layer.bits, layer.dim]
    numbers: dict[str, float] = dict(bits=layer.bits, dim=layer.dim, words=layer.codes.shape[1], window=layer.window)
    numbers |= dict(first=first, second=second[0] if second else 0, centre=128.0, group=layer.in_features, groups=1)
    numbers |= dict(scale_bits=scales.form.bits, per_step=scales.form.group, offset=scales.offset.item())
    level_K = (gaussian_levels() + 128).to(torch.uint8)
    assert torch.equal(level_K.int().flip(0), 256 - level_K.int())
    tensors = {"codes": layer.codes, "levels": level_K, "scale_codes": scales.codes, "steps": scales.steps.float()}
    return Parts(numbers, tensors)


class TableForms:
    """The entries of a table, or of a layer with a table of its own, in every form that a decoder reads."""

    def __init__(self, owner: CodebookLinear | Table) -> None:
        table_KD, bits = owner.entries().contiguous(), owner.index_bits
        self.numbers: dict[str, float] = dict(bits=bits, dim=owner.dim)
        self.tensors: dict[str, Tensor] = {"table": table_KD}
        half_KD = table_KD.half()
        if torch.equal(half_KD.float(), table_KD):
            self.tensors["half_table"] = half_KD
            if bits <= 8:
                self.tensors["planes"] = _planes(half_KD)
        step = table_KD.abs().max().item() / FIXED or 1.0
        fixed_KD = (table_KD / step).round().to(torch.int16)
        self.numbers["fixed_step"] = step
        if bits <= 8:
            self.tensors["fixed"] = _planes(fixed_KD)
            self.numbers["plane"] = max(64, 2**bits)
        if bits > 6 and owner.dim in (4, 8):
            self.tensors["entries"] = fixed_KD


def _planes(table_KD: Tensor) -> Tensor:
    """Low bytes and high bytes of 16-bit entries, uint8 [D, 2, 64, 128 or 256], repeated to fill."""
    size = max(64, len(table_KD))
    repeated_DS = table_KD.repeat(-(-size // len(table_KD)), 1)[:size].t().contiguous()
    return repeated_DS.view(torch.uint8).view(-1, size, 2).transpose(1, 2).contiguous()


# Every format that is served, said once.
LAYOUTS = {
    DenseLinear.format: Layout(_dense),
    UniformLinear.format: Layout(_uniform, readable_uniform),
    CodebookLinear.format: Layout(_codebook, readable_codebook),
    TrellisLinear.format: Layout(_trellis),
}
