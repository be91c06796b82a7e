"""Importing this module registers every packed format (kernels.packed.FORMATS)."""

from kernels.codebook import CodebookLinear
from kernels.dense import DenseLinear
from kernels.tables import PlainTable
from kernels.uniform import UniformLinear

__all__ = ["CodebookLinear", "DenseLinear", "PlainTable", "UniformLinear"]
