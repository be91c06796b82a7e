"""NormalFloat tables: b-bit levels at the quantiles of a normal distribution (QLoRA, arXiv 2305.14314, sec. 3 and app.
E).

Constants of the format, fixed by its name and therefore not stored. `NF4` holds the published fp32 values; `nf_levels`
builds any width the way they were built, which the test compares."""

from __future__ import annotations

from functools import cache
from statistics import NormalDist

import torch
from torch import Tensor

OFFSET = 0.9677083  # probability of the outermost level; QLoRA's (1 - 1/(2*15) + 1 - 1/(2*16)) / 2
NF4 = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)


def nf_levels(bits: int) -> Tensor:
    """2**bits ascending levels in [-1, 1], fp32: 2**(bits-1) - 1 negative, zero, 2**(bits-1) positive."""
    if bits == 4:
        return torch.tensor(NF4)
    half = 2 ** (bits - 1)
    normal = NormalDist()
    low = [normal.inv_cdf(p) for p in torch.linspace(1 - OFFSET, 0.5, half, dtype=torch.float64).tolist()[:-1]]
    high = [normal.inv_cdf(p) for p in torch.linspace(0.5, OFFSET, half + 1, dtype=torch.float64).tolist()[1:]]
    levels = torch.tensor([*low, 0.0, *high], dtype=torch.float64)
    return (levels / levels.abs().max()).float()


def nearest(x: Tensor, levels_K: Tensor) -> Tensor:
    """Index of the level nearest to every number, int64 in the shape of x; `levels_K` ascend, on any device."""
    levels_K = levels_K.to(x.device)
    return torch.bucketize(x, (levels_K[1:] + levels_K[:-1]) / 2)


@cache
def dynamic_map() -> Tensor:
    """The 256 ascending values of the signed 8-bit dynamic format QLoRA quantises its scales to (Dettmers, arXiv
    1511.04561).

    An indicator bit splits the remaining seven between a decimal exponent and a linear fraction: for exponent e = 0 ...
    6 the 2**e fractions are midpoints of an even division of [0.1, 1], times 10**(e - 6); plus zero and one."""
    values = [0.0, 1.0]
    for exponent in range(7):
        edges = torch.linspace(0.1, 1.0, 2**exponent + 1)  # fp32, as the published map is computed
        middles = (edges[:-1] + edges[1:]) / 2.0
        scaled = (10.0 ** (exponent - 6)) * middles
        values += scaled.tolist() + (-scaled).tolist()
    assert len(values) == 256
    return torch.tensor(sorted(values))
