"""A rotation of a layer's inputs: what is packed is W R, and it is multiplied by R^T x.

An orthogonal R leaves the product as it is and makes the columns of W R, and the inputs R^T x, alike: outliers are
spread over all of them (QuIP, arXiv 2307.13304; QuaRot, arXiv 2404.00456). Here

    R^T = (A_m x H_p) diag(signs),   I = m p, p the largest power of two in I

with H the Walsh-Hadamard matrix and A the discrete Hartley transform (Bracewell, J. Opt. Soc. Am. 73, 1983), cas(2 pi j
k / m) / sqrt(m): symmetric, orthogonal, its entries no larger than sqrt(2 / m), and there is one for every m, where
Hadamard matrices of sizes that are no power of two need tables. The signs are random, stored, and counted.
"""

from __future__ import annotations

import math
from functools import cache
from typing import ClassVar

import torch
from torch import Tensor

from kernels.formats.bitpack import pack, packed_words, unpack
from kernels.formats.stored import StoredModule


class Rotation(StoredModule):
    """The rotation of `columns` inputs: a sign for each is all that is stored."""

    part_of: ClassVar[dict[str, str]] = {"signs": "tables"}
    signs: Tensor  # int32 [1, W], a bit for every input

    def __init__(self, columns: int) -> None:
        super().__init__()
        self.columns = columns
        self.register_buffer("signs", torch.empty(1, packed_words(columns, 1), dtype=torch.int32))

    def draw(self, seed: int, device: torch.device) -> dict[str, Tensor]:
        """Random signs: the buffers by name."""
        bits = torch.randint(2, (1, self.columns), generator=torch.Generator().manual_seed(seed))
        return {"signs": pack(bits, 1).to(device)}

    def sign(self) -> Tensor:
        """+1 or -1 for every input, fp32 [I]."""
        return 1.0 - 2.0 * unpack(self.signs, 1, self.columns)[0].float()

    def turn(self, x: Tensor) -> Tensor:
        """R^T x for inputs x [..., I], or W R for a weight [O, I]; differentiable."""
        return mixed(x * self.sign().to(x.dtype))

    def turn_both(self, matrix_II: Tensor) -> Tensor:
        """R^T M R of a matrix of inputs by inputs."""
        return self.turn(self.turn(matrix_II).t()).t()

    def back(self, x: Tensor) -> Tensor:
        """The inverse of `turn`."""
        return mixed(x) * self.sign().to(x.dtype)


def mixed(x: Tensor) -> Tensor:
    """(A_m x H_p) x along the last dimension; its own inverse."""
    shape, columns = x.shape, x.shape[-1]
    power = columns & -columns
    half = 1
    while half < power:
        pairs = x.reshape(-1, 2, half)
        x = torch.stack((pairs[:, 0] + pairs[:, 1], pairs[:, 0] - pairs[:, 1]), dim=1)
        half *= 2
    x = x.reshape(-1, columns // power, power) / math.sqrt(power)
    return (x if columns == power else hartley(columns // power).to(x) @ x).reshape(shape)


@cache
def hartley(size: int) -> Tensor:
    """The discrete Hartley transform, fp32 [size, size]."""
    with torch.inference_mode(False):  # kept, and gradients may go through it
        place = torch.arange(size, dtype=torch.float64)
        angle = 2 * math.pi * (place[:, None] * place[None, :] % size) / size
        return ((angle.cos() + angle.sin()) / math.sqrt(size)).float()
