"""Importing this module registers every packed format (kernels.packed.FORMATS)."""

from kernels.codebook import CodebookLinear
from kernels.conv import ConvLinear
from kernels.dense import DenseLinear
from kernels.mlp_table import MlpTable
from kernels.tables import PlainTable
from kernels.uniform import UniformLinear

__all__ = ["CodebookLinear", "ConvLinear", "DenseLinear", "MlpTable", "PlainTable", "UniformLinear"]
