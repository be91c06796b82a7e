"""Fused products on a CPU: weights are decoded in registers and multiplied, and never stand in memory.

Up to `SMALL` inputs the compiled kernel multiplies as it decodes. More (a prompt, a window that is scored) are worth a
matrix product: a tile of rows is decoded at a time, multiplied, and forgotten."""

from __future__ import annotations

from ctypes import CDLL

import torch
from torch import Tensor

from kernels.cpu.build import library
from kernels.cpu.many import TILE_WEIGHTS, Inputs, prepared
from kernels.cpu.view import LAYOUTS, View, view
from kernels.dispatch import Backend
from kernels.formats.activations import quantised
from kernels.formats.dense import DenseLinear
from kernels.formats.packed import PackedLinear
from kernels.formats.reassembly import reassembled

SMALL = 32
LONGEST = 8  # weights to a code


def available() -> bool:
    """Whether this machine has a compiler, and instructions that the source is written for."""
    return library() is not None


def product(layer: PackedLinear, x: Tensor) -> Tensor:
    """y = x W^T + bias in the dtype of x; sums in fp32."""
    seen, compiled = view(layer), library()
    assert compiled is not None
    flat_NI = x.reshape(-1, layer.in_features).float()
    if seen.links is not None:  # a gather and a few sums
        flat_NI = reassembled(flat_NI, seen.links)
    if len(flat_NI) > SMALL:
        out_NO = _tiled(compiled, layer, seen, flat_NI)
    else:
        flat_NI = flat_NI.contiguous()
        out_NO = flat_NI.new_empty(len(flat_NI), layer.out_features)
        compiled.product(seen.address, flat_NI.data_ptr(), len(flat_NI), out_NO.data_ptr(), torch.get_num_threads())
    return out_NO.to(x.dtype).view(*x.shape[:-1], layer.out_features)


def _tiled(compiled: CDLL, layer: PackedLinear, seen: View, x_NI: Tensor) -> Tensor:
    """The product of many inputs: a tile of rows at a time."""
    given_NI = x_NI
    if seen.order_I is not None:
        x_NI = x_NI[:, seen.order_I]
    if layer.rotation is not None:
        x_NI = x_NI.contiguous()
        turned_NI = torch.empty_like(x_NI)
        compiled.turn(seen.address, x_NI.data_ptr(), len(x_NI), turned_NI.data_ptr(), torch.get_num_threads())
        x_NI = turned_NI
    rows = max(1, TILE_WEIGHTS // layer.in_features // LONGEST) * LONGEST  # whole vectors of any length
    out_NO = x_NI.new_empty(len(x_NI), layer.out_features)
    scale_I = seen.tensors.get("column_scale")
    base = Inputs(quantised(x_NI if scale_I is None else x_NI * scale_I, layer.act_bits))
    tile_OI = x_NI.new_empty(min(rows, layer.out_features), layer.in_features)
    for first in range(0, layer.out_features, rows):
        count = min(rows, layer.out_features - first)
        if isinstance(layer, DenseLinear):
            tile_OI[:count] = layer.weight[first : first + count]
        else:
            compiled.decode(seen.address, first, count, tile_OI.data_ptr(), torch.get_num_threads())
        base.times(tile_OI[:count], out_NO[:, first : first + count])
    if layer.lowrank is not None:
        left_OR, right_RI = layer.lowrank.factors()
        out_NO.addmm_(given_NI @ right_RI.t(), left_OR.t())
    if layer.row_scale is not None:
        out_NO *= layer.row_scale.float()
    return out_NO if layer.bias is None else out_NO.add_(layer.bias.float())


BACKEND = Backend(LAYOUTS, product, available, prepared)
