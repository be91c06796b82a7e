"""What errors cost once later columns have reacted, measured on fewer tokens than would show it.

Inputs are x = z sqrt(spectrum) Q diag(loud), so that their Hessian is known."""

from fractions import Fraction

import pytest
import torch

from harness.model import BlockSpec, Inventory
from harness.plan.allocation import mixed
from harness.plan.costs import considered
from harness.plan.pivots import pivots
from kernels.formats.layer import LayerSpec
from methods import parse_method
from methods.base import Sensitivity
from methods.codecs.error_feedback import prepare

DAMP = 0.01
DECAYS = (0.0, 0.5, 1.0, 1.5)  # of the spectrum, n^-decay


def measured(size: int, tokens: int, decay: float, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """(true Hessian, mean of x x^T over the tokens)."""
    generator = torch.Generator().manual_seed(seed)
    root = torch.arange(1, size + 1).pow(-decay / 2)
    loud = (0.5 * torch.randn(size, generator=generator)).exp()
    mirrors = torch.nn.functional.normalize(torch.randn(16, size, generator=generator))

    def inputs(z_NI: torch.Tensor) -> torch.Tensor:
        x_NI = z_NI * root
        for mirror in mirrors:  # an orthogonal Q that costs next to nothing
            x_NI -= 2 * torch.outer(x_NI @ mirror, mirror)
        return x_NI * loud

    mix, x = inputs(torch.eye(size)), inputs(torch.randn(tokens, size, generator=generator))
    return mix.T @ mix, x.T @ x / tokens


def true_pivots(hessian: torch.Tensor, mean: torch.Tensor) -> torch.Tensor:
    """Those of the true Hessian, its columns taken in the order that the measured one puts them in."""
    order = prepare(mean, act_order=True, damp=DAMP).order_I
    damped = hessian[order][:, order]
    damped.diagonal().add_(DAMP * hessian.diagonal().mean())
    upper = torch.linalg.cholesky(torch.linalg.inv(damped.double()), upper=True)
    return torch.empty(len(order)).index_copy_(0, order, upper.diagonal().square().reciprocal().float())


@pytest.mark.parametrize("size, tokens", [(576, 4096), (512, 512), (1024, 1024)])
def test_pivots_are_those_of_all_text(size, tokens):
    """Within a tenth at as many tokens as inputs, the fewest that layers are measured on, whatever the spectrum."""
    for decay in DECAYS:
        hessian, mean = measured(size, tokens, decay)
        truth = true_pivots(hessian, mean)
        found = pivots(mean, tokens, DAMP)
        assert float(found.mean() / truth.mean()) == pytest.approx(1, abs=0.1), decay
        assert float((found / truth).log().std()) < 0.15, decay
        if tokens == size:  # as they are measured
            assert float(prepare(mean, act_order=True, damp=DAMP).pivot_I.mean() / truth.mean()) < 0.65, decay


def test_a_layer_with_more_inputs_than_tokens_is_not_starved():
    """Two layers alike in everything but the tokens they were measured on share the bits evenly."""
    weight = torch.randn(256, 512, generator=torch.Generator().manual_seed(0))
    method = parse_method("gptq")
    layers = tuple(LayerSpec(name, name, *weight.shape, bias=False) for name in ("many", "few"))
    stock = Inventory((BlockSpec("block", layers),))
    configs = considered(method, layers[0], Fraction(13, 4))

    def bits(pivots_of) -> list[float]:
        costs = {}
        for layer, tokens in zip(layers, (16384, 192), strict=True):
            column = pivots_of(measured(512, tokens, decay=1.0)[1], tokens)
            seen = Sensitivity(torch.ones(256), column)
            costs[layer.name] = dict(
                zip(configs, method.expected_costs(weight, seen, layer, configs, seed=0), strict=True)
            )
        chosen = mixed(stock, Fraction(13, 4), costs).layers
        return [chosen[layer.name].stored_bits(layer).total / layer.weights for layer in layers]

    many, few = bits(lambda mean, tokens: prepare(mean, act_order=True, damp=DAMP).pivot_I)
    assert many - few > 0.7
    many, few = bits(lambda mean, tokens: pivots(mean, tokens, DAMP))
    assert abs(many - few) < 0.3


def test_columns_without_input_and_a_handful_of_tokens():
    """Dead columns change nothing for the others; of five tokens all that is asked is a number that can be used."""
    _, mean = measured(64, 100, decay=1.0)
    wider = torch.zeros(80, 80)
    wider[:64, :64] = mean
    assert torch.allclose(pivots(wider, 100, DAMP)[:64], pivots(mean, 100, DAMP), rtol=1e-4)
    _, mean = measured(512, 5, decay=1.0)
    found = pivots(mean, 5, DAMP)
    assert torch.isfinite(found).all() and (found > 0).all()
    assert (found <= mean.diagonal() + 1.01 * DAMP * mean.diagonal().mean()).all()
