"""Load, unpack, decode: how a program turns stored bytes into a tile of weights. The only place that knows the layouts.

A tile has four axes [U, J, S, D]: U units of columns, J vectors of rows, the S columns of a unit, the D rows of a
vector (1 unless codes index vectors). A unit is as many columns as have their codes within 32 bits, so that a thread
gets all of its codes from one window of the stream: one load where windows divide a word, else two (3 bits: eight
columns, 24 bits of two words). S and D stay inside a thread: shifts by a lane are then constants, an entry of d numbers
is one load, and a scale is read and applied once a unit. Neighbouring threads hold neighbouring units, so that a warp
reads consecutive words: U comes first because the compiler, which cannot see that addresses of windows are consecutive,
deals the first axis to threads first.

Shape suffixes are the axes above, N is inputs; the argument F is a layer's `Form`. Bits are numbered as in
kernels/formats/bitpack.py.
"""

# Arguments of programs are the compiler's own kinds of values, which Python's types cannot say.
# mypy: disallow-untyped-defs=False
# Both branches of an `if` are compiled unless the other one is its `else`.
# ruff: noqa: RET505

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl


class Form(NamedTuple):
    """What is fixed when a program is compiled: everything about a layer but the numbers in its tensors."""

    rows: int
    columns: int
    bits: int  # of a code
    lanes: int  # columns in a unit
    dim: int  # rows in a vector
    table: bool  # codes index a table; else they are numbers
    window: int  # bits of a trellis code's window, which indexes the table; 0: no trellis
    group: int  # columns under a scale
    groups: int  # scales to a row
    one_scale: bool  # the columns of a unit always lie in one group
    scale_bits: int  # 16: fp16 scales, stored as they are
    per_step: int  # scales to a step
    levels: bool  # scale codes index `levels`; else they are numbers
    offset: str  # "" | symmetric | zero | minimum
    shifted: bool  # something is added to scale * value; a symmetric zero point is part of the value
    rank: int
    row_scale: bool
    bias: bool
    first: int = 0  # by which the windows of a trellis are multiplied, for the first and the second row of a code
    second: int = 0


class Stored(NamedTuple):
    """The tensors of a layer. What its form lacks is None."""

    codes: Any  # int32 [ceil(rows / dim), words]
    table: Any  # [2**bits, dim]
    scales: Any  # fp16 [rows, groups], or codes of that many: uint8, or one stream in int32
    steps: Any
    levels: Any  # fp32 [256]
    scale_offset: Any  # fp32 [1]
    minima: Any  # fp16 [rows, groups]
    zeros: Any  # one stream of rows * groups codes, int32
    right: Any  # [rank, columns], int8 or fp16
    left: Any  # [rows, rank]
    right_scale: Any  # fp16 [rank]; None with fp16 factors
    left_scale: Any
    row_scale: Any  # fp16 [rows]
    bias: Any  # fp16 [rows]
    # Bits of 2**23. An argument and no constant: it then has a register, and mask and exponent are one LOP3
    exponent: int = 0x4B000000


def lanes(bits: int) -> int:
    """Columns in a unit."""
    return 8 if bits <= 4 else 4 if bits <= 8 else 2


@triton.jit
def window(words, first, bit, last, present, WIDTH: tl.constexpr):
    """`WIDTH` bits (and more above them) from bit number `bit` of the stream of words `first` to `last` - 1.

    uint32 in the shape of `first + bit`; zero beyond the end of the stream. Windows begin on multiples of their own
    width."""
    word = first + (bit >> 5)
    shift = (bit & 31).to(tl.uint32)
    found = tl.load(words + word, mask=present, other=0).to(tl.uint32, bitcast=True) >> shift
    if 32 % WIDTH != 0:
        above = present & (shift + WIDTH > 32) & (word + 1 < last)
        high = tl.load(words + word + 1, mask=above, other=0).to(tl.uint32, bitcast=True)
        found = found | ((high << 1) << (31 - shift))  # in two steps: a shift by 32 is undefined
    return found


@triton.jit
def code_at(words, index, present, COUNT: tl.constexpr, BITS: tl.constexpr):
    """Codes number `index` of one stream of `COUNT` codes of `BITS` bits, int32."""
    found = window(words, 0, index * BITS, (COUNT * BITS + 31) // 32, present, BITS)
    return (found & ((1 << BITS) - 1)).to(tl.int32)


@triton.jit
def windows(stored, unit_U, vector_J, F: tl.constexpr):
    """The codes of every unit side by side, uint32 [U, J]. Those of vectors or columns that do not exist are codes
    without a meaning."""
    WORDS: tl.constexpr = (F.columns * F.bits + 31) // 32
    VECTORS: tl.constexpr = (F.rows + F.dim - 1) // F.dim
    WIDTH: tl.constexpr = F.lanes * F.bits
    first_UJ = (vector_J * WORDS)[None, :]
    bit_UJ = (unit_U * WIDTH)[:, None]
    present_UJ = ((vector_J >= 0) & (vector_J < VECTORS))[None, :] & (bit_UJ < F.columns * F.bits)
    return window(stored.codes, first_UJ, bit_UJ, first_UJ + WORDS, present_UJ, WIDTH)


@triton.jit
def places(F: tl.constexpr, IN_PLACE: tl.constexpr):
    """How far from the lowest bit a code is left standing when it becomes a number, int32 [S]. See `values`."""
    RUN: tl.constexpr = 23 // F.bits if IN_PLACE else 1
    return tl.arange(0, F.lanes) % RUN * F.bits


@triton.jit
def values(stored, unit_U, vector_J, F: tl.constexpr, IN_PLACE: tl.constexpr):
    """What codes stand for under a scale of one, fp32 [U, J, S, D]: entries of the table, at the code or at what its
    window hashes to (kernels/formats/trellis.py); or themselves, less the zero point if that is the symmetric one.

    A code becomes a number without a conversion: as the low bits of the fp32 number 2**23, which is then subtracted,
    exactly. With IN_PLACE a code is masked out of its window but not shifted, so that value l is 2**places[l] times as
    large; the inputs are divided by that instead, once for all rows. 23 bits of mantissa hold 23 // bits codes, then
    the window is shifted."""
    window_UJS = windows(stored, unit_U, vector_J, F)[:, :, None]
    MASK: tl.constexpr = (1 << F.bits) - 1
    shift_S = (tl.arange(0, F.lanes) * F.bits).to(tl.uint32)
    if F.window:
        state_UJS = ((window_UJS >> shift_S[None, None, :]) & MASK).to(tl.int32)
        for above in tl.static_range(1, (F.window + F.bits - 1) // F.bits):
            above_UJS = windows(stored, unit_U, vector_J - above, F)[:, :, None]
            state_UJS |= ((above_UJS >> shift_S[None, None, :]) & MASK).to(tl.int32) << above * F.bits
        state_UJS &= (1 << F.window) - 1
        multiplier_D = tl.where(tl.arange(0, F.dim) == 0, F.first, F.second)
        place_UJSD = ((state_UJS[:, :, :, None] * multiplier_D[None, None, None, :]) & 0xFFFF) >> 8
        return tl.load(stored.table + place_UJSD).to(tl.float32)
    elif F.table:
        entry_UJS = ((window_UJS >> shift_S[None, None, :]) & MASK).to(tl.int32) * F.dim
        return tl.load(stored.table + entry_UJS[:, :, :, None] + tl.arange(0, F.dim)[None, None, None, :]).to(
            tl.float32
        )
    else:
        place_S = places(F, IN_PLACE)
        field_UJS = (window_UJS >> (shift_S - place_S.to(tl.uint32))[None, None, :]) & (MASK << place_S).to(tl.uint32)[
            None, None, :
        ]
        number_UJS = (field_UJS | stored.exponent.to(tl.uint32)).to(tl.float32, bitcast=True)
        CENTRE: tl.constexpr = (1 << (F.bits - 1)) if F.offset == "symmetric" else 0
        zero_S = ((CENTRE << place_S) + (1 << 23)).to(tl.float32)
        return (number_UJS - zero_S[None, None, :])[:, :, :, None]


@triton.jit
def scale_at(stored, index, present, F: tl.constexpr):
    """Scales number `index` of all (row-major), fp32."""
    if F.scale_bits == 16:
        scale = tl.load(stored.scales + index, mask=present, other=0.0).to(tl.float32)
    else:
        if F.scale_bits == 8:
            code = tl.load(stored.scales + index, mask=present, other=0).to(tl.int32)
        else:
            code = code_at(stored.scales, index, present, F.rows * F.groups, F.scale_bits)
        level = tl.load(stored.levels + code) if F.levels else code.to(tl.float32)
        step = tl.load(stored.steps + index // F.per_step, mask=present, other=0.0).to(tl.float32)
        scale = level * step + tl.load(stored.scale_offset)
    return scale


@triton.jit
def shift_at(stored, scale, index, present, F: tl.constexpr):
    """What is added to scale * value, where there is something: a stored minimum, or minus the scaled zero point. fp32
    in the shape of `scale`."""
    if F.offset == "minimum":
        return tl.load(stored.minima + index, mask=present, other=0.0).to(tl.float32)
    else:
        return -scale * code_at(stored.zeros, index, present, F.rows * F.groups, F.bits).to(tl.float32)


@triton.jit
def scale_index(unit_U, vector_J, F: tl.constexpr):
    """Numbers of the scales of a tile, and which of them exist. [U, J, 1, D] where a unit lies under one scale, else
    [U, J, S, D]."""
    row_JD = vector_J[:, None] * F.dim + tl.arange(0, F.dim)[None, :]
    lane_S = tl.zeros((1,), dtype=tl.int32) if F.one_scale else tl.arange(0, F.lanes)
    column_US = unit_U[:, None] * F.lanes + lane_S[None, :]
    index = (row_JD * F.groups)[None, :, None, :] + (column_US // F.group)[:, None, :, None]
    return index, (row_JD < F.rows)[None, :, None, :] & (column_US < F.columns)[:, None, :, None]


@triton.jit
def weights(stored, unit_U, vector_J, F: tl.constexpr):
    """Weights of a tile without low-rank part and row scales, fp32 [U, J, S, D]."""
    value = values(stored, unit_U, vector_J, F, False)
    index, present = scale_index(unit_U, vector_J, F)
    scale = scale_at(stored, index, present, F)
    if F.shifted:
        return value * scale + shift_at(stored, scale, index, present, F)
    else:
        return value * scale
