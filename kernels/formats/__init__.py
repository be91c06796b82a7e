"""What is stored: formats of layers, tables they share, and how both decode and encode.

Formats are found by name in `kernels.formats.packed.FORMATS`, tables in `kernels.formats.tables.TABLES`."""

from kernels.formats.codebook import CodebookLinear
from kernels.formats.conv import ConvLinear
from kernels.formats.dense import DenseLinear
from kernels.formats.layer import LayerConfig, LayerSpec
from kernels.formats.mlp_table import MlpTable
from kernels.formats.packed import FORMATS, PackedLinear
from kernels.formats.tables import TABLES, PlainTable, Table
from kernels.formats.uniform import UniformLinear

__all__ = [
    "FORMATS",
    "TABLES",
    "CodebookLinear",
    "ConvLinear",
    "DenseLinear",
    "LayerConfig",
    "LayerSpec",
    "MlpTable",
    "PackedLinear",
    "PlainTable",
    "Table",
    "UniformLinear",
]
