"""Inputs of few bits, and reassembled ones: the oracle against the definition, the fused product against the oracle."""

import pytest
import torch

from kernels.dispatch import fused, kind, linear, reference_only
from kernels.formats.activations import quantised
from kernels.formats.packed import PackedLinear
from kernels.synthetic import random_layer
from tests.kernels.served import ADDED, SCALAR, TRELLIS, UNIFORM, VECTOR

REASSEMBLED = dict(format="uniform", bits=4, group=0, offset="zero", reassembled=True)
SPECS = [UNIFORM[1], UNIFORM[8], SCALAR[3], VECTOR[8], TRELLIS[1], *ADDED[:2], *ADDED[3:], REASSEMBLED]


def outliers(batch: int, columns: int) -> torch.Tensor:
    x = torch.randn(batch, columns, generator=torch.Generator().manual_seed(batch))
    x[:, columns // 3] *= 30
    return x


@pytest.mark.parametrize("bits", (2, 4, 8))
def test_a_token_has_so_many_levels_and_zero_is_one(bits):
    x = outliers(7, 300)
    x[2] = 0
    x[3] = x[3].abs() + 5  # one side of zero alone
    rounded = quantised(x, bits)
    for given, row in zip(x, rounded, strict=True):
        assert len(row.unique()) <= 2**bits
        step = (given.clamp_min(0).max() - given.clamp_max(0).min()) / (2**bits - 1)
        assert ((row - given).abs() <= 1.001 * step).all()  # half, and half more for the zero point at the ends
        assert ((row / step.clamp_min(1e-9)).round() * step - row).abs().max() <= 1e-5 * given.abs().max()
    assert not rounded[2].any() and quantised(torch.zeros(3), bits).tolist() == [0, 0, 0]
    assert quantised(x, 16) is x


def test_gradients_pass_straight_through():
    x = outliers(3, 40).requires_grad_()
    (quantised(x, 4) * torch.arange(40.0)).sum().backward()
    assert torch.equal(x.grad, torch.arange(40.0).expand(3, 40))


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: "-".join(map(str, spec.values())))
def test_the_fused_product_is_the_oracles(spec):
    if fused(random_layer(spec, 8, 64), "cpu") is None:
        pytest.skip("no compiler here")
    for bits, batch, (rows, columns) in ((8, 1, (192, 576)), (4, 5, (101, 577)), (4, 40, (64, 128))):
        layer = random_layer({**spec, "act_bits": bits}, rows, columns, bias=True)
        assert kind(layer, "cpu") == "fused-16"
        x = outliers(batch, columns)
        with reference_only():
            expected = linear(layer, x)
        off = (linear(layer, x) - expected).norm() / expected.norm()
        # A rotation is summed in another order: an input half way between two levels may take the other.
        step = x.abs().max() / 2**bits / x.norm() if layer.rotation is not None else 0
        assert off <= 2e-4 + 4 * step, (bits, batch, off)
        if not layer.rank:  # whose part is as it was, and most of it here
            plain = x @ layer.decode().t() + layer.bias.float()
            assert (expected - plain).norm() / plain.norm() > 1e-4  # rounding is no word alone


def test_what_is_reassembled_is_the_same_weight():
    layer = random_layer(REASSEMBLED, 32, 100)
    assert layer.reassembly is not None
    x, weight_OI = outliers(5, 100), torch.randn(32, 100)
    merged = layer.reassembly.back(layer.reassembly.gather(weight_OI))
    alone = layer.reassembly.place.bincount(minlength=100)[layer.reassembly.place.long()] == 1
    torch.testing.assert_close(merged[:, alone], weight_OI[:, alone])  # taken apart, and put together again
    with reference_only():
        torch.testing.assert_close(layer(x), x @ layer.decode().t())
    gram_II = x.t() @ x
    turned = layer.reassembly.turn(x)
    torch.testing.assert_close(layer.reassembly.turn_both(gram_II), turned.t() @ turned, rtol=1e-4, atol=1e-2)
    assert layer.reassembly.stored_bits().total == 24 * 100


def test_a_description_says_so_and_is_laid_out_again():
    layer = random_layer({**REASSEMBLED, "act_bits": 4}, 16, 64)
    again = PackedLinear.from_spec(layer.spec(), "cpu")
    again.fill(**{name: layer.get_buffer(name) for name in layer.stored_parts()})
    x = outliers(2, 64)
    assert torch.equal(layer(x), again(x)) and again.act_bits == 4
    again.round_inputs(16)
    assert "act_bits" not in again.spec()
    with pytest.raises(ValueError, match="rounds no inputs"):
        random_layer(dict(format="factors", components=4, bits=8), 16, 64).round_inputs(8)
