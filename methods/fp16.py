"""The uncompressed reference, at 16 bits a weight.

What it rounds: every weight, embedding and norm to the 16-bit type of the published checkpoint (fp16 when that is fp32,
as for the default model, whose values come from a 4-bit file). Arithmetic is done in the compute dtype of the run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from kernels.formats.dense import HALF_DTYPES, DenseLinear
from methods.base import Compressed, LayerConfig, LayerData, LayerSpec, Method, Track


@dataclass(frozen=True, kw_only=True)
class Half(Method):
    """The weights at 16 bits."""

    name: ClassVar[str] = "fp16"
    version: ClassVar[int] = 1
    track: ClassVar[Track] = Track.DATA_FREE
    seeded: ClassVar[bool] = False
    budgeted: ClassVar[bool] = False

    dtype: str = "float16"

    def __post_init__(self) -> None:
        if self.dtype not in HALF_DTYPES:
            raise ValueError(f"dtype={self.dtype} is not one of {', '.join(HALF_DTYPES)}")

    def candidates(self, layer: LayerSpec) -> list[LayerConfig]:
        return [LayerConfig.of("dense", dtype=self.dtype)]

    def compress(self, data: LayerData, layer: LayerSpec, config: LayerConfig) -> Compressed:
        packed = config.layout(layer, data.weight_OI.device)
        assert isinstance(packed, DenseLinear)
        packed.fill(weight=data.weight_OI.to(HALF_DTYPES[config["dtype"]]))
        if not bool(torch.isfinite(packed.weight).all()):
            raise ValueError(
                f"{layer.name} has weights beyond {config['dtype']}: save the model as bfloat16, "
                "and its reference will be that"
            )
        return Compressed(packed)
