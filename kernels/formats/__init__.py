"""Importing this module registers every packed format (kernels.formats.packed.FORMATS)."""

from kernels.formats.codebook import CodebookLinear
from kernels.formats.conv import ConvLinear
from kernels.formats.dense import DenseLinear
from kernels.formats.mlp_table import MlpTable
from kernels.formats.tables import PlainTable
from kernels.formats.uniform import UniformLinear

__all__ = ["CodebookLinear", "ConvLinear", "DenseLinear", "MlpTable", "PlainTable", "UniformLinear"]
