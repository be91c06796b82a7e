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


class Weights:
    """A weight fp32 [O, I] as the matrix unit reads it: two to six bytes for each of its numbers."""

    def __init__(self, unit: CDLL, room: Tensor | None = None) -> None:
        self.unit, self.room = unit, room
        self.rows = self.columns = self.parts = 0

    def fill(self, weight_OI: Tensor) -> None:
        """With another weight, in the same room where that is large enough."""
        assert weight_OI.is_contiguous() and weight_OI.dtype == torch.float32
        self.rows, self.columns = weight_OI.shape
        needed = self.unit.packed(self.rows, self.columns, PARTS)
        if self.room is None or len(self.room) < needed:
            self.room = torch.empty(needed, dtype=torch.bfloat16)
        threads = torch.get_num_threads()
        self.parts = self.unit.prepare(weight_OI.data_ptr(), self.rows, self.columns, self.room.data_ptr(), threads)


class Inputs:
    """Inputs fp32 [N, I], made ready once for the rows of a layer, some after others."""

    def __init__(self, x_NI: Tensor) -> None:
        assert x_NI.dtype == torch.float32
        self.x_NI = x_NI.contiguous()
        self.unit = matrix_unit()
        if self.unit is not None:
            count, columns = x_NI.shape
            self.packed = torch.empty(self.unit.packed(count, columns, PARTS), dtype=torch.bfloat16)
            self.unit.pack(self.x_NI.data_ptr(), count, columns, self.packed.data_ptr(), torch.get_num_threads())
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
        assert self.unit is not None and weights.room is not None
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


class Kept:
    """The product with a weight fp32 [O, I] that many inputs will be multiplied by."""

    def __init__(self, unit: CDLL, weight_OI: Tensor) -> None:
        self.weights = Weights(unit)
        self.weights.fill(weight_OI)

    def __call__(self, x: Tensor) -> Tensor:
        flat_NI = x.reshape(-1, x.shape[-1])
        out_NO = flat_NI.new_empty(len(flat_NI), self.weights.rows)
        Inputs(flat_NI).times_packed(self.weights, out_NO)
        return out_NO.view(*x.shape[:-1], self.weights.rows)


def kept(weight_OI: Tensor) -> Kept | None:
    """None where torch's product is the fastest there is, or for weights that are not in fp32."""
    unit = matrix_unit()
    if unit is None or weight_OI.dtype != torch.float32:
        return None
    return Kept(unit, weight_OI.detach().contiguous())
