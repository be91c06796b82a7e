"""Trellis codes under a layer's Hessian: the numerics behind `TrellisLinear`.

A column of the weight is one path through the trellis, and the rows of a column are independent under H: the best path
(Viterbi, IEEE Trans. Inf. Theory 13, 1967) takes the place that the nearest level has in GPTQ's column loop, and no
error is left that a later choice in the column could have taken into account. (QTIP, arXiv 2406.11235, codes tiles of
16 x 16, and feeds errors back between groups of columns; here they are fed back after every one.)

The search is exact and the same everywhere: in torch as it stands here, or compiled (kernels/cpu/viterbi.cpp), to the
last bit. It goes down a column step by step, which is nothing for a GPU: of a layer on one, the columns are searched by
the host.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.cpu.build import search
from kernels.formats.scales import BlockScales, quantise_scales
from kernels.formats.trellis import TrellisLinear, level_of_deviation, levels
from methods.base import Sensitivity
from methods.codecs.basis import alike
from methods.codecs.error_feedback import Feedback, run

TINY = 2.0**-20  # a row of zeros still needs a scale to divide by


@dataclass(frozen=True)
class Code:
    """What was measured of a code with windows of 12 bits on 230,000 normal numbers of deviation one."""

    error: float  # mean squared
    reach: float  # by which levels are stretched for the least error


CODES = {  # (bits, weights) of a code
    (1, 1): Code(0.27344, 0.90),
    (3, 2): Code(0.13933, 0.98),
    (2, 1): Code(0.07009, 1.02),
    (5, 2): Code(0.03660, 1.06),
    (3, 1): Code(0.01808, 1.10),
    (7, 2): Code(0.00997, 1.15),
    (4, 1): Code(0.00474, 1.20),
    (5, 1): Code(0.00127, 1.26),
}
# Squared errors of windows of other lengths, relative to those of 12 bits, at 2 bits a weight.
WINDOW_ERRORS = {8: 1.16, 9: 1.10, 10: 1.054, 11: 1.025, 12: 1.0, 13: 0.99, 14: 0.98, 15: 0.97, 16: 0.965}


def expected_cost(rest_OI: Tensor, sensitivity: Sensitivity, bits: int, dim: int, window: int) -> float:
    """What a trellis code for `rest_OI` costs, rotated: an error in proportion to a row's variance, the same in all
    columns."""
    return CODES[bits, dim].error * WINDOW_ERRORS[window] * alike(sensitivity).cost(rest_OI)


def quantise_paths(target_OI: Tensor, packed: TrellisLinear, feedback: Feedback) -> dict[str, Tensor]:
    """Buffers of the base of `packed` that stand for `target_OI`, a path for every column in the feedback's order."""
    rows, columns = target_OI.shape
    reach = CODES[packed.bits, packed.dim].reach / level_of_deviation()
    deviation_O = target_OI.square().mean(dim=1, keepdim=True).sqrt().clamp_min(TINY)
    stored = quantise_scales(reach * deviation_O, packed.scales.form)
    scales = BlockScales(rows, 1, packed.scales.form).to(target_OI.device)
    for name, tensor in stored.items():
        setattr(scales, name, tensor)
    scale_O = scales.decode()[:, 0].clamp_min(torch.finfo(torch.float32).tiny)
    pad = -rows % packed.dim
    weight_O = scale_O.square() / scale_O.square().mean()
    weight_JD = torch.nn.functional.pad(weight_O, (0, pad)).view(-1, packed.dim).cpu()
    host_DS = levels(packed.bits, packed.dim, packed.window)
    level_DS = host_DS.to(target_OI.device)
    code_IJ = torch.empty(columns, len(weight_JD), dtype=torch.int64, device=target_OI.device)
    mask = (1 << packed.bits) - 1

    def quantise(position: int, column: int, values_O: Tensor) -> Tensor:
        value_JD = torch.nn.functional.pad(values_O / scale_O, (0, pad)).view(-1, packed.dim)
        state_J = best_path(value_JD.cpu(), weight_JD, host_DS, packed.bits).to(target_OI.device)
        code_IJ[column] = state_J & mask
        return level_DS[:, state_J].t().reshape(-1)[:rows] * scale_O

    run(target_OI, feedback, quantise)
    return packed.tensors(code_IJ.t(), stored)


def best_path(value_JD: Tensor, weight_JD: Tensor, level_DS: Tensor, bits: int) -> Tensor:
    """The states [J] whose levels are nearest to the values, least sum of weight * (value - level)^2; each shares all
    but its newest `bits` bits with the one before, and the first follows zeros. fp32, on the CPU."""
    compiled = search()
    if compiled is None:
        return _searched(value_JD, weight_JD, level_DS, bits)
    value_JD, weight_JD, level_DS = (tensor.contiguous() for tensor in (value_JD, weight_JD, level_DS))
    steps, dim = value_JD.shape
    count = level_DS.shape[1]
    scratch = torch.empty(2 * count + 16)
    origin = torch.empty(steps * (count >> bits), dtype=torch.uint8)
    state_J = torch.empty(steps, dtype=torch.int32)
    pointers = (tensor.data_ptr() for tensor in (level_DS, scratch, origin, state_J))
    window = count.bit_length() - 1
    compiled.viterbi(value_JD.data_ptr(), weight_JD.data_ptr(), steps, bits, dim, window, *pointers)
    return state_J.long()


def _searched(value_JD: Tensor, weight_JD: Tensor, level_DS: Tensor, bits: int) -> Tensor:
    """`best_path` in torch; the compiled search does the same additions in the same order."""
    count, branches = level_DS.shape[1], 2**bits
    groups = count // branches  # states that agree in all but their oldest bits
    best_P = torch.full((groups,), torch.inf)
    best_P[0] = 0.0  # in front of the first row there are zeros
    origin_JP = torch.zeros(len(value_JD), groups, dtype=torch.uint8)
    cost_S = best_P
    for step, (value_D, weight_D) in enumerate(zip(value_JD, weight_JD, strict=True)):
        if step:
            cost_BP = cost_S.view(branches, groups)
            best_P = cost_BP[0]
            for branch in range(1, branches):  # the first of equals
                less_P = cost_BP[branch] < best_P
                best_P = torch.where(less_P, cost_BP[branch], best_P)
                origin_JP[step].masked_fill_(less_P, branch)
        cost_S = best_P.repeat_interleave(branches)
        for value, weight, level_S in zip(value_D, weight_D, level_DS, strict=True):
            error_S = value - level_S
            cost_S = cost_S + weight * (error_S * error_S)
    state = int((cost_S == cost_S.min()).nonzero()[0])
    state_J = torch.empty(len(value_JD), dtype=torch.int64)
    for step in range(len(value_JD) - 1, -1, -1):
        state_J[step] = state
        group = state >> bits
        state = int(origin_JP[step, group]) * groups + group
    return state_J
