"""`MlpTable`: a table of K vectors kept as a small neural decoder instead of its entries (ReALLM, arXiv 2405.13155,
sec. 3).

A code is split into e0 digits; each digit picks one of a few stored levels, which is the vector-quantised embedding of
e0 numbers; a position-wise perceptron D_phi turns them into d weights:

    z = (level_1[digit_1(k)], ..., level_e0[digit_e0(k)])
    h = GELU(W_1 z + b_1);  h <- h + GELU(W_l h + b_l) for the further layers;  entry_k = S z + W h + b

S, the skip, alone is a product quantiser (`layers=0` stores nothing else), which the perceptron bends. Its size depends
on K through the levels only, so it is worth its error where a large table serves few weights.

All weights of D_phi are stored in `weight_bits` bits, one stream of symmetric codes with an fp16 scale per output row;
levels and biases in fp16. `entries` rounds to fp16: what a fp16 table of the same entries would hold.

Shape suffixes: E digits, L levels of all digits, M weights of D_phi, O their output rows, F biases."""

from __future__ import annotations

from itertools import pairwise
from typing import ClassVar

import torch
from torch import Tensor

from kernels.formats.bitpack import pack, packed_words, unpack
from kernels.formats.tables import Table


class MlpTable(Table):
    """K = 2^index_bits vectors of `dim` weights. `layers` counts hidden layers of `width`, `digits` the numbers a code
    becomes."""

    form: ClassVar[str] = "mlp"
    part_of: ClassVar[dict[str, str]] = dict.fromkeys(("levels", "codes", "row_scale", "biases"), "tables")
    levels: Tensor
    codes: Tensor
    row_scale: Tensor
    biases: Tensor

    def __init__(
        self, dim: int, index_bits: int, *, digits: int = 8, width: int = 32, layers: int = 2, weight_bits: int = 6
    ) -> None:
        super().__init__(dim, index_bits, digits=digits, width=width, layers=layers, weight_bits=weight_bits)
        assert 1 <= digits <= index_bits and layers >= 0 and (width >= 1 or not layers) and 2 <= weight_bits <= 16
        self.layers, self.weight_bits = layers, weight_bits
        # The first digits take what does not divide evenly.
        self.digit_bits = tuple(index_bits // digits + (digit < index_bits % digits) for digit in range(digits))
        hidden = [digits] + [width] * layers
        self.shapes = [(out, into) for into, out in pairwise(hidden)] + [(dim, width)] * bool(layers) + [(dim, digits)]
        self.bias_sizes = [width] * layers + [dim]
        self.weights = sum(out * into for out, into in self.shapes)
        self.register_buffer("levels", torch.empty(sum(2**bits for bits in self.digit_bits), dtype=torch.float16))
        self.register_buffer("codes", torch.empty(1, packed_words(self.weights, weight_bits), dtype=torch.int32))
        self.register_buffer("row_scale", torch.empty(sum(out for out, _ in self.shapes), dtype=torch.float16))
        self.register_buffer("biases", torch.empty(sum(self.bias_sizes), dtype=torch.float16))

    def level_index(self) -> Tensor:
        """Where in `levels` the digits of every code stand, int64 [K, E]; the first digit is the most significant
        one."""
        code_K = torch.arange(2**self.index_bits, device=self.levels.device)
        column, below, start = [], self.index_bits, 0
        for bits in self.digit_bits:
            below -= bits
            column.append(start + ((code_K >> below) & ((1 << bits) - 1)))
            start += 1 << bits
        return torch.stack(column, dim=1)

    def evaluate(self, index_KE: Tensor, level_L: Tensor, weight_M: Tensor, bias_F: Tensor) -> Tensor:
        """Entries [K, D] of these decoded buffers in their own dtype, differentiable: training and decoding are one
        code."""
        matrices = self.matrices(weight_M)
        biases = bias_F.split(self.bias_sizes)
        digit_KE = level_L[index_KE]
        entry_KD = torch.addmm(biases[-1], digit_KE, matrices[-1].t())
        hidden_KH: Tensor | None = None
        for matrix, bias in zip(matrices[:-2], biases[:-1], strict=True):
            into = digit_KE if hidden_KH is None else hidden_KH
            step_KH = torch.nn.functional.gelu(torch.addmm(bias, into, matrix.t()))
            hidden_KH = step_KH if hidden_KH is None else hidden_KH + step_KH
        return entry_KD if hidden_KH is None else torch.addmm(entry_KD, hidden_KH, matrices[-2].t())

    def compute(self) -> Tensor:
        """The table in fp16 [K, D].

        Found in fp64: in fp32 the last bits depend on the device, and an entry near the middle of two fp16 numbers
        would round one way where it is scored and the other way where it is served."""
        middle = 2 ** (self.weight_bits - 1)
        step_M = (unpack(self.codes, self.weight_bits, self.weights)[0] - middle).double()
        weight_M = step_M * self._per_weight(self.row_scale).double()
        entry_KD = self.evaluate(self.level_index(), self.levels.double(), weight_M, self.biases.double())
        return entry_KD.clamp(-65504.0, 65504.0).half()

    def straight_through(self, weight_M: Tensor) -> Tensor:
        """What `store` makes of these weights, with the gradient of the identity: quantisation-aware training."""
        step_M, scale_O = self._quantise(weight_M.detach())
        return weight_M + (step_M * self._per_weight(scale_O).float() - weight_M.detach())

    def store(self, level_L: Tensor, weight_M: Tensor, bias_F: Tensor) -> dict[str, Tensor]:
        """Buffers of these trained numbers, by name."""
        step_M, scale_O = self._quantise(weight_M)
        codes = pack((step_M + 2 ** (self.weight_bits - 1)).long()[None], self.weight_bits)
        return {"levels": level_L.half(), "codes": codes, "row_scale": scale_O, "biases": bias_F.half()}

    def matrices(self, weight_M: Tensor) -> list[Tensor]:
        """The weights of D_phi as matrices [out, in]: hidden layers, W, S."""
        flat = weight_M.split([out * into for out, into in self.shapes])
        return [part.view(shape) for part, shape in zip(flat, self.shapes, strict=True)]

    def _quantise(self, weight_M: Tensor) -> tuple[Tensor, Tensor]:
        """Symmetric codes around zero, whole numbers [M], and the fp16 scales of the rows [O]."""
        largest = 2 ** (self.weight_bits - 1) - 1
        absmax_O = torch.cat([matrix.abs().amax(dim=1) for matrix in self.matrices(weight_M)])
        scale_O = (absmax_O / largest).clamp(2.0**-24, 65504.0).half()  # smallest and largest finite fp16
        return torch.round(weight_M / self._per_weight(scale_O).float()).clamp_(-largest, largest), scale_O

    def _per_weight(self, row_O: Tensor) -> Tensor:
        """One value per output row, repeated over its weights: [M]."""
        rows = row_O.split([out for out, _ in self.shapes])
        parts = [row[:, None].expand(shape).reshape(-1) for row, shape in zip(rows, self.shapes, strict=True)]
        return torch.cat(parts)
