"""Greedy column orders per band of rows (ReALLM's released code): similar columns side by side, so that those that share a scale are
of one size.
"""

from __future__ import annotations

import torch
from torch import Tensor

WINDOW = 16  # the next column is the one nearest to the mean of this many before it


def greedy_order(matrix_OI: Tensor, band: int) -> Tensor:
    """int64 [bands, I], a permutation per band of `band` rows (the last may be ragged).

    The first WINDOW columns stay in place, as there. Indices are tracked: finding a column again by its values, as the released
    code does, fails for equal columns. All bands advance together, O * I^2 multiplications in I steps.
    """
    rows, columns = matrix_OI.shape
    bands_BRI = torch.nn.functional.pad(matrix_OI, (0, 0, 0, -rows % band)).view(-1, band, columns)
    column_BIR = bands_BRI.transpose(1, 2).contiguous()
    square_BI = column_BIR.square().sum(dim=2)
    every_B = torch.arange(len(column_BIR), device=matrix_OI.device)
    order_BI = torch.arange(columns, device=matrix_OI.device).repeat(len(column_BIR), 1)
    first = min(WINDOW, columns)
    square_BI[:, :first] = torch.inf  # taken
    total_BR = column_BIR[:, :first].sum(dim=1)
    for position in range(first, columns):
        # |c - m|^2 less the constant |m|^2
        distance_BI = torch.baddbmm(square_BI[..., None], column_BIR, total_BR[..., None], alpha=-2 / first)[..., 0]
        nearest_B = distance_BI.argmin(dim=1)
        order_BI[:, position] = nearest_B
        square_BI[every_B, nearest_B] = torch.inf
        total_BR = total_BR + column_BIR[every_B, nearest_B] - column_BIR[every_B, order_BI[:, position - first]]
    return order_BI
