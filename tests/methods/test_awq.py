"""AWQ against its two searches written out plainly, a column and a group at a time, and what it stores."""

import pytest
import torch

from kernels.formats.layer import LayerConfig, LayerSpec
from methods import parse_method
from methods.base import LayerData
from tests.helpers import decode_uniform

ROWS, COLUMNS, GROUP, TOKENS = 12, 40, 16, 90  # two groups and a ragged one


@pytest.fixture(scope="module")
def loud():
    """(weight, inputs [N, I]): some channels are ten times as loud as others."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(ROWS, COLUMNS, generator=generator) * 0.05
    x = torch.randn(TOKENS, COLUMNS, generator=generator) * torch.randn(COLUMNS, generator=generator).exp() ** 1.5
    return weight, x


def plain_grid(values: torch.Tensor, bits: int) -> torch.Tensor:
    """One group, asymmetric with an integer zero point, its range from the smallest to the largest weight and zero."""
    low, high = min(values.min().item(), 0.0), max(values.max().item(), 0.0)
    scale = torch.tensor((high - low) / (2**bits - 1)).half().float()
    zero = torch.round(-low / scale).clamp(0, 2**bits - 1)
    return ((values / scale + zero).round().clamp(0, 2**bits - 1) - zero) * scale


def rounded(weight: torch.Tensor, bits: int) -> torch.Tensor:
    out = torch.empty_like(weight)
    for o in range(ROWS):
        for start in range(0, COLUMNS, GROUP):
            out[o, start : start + GROUP] = plain_grid(weight[o, start : start + GROUP], bits)
    return out


def plain_awq(weight: torch.Tensor, x: torch.Tensor, bits: int) -> tuple[torch.Tensor, float]:
    """(decoded weight, alpha) as the paper and its code say it: errors are of outputs on the tokens themselves."""
    channel = x.square().mean(dim=0).sqrt()
    tries = []
    for step in range(20):
        s = (channel / channel.max()) ** (step / 20)
        inverse = ((s.max() * s.min()).sqrt() / s).half().float()
        decoded = rounded(weight / inverse, bits) * inverse
        tries.append(((x @ (decoded - weight).T).square().sum().item(), step / 20, inverse))
    _, alpha, inverse = min(tries, key=lambda found: found[0])
    scaled, inputs, out = weight / inverse, x * inverse, torch.empty_like(weight)
    for o in range(ROWS):
        for start in range(0, COLUMNS, GROUP):
            group, seen = scaled[o, start : start + GROUP], inputs[:, start : start + GROUP]
            best = torch.inf
            for step in range(10):
                limit = group.abs().max() * (1 - step / 20)
                found = plain_grid(group.clamp(-limit, limit), bits)
                error = (seen @ (found - group)).square().sum().item()
                if error < best:
                    best, out[o, start : start + GROUP] = error, found
    return out * inverse, alpha


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_it_is_the_papers_algorithm(bits, loud):
    weight, x = loud
    layer = LayerSpec("layer", "layer", ROWS, COLUMNS, bias=False)
    (config,) = parse_method(f"awq:bits={bits},group={GROUP}").candidates(layer)
    done = parse_method("awq").compress(LayerData(weight, hessian_II=x.T @ x), layer, config)
    expected, alpha = plain_awq(weight, x, bits)
    assert done.report["alpha"] == pytest.approx(alpha) and 0 < alpha < 1
    # A clipping that is as good as another but for rounding may be the other: a group of one row.
    same = torch.isclose(done.packed.decode(), expected, rtol=1e-3, atol=1e-5)
    assert same.float().mean() > 0.95

    def error(decoded):
        return (x @ (decoded - weight).T).square().sum().item()

    assert error(done.packed.decode()) == pytest.approx(error(expected), rel=0.02)
    nearest = decode_uniform("rtn", weight, None, bits=bits, group=GROUP, offset="zero")
    assert error(done.packed.decode()) < 0.8 * error(nearest)


def test_the_scales_of_columns_are_stored_and_counted():
    layer = LayerSpec("layer", "layer", 64, 128, bias=False)
    scaled = LayerConfig.of("uniform", bits=4, group=64, offset="zero", permuted=False, column_scales=True)
    assert scaled in parse_method("awq").candidates(layer)
    plain = scaled.without("column_scales").stored_bits(layer)
    assert scaled.stored_bits(layer).total == plain.total + 16 * 128
    assert scaled.stored_bits(layer).scales == plain.scales + 16 * 128


def test_channels_without_input_and_layers_without_any(loud):
    weight, x = loud
    silent = x.clone()
    silent[:, 3] = 0
    for inputs in (silent, torch.zeros_like(x)):
        decoded = decode_uniform("awq", weight, inputs.T @ inputs, bits=4, group=GROUP, column_scales=True)
        assert torch.isfinite(decoded).all() and (decoded - weight).norm() < 0.5 * weight.norm()


@pytest.mark.parametrize("options, advice", [("grid=mse", "write clips=10"), ("clips=0", "at least 1")])
def test_options_that_make_no_sense(options, advice):
    with pytest.raises(ValueError, match=advice):
        parse_method(f"awq:{options}")
