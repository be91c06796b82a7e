"""The programs: one input at a time (`gemv`), up to 32 (`gemm`), the second stage of both (`finish`), and the whole
weight (`decode`).

`gemv` and `gemm` sum over a share of the columns. Where there is one share and no low-rank part they finish the rows
themselves; else the shares go to a workspace of fp32 [splits, batch, rows + rank], `right @ x` standing in its last
columns as rows like any other, and `finish` adds them in a fixed order. No atomics: results repeat bitwise."""

# Arguments of programs are the compiler's own kinds of values, which Python's types cannot say.
# mypy: disallow-untyped-defs=False

from __future__ import annotations

import triton
import triton.language as tl

from kernels.triton.decode import places, scale_at, scale_index, shift_at, values, weights


@triton.jit
def finished(stored, y, row, present, F: tl.constexpr):
    """Row scale and bias; `y` fp32 in the shape of `row`, or with an axis of batches in front of it."""
    if F.row_scale:
        y = y * tl.load(stored.row_scale + row, mask=present, other=0.0).to(tl.float32)
    if F.bias:
        y = y + tl.load(stored.bias + row, mask=present, other=0.0).to(tl.float32)
    return y


@triton.jit
def right_rows(
    stored, x, to, first, split, F: tl.constexpr, RANKS: tl.constexpr, COLUMNS: tl.constexpr, SPAN: tl.constexpr
):
    """Components `first` ... of `right @ x` over the columns of a split of SPAN, before scales; stored at `to`,
    fp32."""
    r_R = first + tl.arange(0, RANKS)
    sum_RI = tl.zeros((RANKS, COLUMNS), dtype=tl.float32)
    for at in tl.range(0, SPAN, COLUMNS):
        i_I = split * SPAN + at + tl.arange(0, COLUMNS)
        present_I = i_I < F.columns
        x_I = tl.load(x + i_I, mask=present_I, other=0.0).to(tl.float32)
        right_RI = tl.load(
            stored.right + r_R[:, None] * F.columns + i_I[None, :],
            mask=(r_R < F.rank)[:, None] & present_I[None, :],
            other=0,
        )
        sum_RI += right_RI.to(tl.float32) * x_I[None, :]
    tl.store(to + r_R, tl.sum(sum_RI, axis=1), mask=r_R < F.rank)


@triton.jit
def gemv(
    stored,
    x,
    ordered_x,
    out,
    F: tl.constexpr,
    J: tl.constexpr,
    U: tl.constexpr,
    PER_SPLIT: tl.constexpr,
    FINISH: tl.constexpr,
    RANKS: tl.constexpr,
):
    """Grid (tiles of J vectors, then of RANKS components; splits; batch). A split is PER_SPLIT units, a multiple of U.

    x, ordered_x [batch, columns]; `ordered_x` has its columns in the order of the codes. out: y [batch, rows], or the
    workspace."""
    TILES: tl.constexpr = ((F.rows + F.dim - 1) // F.dim + J - 1) // J
    DIM: tl.constexpr = F.dim
    tile = tl.program_id(0)
    split = tl.program_id(1)
    batch = tl.program_id(2)
    line = (split * tl.num_programs(2) + batch) * (F.rows + F.rank)  # of the workspace
    if tile < TILES:
        vector_J = tile * J + tl.arange(0, J)
        lane_S = tl.arange(0, F.lanes)
        acc_UJD = tl.zeros((U, J, DIM), dtype=tl.float32)
        for at in tl.range(0, PER_SPLIT, U):
            unit_U = split * PER_SPLIT + at + tl.arange(0, U)
            column_US = unit_U[:, None] * F.lanes + lane_S[None, :]
            x_US = tl.load(ordered_x + batch * F.columns + column_US, mask=column_US < F.columns, other=0.0).to(
                tl.float32
            )
            # Tables ask for plain inputs; numbers stand some bits up (decode.values).
            placed_US = (
                x_US if F.table else x_US * ((127 - places(F, True)) << 23).to(tl.float32, bitcast=True)[None, :]
            )
            value_UJSD = values(stored, unit_U, vector_J, F, True)
            index, present = scale_index(unit_U, vector_J, F)
            scale = scale_at(stored, index, present, F)
            if F.one_scale:  # it multiplies the sum of a unit
                sum_UJD = tl.sum(value_UJSD * placed_US[:, None, :, None], axis=2) * tl.sum(scale, axis=2)
                if F.shifted:
                    shift = shift_at(stored, scale, index, present, F)
                    sum_UJD += tl.sum(shift, axis=2) * tl.sum(x_US, axis=1)[:, None, None]
                acc_UJD += sum_UJD
            else:
                sum_UJSD = value_UJSD * scale * placed_US[:, None, :, None]
                if F.shifted:
                    sum_UJSD += shift_at(stored, scale, index, present, F) * x_US[:, None, :, None]
                acc_UJD += tl.sum(sum_UJSD, axis=2)
        y_JD = tl.sum(acc_UJD, axis=0)
        row_JD = vector_J[:, None] * F.dim + tl.arange(0, F.dim)[None, :]
        present_JD = row_JD < F.rows
        if FINISH:
            y_JD = finished(stored, y_JD, row_JD, present_JD, F)
            tl.store(out + batch * F.rows + row_JD, y_JD.to(out.dtype.element_ty), mask=present_JD)
        else:
            tl.store(out + line + row_JD, y_JD, mask=present_JD)
    elif F.rank > 0:
        SPAN: tl.constexpr = PER_SPLIT * F.lanes
        right_rows(
            stored,
            x + batch * F.columns,
            out + line + F.rows,
            (tile - TILES) * RANKS,
            split,
            F,
            RANKS,
            U * F.lanes,
            SPAN,
        )


@triton.jit
def gemm(
    stored,
    x,
    ordered_x,
    out,
    batch,
    F: tl.constexpr,
    N: tl.constexpr,
    J: tl.constexpr,
    U: tl.constexpr,
    PER_SPLIT: tl.constexpr,
    FINISH: tl.constexpr,
    RANKS: tl.constexpr,
):
    """Grid (tiles of J vectors, then of RANKS components of one input after the other; splits). N: `batch` up to a
    power of two of at least 16, the least that tensor cores take. Weights are rounded to the dtype of x, as the
    reference's are."""
    TILES: tl.constexpr = ((F.rows + F.dim - 1) // F.dim + J - 1) // J
    COLUMNS: tl.constexpr = U * F.lanes
    ROWS: tl.constexpr = J * F.dim
    tile = tl.program_id(0)
    split = tl.program_id(1)
    if tile < TILES:
        n_N = tl.arange(0, N)
        vector_J = tile * J + tl.arange(0, J)
        acc_ON = tl.zeros((ROWS, N), dtype=tl.float32)
        for at in tl.range(0, PER_SPLIT, U):
            first = split * PER_SPLIT + at
            column_I = first * F.lanes + tl.arange(0, COLUMNS)
            present_NI = (n_N < batch)[:, None] & (column_I < F.columns)[None, :]
            x_NI = tl.load(ordered_x + n_N[:, None] * F.columns + column_I[None, :], mask=present_NI, other=0.0)
            weight_UJSD = weights(stored, first + tl.arange(0, U), vector_J, F).to(x_NI.dtype)
            # Rows first: a thread's columns stay together.
            weight_OI = tl.reshape(tl.permute(weight_UJSD, (1, 3, 0, 2)), (ROWS, COLUMNS))
            acc_ON = tl.dot(weight_OI, tl.trans(x_NI), acc_ON, input_precision="ieee")
        row_O1 = (tile * ROWS + tl.arange(0, ROWS))[:, None]
        present_ON = (row_O1 < F.rows) & (n_N < batch)[None, :]
        if FINISH:
            y_ON = finished(stored, acc_ON, row_O1, row_O1 < F.rows, F)
            tl.store(out + n_N[None, :] * F.rows + row_O1, y_ON.to(out.dtype.element_ty), mask=present_ON)
        else:
            tl.store(out + (split * batch + n_N)[None, :] * (F.rows + F.rank) + row_O1, acc_ON, mask=present_ON)
    elif F.rank > 0:
        RANK_TILES: tl.constexpr = (F.rank + RANKS - 1) // RANKS
        b = (tile - TILES) // RANK_TILES
        to = out + (split * batch + b) * (F.rows + F.rank) + F.rows
        first = (tile - TILES) % RANK_TILES * RANKS
        right_rows(stored, x + b * F.columns, to, first, split, F, RANKS, COLUMNS, PER_SPLIT * F.lanes)


@triton.jit
def finish(stored, workspace, out, F: tl.constexpr, SPLITS: tl.constexpr, ROWS: tl.constexpr, RANKS: tl.constexpr):
    """Second stage, grid (tiles of ROWS rows, batch): sums of the shares in their order, left @ (right @ x), row scale,
    bias."""
    batch = tl.program_id(1)
    lines = tl.num_programs(1)
    row_O = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    present_O = row_O < F.rows
    y_O = tl.zeros((ROWS,), dtype=tl.float32)
    for split in tl.range(0, SPLITS):
        y_O += tl.load(workspace + (split * lines + batch) * (F.rows + F.rank) + row_O, mask=present_O, other=0.0)
    if F.rank > 0:
        for first in tl.range(0, F.rank, RANKS):
            r_R = first + tl.arange(0, RANKS)
            present_R = r_R < F.rank
            t_R = tl.zeros((RANKS,), dtype=tl.float32)
            for split in tl.range(0, SPLITS):
                t_R += tl.load(
                    workspace + (split * lines + batch) * (F.rows + F.rank) + F.rows + r_R, mask=present_R, other=0.0
                )
            if stored.right_scale is not None:
                t_R *= tl.load(stored.right_scale + r_R, mask=present_R, other=0.0).to(tl.float32)
                t_R *= tl.load(stored.left_scale + r_R, mask=present_R, other=0.0).to(tl.float32)
            left_OR = tl.load(
                stored.left + row_O[:, None] * F.rank + r_R[None, :],
                mask=present_O[:, None] & present_R[None, :],
                other=0,
            )
            y_O += tl.sum(left_OR.to(tl.float32) * t_R[None, :], axis=1)
    y_O = finished(stored, y_O, row_O, present_O, F)
    tl.store(out + batch * F.rows + row_O, y_O.to(out.dtype.element_ty), mask=present_O)


@triton.jit
def decode(stored, out, first, last, F: tl.constexpr, J: tl.constexpr, U: tl.constexpr):
    """The base of rows `first` (a multiple of the vector length) to `last` - 1 in the order of the codes, out [last -
    first, columns]. Grid (tiles of J vectors, tiles of U units)."""
    vector_J = first // F.dim + tl.program_id(0) * J + tl.arange(0, J)
    unit_U = tl.program_id(1) * U + tl.arange(0, U)
    row_UJSD = vector_J[None, :, None, None] * F.dim + tl.arange(0, F.dim)[None, None, None, :]
    column_UJSD = unit_U[:, None, None, None] * F.lanes + tl.arange(0, F.lanes)[None, None, :, None]
    weight_UJSD = weights(stored, unit_U, vector_J, F)
    at = (row_UJSD - first).to(tl.int64) * F.columns + column_UJSD
    tl.store(out + at, weight_UJSD.to(out.dtype.element_ty), mask=(row_UJSD < last) & (column_UJSD < F.columns))
