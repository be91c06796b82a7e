"""Bit packing: `bits`-wide codes in a little-endian bit stream of 32-bit words, one stream per row.

Thirty-two codes of b bits fill exactly b words, so the layout repeats every 32 codes and both directions are a loop
over those 32 lanes, each lane vectorised over the whole matrix. Code n of a row occupies bits [n*b, n*b + b) of its
stream. The last word of a row is padded with zero bits; the padding is stored, and therefore counted.

Shapes: `codes_ON` holds O rows of N codes, `words_OW` the O packed rows of W = ceil(N * bits / 32) int32 words.
"""

from __future__ import annotations

import torch
from torch import Tensor

WORD_BITS = 32


def packed_words(count: int, bits: int) -> int:
    """Words in one packed row of `count` codes of `bits` bits."""
    return -(-count * bits // WORD_BITS)


def pack(codes_ON: Tensor, bits: int) -> Tensor:
    """Pack integer codes in [0, 2**bits) into int32 words [O, ceil(N * bits / 32)]; 1 <= bits <= 16."""
    assert 1 <= bits <= 16 and codes_ON.ndim == 2
    rows, count = codes_ON.shape
    periods = -(-count // WORD_BITS)
    lanes = torch.nn.functional.pad(codes_ON.to(torch.int64), (0, periods * WORD_BITS - count))
    lanes = lanes.view(rows, periods, WORD_BITS)
    # One word more than a period takes: where the last lane would spill, which is always zero.
    words = torch.zeros(rows, periods, bits + 1, dtype=torch.int64, device=codes_ON.device)
    for lane in range(WORD_BITS):
        word, shift = divmod(lane * bits, WORD_BITS)
        value = lanes[:, :, lane] << shift
        words[:, :, word] |= value & 0xFFFFFFFF
        words[:, :, word + 1] |= value >> WORD_BITS
    flat = words[:, :, :bits].reshape(rows, periods * bits)[:, : packed_words(count, bits)]
    return torch.where(flat >= 1 << 31, flat - (1 << 32), flat).to(torch.int32).contiguous()


def unpack(words_OW: Tensor, bits: int, count: int) -> Tensor:
    """Inverse of `pack`: the first `count` codes of every row, int32 [O, count]."""
    rows, stored = words_OW.shape
    assert words_OW.dtype == torch.int32 and stored == packed_words(count, bits)
    periods = -(-count // WORD_BITS)
    words = torch.nn.functional.pad(words_OW, (0, periods * bits - stored)).view(rows * periods, bits)
    words = words.t().contiguous()  # lane-major: every step below then runs over contiguous memory
    codes = torch.empty(WORD_BITS, rows * periods, dtype=torch.int32, device=words_OW.device)
    for lane in range(WORD_BITS):
        word, shift = divmod(lane * bits, WORD_BITS)
        # An arithmetic shift: the mask below cuts the sign off.
        value = torch.bitwise_right_shift(words[word], shift, out=codes[lane])
        spill = shift + bits - WORD_BITS
        if spill > 0:  # the code straddles two words: cut the sign off before the upper part comes in
            value &= (1 << (bits - spill)) - 1
            value |= words[word + 1] << (bits - spill)
    codes &= (1 << bits) - 1
    return codes.t().reshape(rows, periods * WORD_BITS)[:, :count]
