"""The predicted divergence against the measured one, on real weights and text."""

from fractions import Fraction

import pytest
import torch

from harness.data.protocols import parse_calibration
from harness.data.windows import calibration_windows
from harness.model import inventory, load_reference
from harness.plan import sensitivity as measuring
from harness.plan.costs import considered
from harness.plan.sensitivity import measure_sensitivities, random_tokens
from harness.plan.unfinished import Unfinished
from harness.progress import silent
from methods import parse_method
from methods.base import LayerData

LAYERS = ("self_attn.q_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj")


@pytest.fixture(scope="module")
def tokens(short_tokenizer) -> torch.Tensor:
    return calibration_windows(parse_calibration("c4-mini@256x4"), short_tokenizer, seed=0).tokens_NT


@pytest.fixture(scope="module")
def reference(four_blocks):
    return load_reference(four_blocks.path, "cpu", torch.float32)


@pytest.fixture(scope="module")
def sensitivities(reference, tokens):
    """With and without feedback between columns -> layer name -> its sensitivity."""
    return {feedback: measure_sensitivities(reference, tokens, seed=0, feedback=feedback) for feedback in (False, True)}


@torch.no_grad()
def log_p(model, tokens):
    return model(tokens).logits.log_softmax(dim=-1)


def test_a_small_error_costs_what_is_predicted(reference, tokens, sensitivities):
    """Independent noise on one layer at a time. Values are the known exception: attention averages them over tokens,
    and where their inputs are nearly equal (the first blocks) errors add up instead of averaging out."""
    sensitivity = sensitivities[False]
    before = log_p(reference, tokens)
    p = before.exp()
    generator = torch.Generator().manual_seed(0)
    ratios = {}
    for block in (0, 2):
        for role in LAYERS:
            layer = reference.get_submodule(f"model.layers.{block}.{role}")
            original = layer.weight.data
            noise = 0.02 * original.std() * torch.randn(original.shape, generator=generator)
            layer.weight.data = original + noise
            after = log_p(reference, tokens)
            layer.weight.data = original
            # In place: every one of these tensors is 200 MB.
            measured = torch.sub(before, after, out=after).mul_(p).sum(dim=-1).mean().item()
            ratios[block, role] = measured / sensitivity[f"model.layers.{block}.{role}"].cost(noise)
    wrong = {
        name: ratio
        for name, ratio in ratios.items()
        if not 1 / 3 < ratio < (20 if name[1] == "self_attn.v_proj" else 3)
    }
    assert not wrong, wrong


def test_feedback_lowers_what_a_column_costs(sensitivities):
    plain, fed_back = sensitivities[False], sensitivities[True]
    assert set(plain) == set(fed_back) and len(plain) == 4 * 7
    for name, sensitivity in plain.items():
        assert torch.equal(sensitivity.row_O, fed_back[name].row_O)
        damped = sensitivity.column_I + 0.01 * sensitivity.column_I.mean()
        assert (fed_back[name].column_I <= damped * 1.001).all() and fed_back[
            name
        ].column_I.mean() < 0.8 * damped.mean()


def test_measuring_leaves_no_trace(reference, tokens):
    before = log_p(reference, tokens[:2])
    first = measure_sensitivities(reference, tokens[:2], seed=0)
    second = measure_sensitivities(reference, tokens[:2], seed=0)
    assert all(torch.equal(first[name].row_O, second[name].row_O) for name in first)
    assert torch.equal(before, log_p(reference, tokens[:2]))
    assert all(p.requires_grad and p.grad is None for p in reference.parameters())
    assert torch.equal(random_tokens(100), random_tokens(100)) and int(random_tokens(100).max()) == 99


@pytest.mark.parametrize("method", ["rtn", "nf", "gptq", "reallm"])
def test_estimated_costs_are_those_of_the_packed_layer(method, reference, tokens, sensitivities):
    """Up to a factor that hardly differs between configurations, which is all an allocation needs."""
    parsed = parse_method(method)
    feedback = parsed.needs.hessian
    measured = sensitivities[feedback]
    ratios = []
    for name in ("model.layers.1.self_attn.v_proj", "model.layers.2.mlp.up_proj"):
        layer = next(x for x in inventory(reference).layers if x.name == name)
        weight = reference.get_submodule(name).weight.detach()
        hessian = hessian_at(reference, name, tokens) if feedback else None
        configs = [
            c
            for c in considered(parsed, layer, Fraction(13, 4))
            if 2.5 < c.stored_bits(layer).total / layer.weights < 4.5
        ]
        # Longer ones take half a minute to fit.
        configs = [c for c in configs if not c.table_key or c["index_bits"] <= 9]
        configs = configs[:: max(1, len(configs) // 5)]
        estimates = parsed.expected_costs(weight, measured[name], layer, configs, seed=0)
        for config, estimate in zip(configs, estimates, strict=True):
            tables = parsed.fit_tables({name: config}, [layer], lambda _, weight=weight: weight, seed=0)
            data = LayerData(weight, hessian_II=hessian, table=tables.get(config.table_key))
            error = weight - parsed.compress(data, layer, config).packed.decode()
            real = (
                0.5 * float(measured[name].row_O @ ((error @ hessian) * error).sum(dim=1))
                if feedback
                else measured[name].cost(error)
            )
            ratios.append(real / estimate)
    spread = torch.tensor(ratios).log().std().exp()
    assert all(0.4 < ratio < 2.5 for ratio in ratios) and spread < 1.35, (ratios, spread)


def hessian_at(model, name, tokens):
    """Mean of x x^T over the windows the sensitivities were measured on."""
    inputs = []
    hook = model.get_submodule(name).register_forward_hook(lambda module, args, out: inputs.append(args[0].detach()))
    with torch.no_grad():
        model(tokens)
    hook.remove()
    x = inputs[0].reshape(-1, inputs[0].shape[-1])
    return x.t() @ x / len(x)


class _Stopped(Exception):
    """In the middle of a measurement."""


@pytest.mark.parametrize("measure", ["feedback", "fisher"])
def test_a_measurement_that_was_killed_goes_on_to_the_last_bit(measure, two_blocks, tmp_path, monkeypatch):
    monkeypatch.setattr("harness.plan.unfinished.SAVE_S", 0.0)
    monkeypatch.setattr("harness.plan.unfinished.SHARE", torch.inf)
    monkeypatch.setattr(measuring, "FISHER_TOKENS", 32)  # one window at once
    tokens_NT = torch.randint(1000, (4, 32), generator=torch.Generator().manual_seed(0))
    model = load_reference(two_blocks.path, "cpu", torch.float32)

    def measured(progress, unfinished):
        if measure == "fisher":
            return measuring.measure_fisher(model, tokens_NT, progress, unfinished)
        return measuring.measure_sensitivities(model, tokens_NT, 0, True, progress, unfinished)

    whole = measured(silent, measuring.NOWHERE)
    path = tmp_path / "unfinished.safetensors"
    attempts = 0

    def stop(phase, done, total):
        """Killed in every step, once what there was is kept."""
        if path.exists() and path.stat().st_mtime_ns != begun:
            raise _Stopped

    while True:
        begun = path.stat().st_mtime_ns if path.exists() else 0
        try:
            found = measured(stop, Unfinished(path))
            break
        except _Stopped:
            attempts += 1
    assert attempts >= 2
    assert found.keys() == whole.keys()
    for name, vectors in whole.items():
        assert torch.equal(found[name].row_O, vectors.row_O) and torch.equal(found[name].column_I, vectors.column_I)
