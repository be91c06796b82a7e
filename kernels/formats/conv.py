"""Convolutional decoders: a small latent image per patch of the matrix, and one network that draws the patches from
them.

    w[o, i] = net(latent of the patch of (o, i)) * scale[o, i // block]   (+ low-rank branch)

This is the neural half of ReALLM (arXiv 2405.13155): a matrix stored as HNeRV (Chen et al., arXiv 2304.02633) stores a
video. The matrix is cut into square patches, cells beyond its edges included, so any shape fits and padding is counted
through the latents that draw it. A latent is [C, side, side] with side = patch / 2**stages, each number one of
2**latent_bits even levels of [-1, 1]; the stem's weights do what a scale per channel would do. The network is

    1x1 -> GELU -> stages x (convolution -> PixelShuffle(2) -> GELU) -> 3x3 -> one channel

with fewer channels at every stage. Its weights are codes of a table of levels under one fp16 absmax per output channel.
All layers share three streams: codes, absmax, biases.

A matrix is no image: its rows and columns may stand in any order, and neighbours have nothing in common. With `reorder`
one order of the rows and one of the columns are stored, ceil(log2 n) bits an index, and the image is that of the
reordered matrix.

A decoder costs thousands of multiplications per weight, so it runs once, on first use, and the decoded weight stays in
memory: what this format saves is storage, never memory or bandwidth."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, ClassVar, Self

import torch
from torch import Tensor
from torch.nn import functional as F

from kernels.formats.bitpack import packed_words, unpack
from kernels.formats.normal_float import nf_levels
from kernels.formats.order import index_bits
from kernels.formats.packed import PackedLinear
from kernels.formats.scales import BlockScales, ScaleForm, per_column
from kernels.timing import synchronize

SHRINK, FLOOR = 1.2, 4  # channels of a stage: those of the one before over SHRINK, no fewer than FLOOR
CHUNK = 1 << 20  # weights drawn at once


class ConvLinear(PackedLinear):
    """A layer drawn by a convolutional decoder; `patch` counts rows and columns, `width` the channels of the stem."""

    format: ClassVar[str] = "conv"
    decode_on_load: ClassVar[bool] = True
    part_of: ClassVar[dict[str, str]] = {
        "latents": "codes",
        "weights": "tables",
        "absmax": "tables",
        "biases": "tables",
        "gain": "scales",
        "row_order": "tables",
        "column_order": "tables",
    }
    latents: Tensor
    weights: Tensor
    absmax: Tensor | None
    biases: Tensor
    gain: Tensor | None
    row_order: Tensor | None
    column_order: Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool,
        *,
        patch: int,
        latent_channels: int,
        latent_bits: int,
        stages: int,
        width: int,
        kernel: int = 3,
        weight_bits: int = 6,
        levels: str = "nf",
        block: int = 64,
        scales: str = "double",
        reorder: bool = False,
        **added: Any,
    ) -> None:
        super().__init__(
            in_features,
            out_features,
            bias,
            patch=patch,
            latent_channels=latent_channels,
            latent_bits=latent_bits,
            stages=stages,
            width=width,
            kernel=kernel,
            weight_bits=weight_bits,
            levels=levels,
            block=block,
            scales=scales,
            reorder=reorder,
            **added,
        )
        assert patch >= 1 and stages >= 0 and patch % 2**stages == 0, (
            f"a patch of {patch} cannot be halved {stages} times"
        )
        assert latent_channels >= 1 and (1 <= latent_bits <= 8 or latent_bits == 16) and width >= 1 and kernel % 2 == 1
        assert (2 <= weight_bits <= 8 or weight_bits == 16) and levels in ("nf", "uniform") and block >= 0
        self.patch, self.latent_channels, self.latent_bits = patch, latent_channels, latent_bits
        self.weight_bits, self.levels, self.reorder = weight_bits, levels, reorder
        self.block = min(block or in_features, in_features)  # 0: one block for the whole row
        self.side = patch >> stages
        self.grid = (-(-out_features // patch), -(-in_features // patch))  # patches down and across
        self.shapes = layer_shapes(latent_channels, stages, width, kernel)
        latents = latent_channels * self.grid[0] * self.grid[1] * self.side**2
        weights, channels = sum(o * i * k * k for o, i, k in self.shapes), sum(o for o, _, _ in self.shapes)
        self.register_buffer("latents", _stream(latents, latent_bits))
        self.register_buffer("weights", _stream(weights, weight_bits))
        self.register_buffer("absmax", torch.empty(channels, dtype=torch.float16) if weight_bits < 16 else None)
        self.register_buffer("biases", torch.empty(channels, dtype=torch.float16))
        self.scales = (
            BlockScales(out_features, -(-in_features // self.block), ScaleForm(scales)) if scales != "none" else None
        )
        self.register_buffer("gain", torch.empty(1, dtype=torch.float32) if scales == "none" else None)
        for name, count in (("row_order", out_features), ("column_order", in_features)):
            self.register_buffer(name, _stream(count, index_bits(count)) if reorder else None)
        self.decode_seconds: float | None = None  # of the last decoding for `loaded`
        self._loaded: Tensor | None = None  # a plain attribute: never saved, never counted as stored

    def latent_values(self) -> Tensor:
        """The latents of N patches, fp32 [N, C, side, side]."""
        shape = (self.grid[0] * self.grid[1], self.latent_channels, self.side, self.side)
        if self.latent_bits == 16:
            return self.latents.float().view(shape)
        codes = unpack(self.latents[None], self.latent_bits, shape[0] * shape[1] * shape[2] * shape[3])
        return latent_levels(self.latent_bits).to(codes.device)[codes.long()].view(shape)

    def network(self) -> list[tuple[Tensor, Tensor]]:
        """Weight [out, in, k, k] and bias [out] of every convolution, fp32."""
        sizes = [o * i * k * k for o, i, k in self.shapes]
        if self.weight_bits == 16:
            flat = self.weights.float()
        else:
            codes = unpack(self.weights[None], self.weight_bits, sum(sizes))[0]
            flat = weight_levels(self.weight_bits, self.levels).to(codes.device)[codes.long()]
        weights = [part.view(o, i, k, k) for part, (o, i, k) in zip(flat.split(sizes), self.shapes, strict=True)]
        channels = [o for o, _, _ in self.shapes]
        if self.absmax is not None:
            absmax = self.absmax.float().split(channels)
            weights = [weight * top[:, None, None, None] for weight, top in zip(weights, absmax, strict=True)]
        return list(zip(weights, self.biases.float().split(channels), strict=True))

    def orders(self) -> tuple[Tensor, Tensor]:
        """Which row, and which column, of the weight stands at every place of the image: int64 [O], [I]."""
        assert self.row_order is not None and self.column_order is not None
        pairs = ((self.row_order, self.out_features), (self.column_order, self.in_features))
        row_O, column_I = (unpack(packed[None], index_bits(count), count)[0].long() for packed, count in pairs)
        return row_O, column_I

    def unit_scales(self) -> Tensor:
        """What the drawn weights are multiplied by: fp32, broadcasts to [O, I]."""
        if self.scales is not None:
            return per_column(self.scales.decode(), self.block, self.in_features)
        assert self.gain is not None
        return self.gain

    @torch.no_grad()
    def decode_codes(self) -> Tensor:
        latent_NCYX, network = self.latent_values(), self.network()
        with exact_convolutions():
            drawn = [draw(part, network) for part in latent_NCYX.split(max(1, CHUNK // self.patch**2))]
        weight_OI = from_patches(torch.cat(drawn), self.grid, self.out_features, self.in_features) * self.unit_scales()
        if self.row_order is not None:
            row_O, column_I = self.orders()
            columns_OI = torch.empty_like(weight_OI).index_copy_(1, column_I, weight_OI)
            weight_OI = torch.empty_like(weight_OI).index_copy_(0, row_O, columns_OI)
        return weight_OI

    def loaded(self, dtype: torch.dtype) -> Tensor:
        """The weight in the dtype of a product, decoded when it is first asked for."""
        if self._loaded is None or self._loaded.dtype != dtype:
            synchronize(self.biases.device)
            start = time.perf_counter()
            with torch.inference_mode(False):  # what is kept must serve every later caller
                self._loaded = self.decode().to(dtype)
            synchronize(self.biases.device)
            self.decode_seconds = time.perf_counter() - start
        return self._loaded

    def unload(self) -> None:
        self._loaded = None

    @property
    def resident_bits(self) -> int:
        """Stored tensors and the decoded weight: before the first use as what `decode` will give."""
        if self._loaded is None:
            return super().resident_bits + 32 * self.out_features * self.in_features
        return super().resident_bits + 8 * self._loaded.numel() * self._loaded.element_size()

    def fill(self, **tensors: Tensor) -> None:
        super().fill(**tensors)
        self.unload()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        self.unload()
        return super()._apply(fn, recurse)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self.unload()
        super()._load_from_state_dict(*args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_loaded": None}


def layer_shapes(latent_channels: int, stages: int, width: int, kernel: int) -> list[tuple[int, int, int]]:
    """(out, in, kernel) of every convolution: stem, up-stages, head."""
    shapes, channels = [(width, latent_channels, 1)], width
    for _ in range(stages):
        narrower = max(round(channels / SHRINK), min(channels, FLOOR))
        shapes.append((4 * narrower, channels, kernel))
        channels = narrower
    return [*shapes, (1, channels, 3)]


def draw(latent_NCYX: Tensor, network: list[tuple[Tensor, Tensor]]) -> Tensor:
    """Patches [N, patch, patch]. Training draws with the same function, so nothing is learnt that decoding does not
    repeat."""
    stem, *stages, head = network
    x = latent_NCYX.contiguous(memory_format=torch.channels_last)  # twice as fast on a CPU
    x = F.gelu(F.conv2d(x, *stem))
    for weight, bias in stages:
        x = F.gelu(F.pixel_shuffle(F.conv2d(x, weight, bias, padding=weight.shape[-1] // 2), 2))
    return F.conv2d(x, *head, padding=1)[:, 0]


def to_patches(matrix_OI: Tensor, patch: int) -> Tensor:
    """[O, I] -> [N, patch, patch], row-major, padded with zeros."""
    rows, columns = matrix_OI.shape
    padded = F.pad(matrix_OI, (0, -columns % patch, 0, -rows % patch))
    down, across = padded.shape[0] // patch, padded.shape[1] // patch
    return padded.view(down, patch, across, patch).transpose(1, 2).reshape(down * across, patch, patch)


def from_patches(patch_NYX: Tensor, grid: tuple[int, int], rows: int, columns: int) -> Tensor:
    """Inverse of `to_patches`, padding cut off."""
    (down, across), patch = grid, patch_NYX.shape[-1]
    whole = patch_NYX.view(down, across, patch, patch).transpose(1, 2).reshape(down * patch, across * patch)
    return whole[:rows, :columns]


def latent_levels(bits: int) -> Tensor:
    """2**bits even levels of [-1, 1], fp32."""
    return torch.arange(1 - 2**bits, 2**bits, 2) / (2**bits - 1)


def weight_levels(bits: int, scheme: str) -> Tensor:
    """Ascending levels in [-1, 1], fp32: NormalFloat's 2**bits, or 2**bits - 1 even ones with zero among them."""
    highest = 2 ** (bits - 1) - 1
    return nf_levels(bits) if scheme == "nf" else torch.arange(-highest, highest + 1) / highest


def exact_convolutions() -> AbstractContextManager[None]:
    """Convolutions that give the same fp32 numbers again: cuDNN may otherwise pick its algorithm by timing, and round
    to TF32."""
    return torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False)


def _stream(count: int, bits: int) -> Tensor:
    """An empty buffer of `count` numbers: fp16 values at 16 bits, else one stream of codes."""
    if bits == 16:
        return torch.empty(count, dtype=torch.float16)
    return torch.empty(packed_words(count, bits), dtype=torch.int32)
