"""Round to nearest on a uniform grid per group of columns: what quantisation costs when nothing is done about it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from kernels.formats.uniform import UniformLinear
from methods.base import Compressed, LayerConfig, LayerData, LayerSpec, Track
from methods.codecs.grids import fit_grid
from methods.uniform_grid import UniformGridMethod


@dataclass(frozen=True, kw_only=True)
class RoundToNearest(UniformGridMethod):
    """The nearest level of a grid per group."""

    name: ClassVar[str] = "rtn"
    version: ClassVar[int] = 1
    track: ClassVar[Track] = Track.DATA_FREE
    seeded: ClassVar[bool] = False

    @property
    def packs_differences(self) -> bool:
        return True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.grid == "hessian":
            raise ValueError("grid=hessian needs data; rtn has minmax and mse")

    def compress(self, data: LayerData, layer: LayerSpec, config: LayerConfig) -> Compressed:
        packed = config.layout(layer, data.weight_OI.device)
        assert isinstance(packed, UniformLinear)
        grid = fit_grid(data.weight_OI, bits=packed.bits, group=packed.group, offset=packed.offset, search=self.grid)
        packed.fill(**packed.tensors(grid.round(data.weight_OI), **grid.stored))
        return Compressed(packed)
