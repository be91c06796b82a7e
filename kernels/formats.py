"""Importing this module registers every packed format (kernels.packed.FORMATS)."""

from kernels.codebook import CodebookLinear
from kernels.conv import ConvLinear
from kernels.dense import DenseLinear
from kernels.uniform import UniformLinear

__all__ = ["CodebookLinear", "ConvLinear", "DenseLinear", "UniformLinear"]
