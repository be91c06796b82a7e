"""Products of many fp32 inputs: by the CPU's matrix unit where it has one (parts.cpp), else by torch.

On a matrix unit every number is the sum of three of 16 bits, and what is left out of a product is below 2**-24 of it:
its error is no larger than that of an fp32 product of torch's, and it is the same for any number of inputs and threads.
"""

from __future__ import annotations

from ctypes import CDLL

import torch
from torch import Tensor

from kernels.cpu.build import matrix_unit

PARTS = 3  # of an fp32 number
COPIED_BYTES = 2 << 30  # a copy of a weight takes at most
TILE_WEIGHTS = 1 << 20  # decoded or packed at once: a few MiB, which the second-level cache nearly holds


class Weights:
    """Weights fp32 [O, I] as the matrix unit reads them: two, four or six bytes for each number."""

    def __init__(self, unit: CDLL) -> None:
        self.unit = unit
        self.rows = self.columns = self.parts = 0
        self.room = torch.empty(0, dtype=torch.bfloat16)

    def fill(self, weight_OI: Tensor) -> None:
        """With these, in the room that others had where it is large enough."""
        assert weight_OI.is_contiguous() and weight_OI.dtype == torch.float32
        self.rows, self.columns = weight_OI.shape
        given = (weight_OI.data_ptr(), self.rows, self.columns)
        self.parts = self.unit.count_parts(*given, torch.get_num_threads())
        needed = self.unit.packed(self.rows, self.columns, self.parts)
        if len(self.room) < needed:
            self.room = torch.empty(needed, dtype=torch.bfloat16)
        self.unit.pack_all_weights(*given, self.parts, self.room.data_ptr(), torch.get_num_threads())


class Inputs:
    """Inputs fp32 [N, I], made ready once for the rows of a layer, some after others."""

    def __init__(self, x_NI: Tensor) -> None:
        assert x_NI.dtype == torch.float32
        self.x_NI = x_NI.contiguous()
        self.unit = matrix_unit()
        if self.unit is not None:
            count, columns = x_NI.shape
            self.packed = torch.empty(self.unit.packed(count, columns, PARTS), dtype=torch.bfloat16)
            self.unit.pack_all_inputs(
                self.x_NI.data_ptr(), count, columns, self.packed.data_ptr(), torch.get_num_threads()
            )
            self.weights = Weights(self.unit)

    def times(self, weight_OI: Tensor, out_NO: Tensor) -> None:
        """out = x W^T; `out_NO` may be some columns of a wider matrix."""
        if self.unit is None:
            torch.mm(self.x_NI, weight_OI.t(), out=out_NO)
        else:
            self.weights.fill(weight_OI)
            self.times_packed(self.weights, out_NO)

    def times_packed(self, weights: Weights, out_NO: Tensor) -> None:
        count, columns = self.x_NI.shape
        assert out_NO.shape == (count, weights.rows) and columns == weights.columns
        assert out_NO.stride(1) == 1 and out_NO.dtype == torch.float32
        assert self.unit is not None
        self.unit.multiply(
            self.packed.data_ptr(),
            count,
            columns,
            weights.room.data_ptr(),
            weights.parts,
            weights.rows,
            out_NO.data_ptr(),
            out_NO.stride(0),
            torch.get_num_threads(),
        )


class Product:
    """x W^T with a weight fp32 [O, I] that many inputs will be multiplied by: packed once, where a copy of it is not
    too large, else some rows at a time for every product. The numbers are the same."""

    def __init__(self, unit: CDLL, weight_OI: Tensor, copied: bool) -> None:
        self.weight_OI, self.packed = weight_OI, Weights(unit) if copied else None
        if self.packed is not None:
            self.packed.fill(weight_OI)

    def __call__(self, x: Tensor) -> Tensor:
        rows, columns = self.weight_OI.shape
        flat = Inputs(x.reshape(-1, columns))
        out_NO = x.new_empty(len(flat.x_NI), rows)
        if self.packed is not None:
            flat.times_packed(self.packed, out_NO)
        else:
            each = max(1, TILE_WEIGHTS // columns)
            for first in range(0, rows, each):
                part = slice(first, first + each)
                flat.times(self.weight_OI[part], out_NO[:, part])
        return out_NO.view(*x.shape[:-1], rows)


def prepared(weight_OI: Tensor, copied: bool) -> Product | None:
    """None where torch's product is the fastest there is. `copied`: whether there is room for a copy of the weight."""
    unit = matrix_unit()
    if unit is None or weight_OI.dtype != torch.float32:
        return None
    small = 2 * PARTS * weight_OI.numel() <= COPIED_BYTES
    return Product(unit, weight_OI.detach().contiguous(), copied and small)
