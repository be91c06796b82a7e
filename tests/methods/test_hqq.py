"""HQQ against its turns written out plainly, one group at a time, and what its zero points are for."""

import pytest
import torch

from methods import parse_method
from methods.hqq import shrink
from tests.helpers import decode_uniform


@pytest.fixture(scope="module")
def weight():
    """Heavy tails: a few weights stretch the range of their group."""
    return 0.03 * torch.distributions.StudentT(4.0).sample((24, 112)) + 0.01


@pytest.fixture(scope="module", autouse=True)
def _seed():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


def plain_turns(values: torch.Tensor, bits: int, beta: float) -> list[tuple[float, torch.Tensor]]:
    """(mean error, zero point) of every turn on one group [S]: without a stop, for that is of the whole matrix."""
    top, found = 2**bits - 1, []
    scale = ((values.max() - values.min()) / top).half().float()
    zero = -values.min().half().float() / scale
    for turn in range(20):
        code = (values / scale + zero).round().clamp(0, top)
        off = values - scale * (code - zero)
        found.append((off.abs().sum().item(), zero))
        sparse = off.sign() * (off.abs() - off.abs().clamp_min(1e-12) ** -0.3 / (beta * 1.01**turn)).clamp_min(0)
        zero = (code - (values - sparse) / scale).mean()
    return found


@pytest.mark.parametrize("bits, beta", [(2, 10.0), (3, 10.0), (3, 1000.0)])
def test_it_is_the_published_algorithm(bits, beta, weight):
    group = 64  # and a ragged one of 48
    decoded = decode_uniform(f"hqq:beta={beta:g}", weight, None, bits=bits, group=group, offset="minimum")
    turns = [[plain_turns(part, bits, beta) for part in row.split(group)] for row in weight]
    errors = [sum(part[turn][0] for row in turns for part in row) for turn in range(20)]
    best = next((t for t in range(1, 20) if errors[t] >= errors[t - 1]), 20) - 1
    assert best > 0
    expected = torch.empty_like(weight)
    for o, row in enumerate(weight):
        for g, part in enumerate(row.split(group)):
            scale = ((part.max() - part.min()) / (2**bits - 1)).half().float()
            minimum = (-turns[o][g][best][1] * scale).half().float()
            code = ((part - minimum) / scale).round().clamp(0, 2**bits - 1)
            expected[o, g * group : g * group + len(part)] = code * scale + minimum
    assert torch.allclose(decoded, expected, rtol=1e-3, atol=1e-4)
    nearest = decode_uniform("rtn", weight, None, bits=bits, group=group, offset="minimum")
    assert (decoded - weight).abs().mean() < (nearest - weight).abs().mean()


def test_shrinking_is_the_minimum_it_stands_for():
    """Of |e|^p + beta / 2 (e - x)^2, but for the published step's factor: p = 1 is soft thresholding exactly."""
    x = torch.tensor([-3.0, -0.2, 0.0, 0.4, 2.0])
    e = torch.linspace(-4, 4, 8001)
    plain = e[(e.abs() + 2.0 / 2 * (e - x[:, None]).square()).argmin(dim=1)]
    assert torch.allclose(shrink(x, 2.0, 1.0), plain, atol=1e-3)
    assert torch.equal(shrink(x, 2.0, 0.7)[1:4], torch.zeros(3))


@pytest.mark.parametrize(
    "options, advice", [("offset=zero", "leave offset"), ("norm=1.5", r"norm must be in \(0, 1\]")]
)
def test_options_that_make_no_sense(options, advice):
    with pytest.raises(ValueError, match=advice):
        parse_method(f"hqq:{options}")
