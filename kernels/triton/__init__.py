"""Fused products on an NVIDIA GPU, in Triton. Importing this package imports triton; `kernels.dispatch` does so on a
machine with a GPU.

Up to `SMALL` inputs a product decodes weights in registers as it multiplies. More (a prompt) are worth a matrix
product: the base of some rows is decoded in the dtype of the inputs, multiplied by cuBLAS, and forgotten. Nothing waits
for the GPU, and what is launched and allocated depends on shapes alone: products can be captured in a CUDA graph."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from kernels.dispatch import Backend
from kernels.formats.packed import PackedLinear
from kernels.triton import launch, programs
from kernels.triton.view import LAYOUTS, View, view

SMALL = 32
DECODED = 1 << 26  # weights that stand in memory at once with more than SMALL inputs: 128 MiB
FINISH_ROWS, FINISH_RANKS = 64, 32


def product(layer: PackedLinear, x: Tensor) -> Tensor:
    """y = x W^T + bias in the dtype of x (fp16, bf16 or fp32) for x [..., columns]; sums in fp32."""
    seen = view(layer)
    flat_NI = x.reshape(-1, layer.in_features).contiguous()
    ordered_NI = of_base(seen, flat_NI)
    with torch.cuda.device_of(x):  # programs are launched on the current device
        many = len(flat_NI) > SMALL
        out_NO = _decoded(layer, seen, flat_NI, ordered_NI) if many else fused(seen, flat_NI, ordered_NI)
    return out_NO.view(*x.shape[:-1], layer.out_features)


def of_base(seen: View, x_NI: Tensor) -> Tensor:
    """Inputs as the base takes them: in the order of its codes, times the scales of its columns."""
    ordered_NI = x_NI if seen.order_I is None else x_NI.index_select(1, seen.order_I)
    return ordered_NI if seen.scale_I is None else ordered_NI * seen.scale_I.to(x_NI.dtype)


def fused(seen: View, x_NI: Tensor, ordered_NI: Tensor, how: launch.Launch | None = None) -> Tensor:
    """The product of up to `SMALL` inputs, with another launch configuration than the one on file (the tuner's
    entrance)."""
    form, batch = seen.form, len(x_NI)
    how = how or launch.choose(form, batch, x_NI.dtype, x_NI.device)
    out_NO = x_NI.new_empty(batch, form.rows)
    units = -(-form.columns // form.lanes)
    per_split = -(-units // (how.splits * how.units)) * how.units
    splits = -(-units // per_split)
    staged = splits > 1 or form.rank > 0
    into = x_NI.new_empty(splits, batch, form.rows + form.rank, dtype=torch.float32) if staged else out_NO
    tiles = -(-form.rows // (form.dim * how.vectors))
    rank_tiles = -(-form.rank // launch.RANKS)
    constants = dict(
        F=form,
        J=how.vectors,
        U=how.units,
        PER_SPLIT=per_split,
        FINISH=not staged,
        RANKS=launch.RANKS,
        num_warps=how.warps,
        num_stages=how.stages,
    )
    if how.program == "gemv":
        programs.gemv[tiles + rank_tiles, splits, batch](seen.stored, x_NI, ordered_NI, into, **constants)
    else:
        padded = max(16, triton.next_power_of_2(batch))
        programs.gemm[tiles + rank_tiles * batch, splits](
            seen.stored, x_NI, ordered_NI, into, batch, N=padded, **constants
        )
    if staged:
        grid = (-(-form.rows // FINISH_ROWS), batch)
        programs.finish[grid](seen.stored, into, out_NO, F=form, SPLITS=splits, ROWS=FINISH_ROWS, RANKS=FINISH_RANKS)
    return out_NO


def _decoded(layer: PackedLinear, seen: View, x_NI: Tensor, ordered_NI: Tensor) -> Tensor:
    """The product of many inputs: some rows at a time."""
    form = seen.form
    rows = max(1, DECODED // form.columns // 64) * 64  # whole vectors of any length
    out_NO = x_NI.new_empty(len(x_NI), form.rows)
    base_OI = x_NI.new_empty(min(rows, form.rows), form.columns)
    how = launch.DECODE
    units = min(how.units, triton.next_power_of_2(-(-form.columns // form.lanes)))
    for first in range(0, form.rows, rows):
        last = min(first + rows, form.rows)
        grid = (-(-(last - first) // (form.dim * how.vectors)), -(-form.columns // (form.lanes * units)))
        programs.decode[grid](seen.stored, base_OI, first, last, F=form, J=how.vectors, U=units, num_warps=how.warps)
        torch.mm(ordered_NI, base_OI[: last - first].t(), out=out_NO[:, first:last])
    if layer.lowrank is not None:
        stored = layer.lowrank
        inner_NR = (x_NI @ stored.right.to(x_NI.dtype).t()).float()
        if stored.left_scale is not None and stored.right_scale is not None:
            inner_NR *= stored.right_scale.float() * stored.left_scale.float()
        out_NO += inner_NR.to(x_NI.dtype) @ stored.left.to(x_NI.dtype).t()
    if layer.row_scale is not None:
        out_NO *= layer.row_scale.to(x_NI.dtype)
    return out_NO if layer.bias is None else out_NO.add_(layer.bias.to(x_NI.dtype))


BACKEND = Backend(LAYOUTS, product)
