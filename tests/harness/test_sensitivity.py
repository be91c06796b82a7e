"""The predicted divergence against the measured one, on real weights and text."""

import pytest
import torch

from harness.model import load_reference
from harness.protocol import parse_calibration
from harness.sensitivity import measure_sensitivities, random_tokens
from harness.windows import calibration_windows

LAYERS = ("self_attn.q_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj")


@pytest.fixture(scope="module")
def tokens(tokenizer) -> torch.Tensor:
    return calibration_windows(parse_calibration("c4-mini@256x8"), tokenizer, seed=0).tokens_NL


@pytest.fixture(scope="module")
def reference(truncated):
    return load_reference(truncated.path, "cpu", torch.float32)


@torch.no_grad()
def log_p(model, tokens):
    return model(tokens).logits.log_softmax(dim=-1)


def test_a_small_error_costs_what_is_predicted(reference, tokens):
    """Independent noise on one layer at a time. Values of the first block are the known exception: attention averages them over
    nearly equal inputs, so their errors add up over tokens instead of averaging out."""
    sensitivity = measure_sensitivities(reference, tokens, seed=0, feedback=False)
    before = log_p(reference, tokens)
    generator = torch.Generator().manual_seed(0)
    ratios = {}
    for block in (0, 2):
        for kind in LAYERS:
            layer = reference.get_submodule(f"model.layers.{block}.{kind}")
            original = layer.weight.data
            noise = 0.02 * original.std() * torch.randn(original.shape, generator=generator)
            layer.weight.data = original + noise
            after = log_p(reference, tokens)
            layer.weight.data = original
            measured = (before.exp() * (before - after)).sum(dim=-1).mean().item()
            ratios[block, kind] = measured / sensitivity[f"model.layers.{block}.{kind}"].cost(noise)
    assert ratios.pop((0, "self_attn.v_proj")) > 2
    assert all(0.5 < ratio < 2 for ratio in ratios.values()), ratios


def test_feedback_lowers_what_a_column_costs(reference, tokens):
    plain, fed_back = (measure_sensitivities(reference, tokens, seed=0, feedback=value) for value in (False, True))
    assert set(plain) == set(fed_back) and len(plain) == 4 * 7
    for name, sensitivity in plain.items():
        assert torch.equal(sensitivity.row_O, fed_back[name].row_O)
        damped = sensitivity.column_I + 0.01 * sensitivity.column_I.mean()
        assert (fed_back[name].column_I <= damped * 1.001).all() and fed_back[name].column_I.mean() < 0.8 * damped.mean()


def test_measuring_leaves_no_trace(reference, tokens):
    before = log_p(reference, tokens[:2])
    first = measure_sensitivities(reference, tokens[:2], seed=0)
    second = measure_sensitivities(reference, tokens[:2], seed=0)
    assert all(torch.equal(first[name].row_O, second[name].row_O) for name in first)
    assert torch.equal(before, log_p(reference, tokens[:2]))
    assert all(p.requires_grad and p.grad is None for p in reference.parameters())
    assert torch.equal(random_tokens(100), random_tokens(100)) and int(random_tokens(100).max()) == 99
