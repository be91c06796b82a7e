"""Which channels of a layer's inputs are taken apart, and which are put together (QLLM, arXiv 2310.08041, sec. 4.1).

    disassembly   channel c with max|x_c| over a threshold stands T_c = ceil(max|x_c| / threshold) times
    assembly      as many channels as were added go: even ones, each into the odd one that it is most like, those first
                  that lose least; none of them is one that was taken apart. Two as one, (x_i + x_j) / 2 with W_i + W_j,
                  change the output by
                      |(x_i - x_j) / 2 (W_i - W_j)|^2 = 1/4 |x_i - x_j|^2 |W_i - W_j|^2        (eq. 4)
    threshold     of a grid from the largest input down, the one with the least error of the layer's output, inputs and
                  weights both rounded; channels may grow by `most` of their number in between

The paper searches the threshold by the outputs of the whole attention or MLP, in 100 steps or more; here it is the
layer's own outputs for a sample of tokens and rows, in at most `TRIES`. Leaving all channels alone is one of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from kernels.formats.activations import quantised
from kernels.formats.reassembly import MOST_COPIES, Reassembly
from methods.base import Inputs

STEPS = 200  # of the threshold, linear
TRIES = 24  # of them whose error is measured, spread over the numbers of channels that are added
ROWS = 256  # of the weight, for errors


def choose(
    weight_OI: Tensor, inputs: Inputs, act_bits: int, rounded: Callable[[Tensor], Tensor], most: float
) -> tuple[Tensor, Tensor]:
    """(place, copies) of every channel, int64 [I], as `Reassembly.tensors` takes them. `rounded` gives a weight as it
    will be stored."""
    sample_NI, some_OI = inputs.sample_NI, weight_OI[:: -(-len(weight_OI) // ROWS)]
    wanted_NO = sample_NI @ some_OI.t()
    best, best_error = None, float("inf")
    for place_I, copies_I in options(weight_OI, inputs, most):
        reassembly = Reassembly.of(place_I, copies_I)
        entering_NI = quantised(reassembly.turn(sample_NI), act_bits)
        found_NO = entering_NI @ rounded(reassembly.gather(some_OI)).t()
        error = float((found_NO - wanted_NO).square().sum())
        if best is None or error < best_error:
            best, best_error = (place_I, copies_I), error
    assert best is not None
    return best


def options(weight_OI: Tensor, inputs: Inputs, most: float) -> Iterator[tuple[Tensor, Tensor]]:
    """(place, copies) for falling thresholds, none taken apart first."""
    columns = weight_OI.shape[1]
    peak_I, largest = inputs.peak_I, float(inputs.peak_I.max())
    yield torch.arange(columns, device=peak_I.device), torch.ones(columns, dtype=torch.long, device=peak_I.device)
    limit, tried = min(int(most * columns), columns // 2), 0
    if not 0 < largest < float("inf") or not limit:
        return
    loss_AB = distances(weight_OI, inputs.sample_NI)[::2, 1::2]
    for step in range(1, STEPS):
        copies_I = torch.ceil(peak_I / (largest * (1 - step / STEPS))).long().clamp(1, MOST_COPIES)
        added = int(copies_I.sum()) - columns
        if added > limit:
            return
        if added >= tried + max(1, limit // TRIES) or (added and not tried):
            tried = added
            if found := assembled(loss_AB, copies_I, added):
                yield found


def distances(weight_OI: Tensor, sample_NI: Tensor) -> Tensor:
    """1/4 |x_i - x_j|^2 |W_i - W_j|^2 of all pairs of channels, [I, I]."""
    return _apart(sample_NI) * _apart(weight_OI) / 4


def _apart(matrix_NI: Tensor) -> Tensor:
    """Squared distances between columns."""
    gram_II = matrix_NI.t() @ matrix_NI
    size_I = gram_II.diagonal()
    return (size_I[:, None] + size_I[None, :] - 2 * gram_II).clamp_min(0)


def assembled(loss_AB: Tensor, copies_I: Tensor, count: int) -> tuple[Tensor, Tensor] | None:
    """Places when `count` even channels (A) go into odd ones (B), and the copies; None where there are not so many."""
    split_I = copies_I > 1
    loss_AB = loss_AB.masked_fill(split_I[::2, None] | split_I[None, 1::2], torch.inf)
    least_A, into_A = loss_AB.min(dim=1)
    gone_A = least_A.argsort(stable=True)[:count]
    if len(gone_A) < count or bool(least_A[gone_A].isinf().any()):
        return None
    gone_I, into = 2 * gone_A, 2 * into_A[gone_A] + 1
    taken_I = copies_I.clone()
    taken_I[gone_I] = 0
    place_I = taken_I.cumsum(0) - taken_I
    place_I[gone_I] = place_I[into]
    return place_I, copies_I
