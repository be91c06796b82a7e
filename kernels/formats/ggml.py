"""ggml's blocks of a GGUF file, byte for byte: what llama.cpp's k-quants, IQ and ternary types store.

Row o of a matrix is a run of blocks of `kind` ("Q4_K"), each of so many bytes for so many consecutive columns. What a
byte means is the `gguf` package's affair, which decodes to the numbers that llama.cpp decodes to. Its decoders take
whole arrays on the CPU, so a layer is decoded once and kept (`decode_on_load`). Types of one scale to 32 weights are
plain grids, and are no affair of this format (harness.portal.gguf)."""

from __future__ import annotations

import time
from functools import cache
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from kernels.formats.packed import PackedLinear


def row_bytes(kind: str, columns: int) -> int:
    """Bytes of a row. Raises ValueError for a type that gguf does not decode, or blocks that do not fill a row."""
    weights, size = block_size(kind)
    if columns % weights:
        raise ValueError(f"{kind} has blocks of {weights} weights, which do not fill rows of {columns}")
    return columns // weights * size


@cache
def block_size(kind: str) -> tuple[int, int]:
    """(weights of a block, its bytes). Raises ValueError for a type that gguf does not decode."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
    from gguf.quants import dequantize

    if kind not in GGMLQuantizationType.__members__:
        raise ValueError(f"'{kind}' is no type of ggml that gguf knows: update gguf")
    weights, size = GGML_QUANT_SIZES[GGMLQuantizationType[kind]]
    try:
        dequantize(np.zeros((1, size), dtype=np.uint8), GGMLQuantizationType[kind])
    except NotImplementedError:
        raise ValueError(f"gguf decodes no blocks of type {kind}: update gguf") from None
    return weights, size


class GgmlLinear(PackedLinear):
    """A layer of ggml blocks of one type."""

    format: ClassVar[str] = "ggml"
    decode_on_load: ClassVar[bool] = True
    takes_act_bits: ClassVar[bool] = False
    part_of: ClassVar[dict[str, str]] = {"blocks": "codes"}  # scales are inside the blocks
    blocks: Tensor  # uint8 [O, bytes of a row]

    def __init__(self, in_features: int, out_features: int, bias: bool, *, kind: str, **added: Any) -> None:
        super().__init__(in_features, out_features, bias, kind=kind, **added)
        self.kind = kind
        self.register_buffer("blocks", torch.empty(out_features, row_bytes(kind, in_features), dtype=torch.uint8))
        self.decode_seconds: float | None = None  # of the last decoding for `loaded`
        self._loaded: Tensor | None = None  # a plain attribute: never saved, never counted as stored

    def decode_codes(self) -> Tensor:
        from gguf import GGMLQuantizationType
        from gguf.quants import dequantize

        weight_OI = dequantize(self.blocks.cpu().numpy(), GGMLQuantizationType[self.kind])
        return torch.from_numpy(weight_OI).to(self.blocks.device)

    def loaded(self, dtype: torch.dtype) -> Tensor:
        """The weight in the dtype of a product, decoded when it is first asked for."""
        if self._loaded is None or self._loaded.dtype != dtype or self._loaded.device != self.blocks.device:
            start = time.perf_counter()
            with torch.inference_mode(False):  # what is kept must serve every later caller
                self._loaded = self.decode().to(dtype)
            self.decode_seconds = time.perf_counter() - start
        return self._loaded

    def unload(self) -> None:
        self._loaded = None

    @property
    def resident_bits(self) -> int:
        """Stored blocks and the decoded weight: before the first use as what `decode` will give."""
        kept = 32 * self.out_features * self.in_features
        return super().resident_bits + (kept if self._loaded is None else 8 * self._loaded.nbytes)

    def refill(self, **tensors: Tensor) -> None:
        super().refill(**tensors)
        self.unload()

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self.unload()
        super()._load_from_state_dict(*args, **kwargs)
