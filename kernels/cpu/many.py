"""Products of many fp32 inputs: by the CPU's matrix unit where it has one (parts.cpp), else by torch."""

from __future__ import annotations

from ctypes import CDLL

import torch
from torch import Tensor

from kernels.cpu.build import matrix_unit


def has_matrix_unit() -> bool:
    return matrix_unit() is not None


class Multiplied:
    """Inputs fp32 [N, I], made ready once to be multiplied by the weights of one layer, some rows after others.

    On a matrix unit every number is the sum of three of 16 bits, and what is left out of a product is below 2**-24 of
    it: its error is no larger than that of an fp32 product of torch's, and the same for any N and number of threads."""

    def __init__(self, x_NI: Tensor) -> None:
        assert x_NI.dtype == torch.float32
        self.x_NI = x_NI.contiguous()
        self.unit = matrix_unit()
        if self.unit is not None:
            count, columns = self.x_NI.shape
            self.packed = _room(self.unit, count, columns)
            self.unit.pack(self.x_NI.data_ptr(), count, columns, self.packed.data_ptr(), torch.get_num_threads())
            self.weights = _room(self.unit, 0, columns)

    def by(self, weight_OI: Tensor, out_NO: Tensor) -> None:
        """out = x W^T, columns of a wider one or all."""
        if self.unit is None:
            torch.mm(self.x_NI, weight_OI.t(), out=out_NO)
            return
        count, columns = self.x_NI.shape
        rows = len(weight_OI)
        needed = self.unit.packed(rows, columns)
        if len(self.weights) < needed:
            self.weights = _room(self.unit, rows, columns)
        assert weight_OI.is_contiguous() and weight_OI.dtype == out_NO.dtype == torch.float32
        assert out_NO.stride(1) == 1 and weight_OI.shape[1] == columns
        self.unit.multiply(
            self.packed.data_ptr(),
            count,
            columns,
            weight_OI.data_ptr(),
            rows,
            self.weights.data_ptr(),
            out_NO.data_ptr(),
            out_NO.stride(0),
            torch.get_num_threads(),
        )


def _room(unit: CDLL, count: int, columns: int) -> Tensor:
    return torch.empty(unit.packed(count, columns), dtype=torch.bfloat16)
