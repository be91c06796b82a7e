"""Greedy column orders per band of rows (ReALLM's released code): similar columns side by side, so that those that
share a scale are of one size."""

from __future__ import annotations

import torch
from torch import Tensor

WINDOW = 16  # the next column is the one nearest to the mean of this many before it


def greedy_order(matrix_OI: Tensor, band: int) -> Tensor:
    """int64 [bands, I], a permutation per band of `band` rows (the last may be ragged).

    The first WINDOW columns stay in place, as there. Indices are tracked: finding a column again by its values, as the
    released code does, fails for equal columns. All bands advance together, O * I^2 multiplications in I steps."""
    rows, columns = matrix_OI.shape
    bands_ZSI = torch.nn.functional.pad(matrix_OI, (0, 0, 0, -rows % band)).view(-1, band, columns)
    column_ZIS = bands_ZSI.transpose(1, 2).contiguous()
    square_ZI = column_ZIS.square().sum(dim=2)
    every_Z = torch.arange(len(column_ZIS), device=matrix_OI.device)
    order_ZI = torch.arange(columns, device=matrix_OI.device).repeat(len(column_ZIS), 1)
    first = min(WINDOW, columns)
    square_ZI[:, :first] = torch.inf  # taken
    total_ZS = column_ZIS[:, :first].sum(dim=1)
    for position in range(first, columns):
        # |c - m|^2 less the constant |m|^2
        distance_ZI = torch.baddbmm(square_ZI[..., None], column_ZIS, total_ZS[..., None], alpha=-2 / first)[..., 0]
        nearest_Z = distance_ZI.argmin(dim=1)
        order_ZI[:, position] = nearest_Z
        square_ZI[every_Z, nearest_Z] = torch.inf
        total_ZS = total_ZS + column_ZIS[every_Z, nearest_Z] - column_ZIS[every_Z, order_ZI[:, position - first]]
    return order_ZI
