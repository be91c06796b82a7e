"""Divergence from the reference, against full-logit computations."""

import pytest
import torch

from harness.data.protocols import parse_protocol
from harness.data.windows import evaluation_windows
from harness.evaluate.score import noise_floor, score
from harness.model import load_reference
from harness.store.results import KLD_EDGES


@pytest.fixture(scope="module")
def tokens(short_tokenizer):
    return evaluation_windows(parse_protocol("wiki-mini@64/5"), short_tokenizer).tokens_NT


def test_divergence_is_the_textbook_sum(truncated, tokens, tmp_path):
    reference, other = (load_reference(truncated.path, "cpu", torch.float32) for _ in range(2))
    with torch.no_grad():
        for parameter in other.model.layers[1].parameters():
            parameter.mul_(1.1)
    first = score(reference, tokens, keep=tmp_path / "states.safetensors")
    assert first.divergence is None
    got = score(other, tokens, reference=tmp_path / "states.safetensors").divergence
    with torch.no_grad():
        log_p, log_q = (m(tokens).logits[:, :-1].double().log_softmax(-1) for m in (reference, other))
    kld = (log_p.exp() * (log_p - log_q)).sum(-1)
    assert got.kld == pytest.approx(kld.mean().item(), rel=1e-4)
    assert list(got.window_kld) == pytest.approx(kld.mean(dim=1).tolist(), rel=1e-3)
    assert got.kld_p90 == pytest.approx(kld.flatten().quantile(0.9).item(), rel=1e-3)
    assert got.kld_p999 == pytest.approx(kld.flatten().quantile(0.999).item(), rel=1e-3)
    assert got.reverse_kld == pytest.approx((log_q.exp() * (log_q - log_p)).sum(-1).mean().item(), rel=1e-4)
    assert sum(got.histogram) == kld.numel()
    below = [sum(got.histogram[:n]) for n in range(1, 34)]
    assert below == [int((kld < edge).sum()) for edge in KLD_EDGES]
    assert list(got.position_kld) == pytest.approx([part.mean().item() for part in kld.tensor_split(16, 1)], rel=1e-3)
    assert got.top1 == pytest.approx((log_p.argmax(-1) == log_q.argmax(-1)).double().mean().item())


def test_the_floor_is_above_nothing_and_below_any_method(truncated, tokens, tmp_path):
    model = load_reference(truncated.path, "cpu", torch.float32)
    score(model, tokens, keep=tmp_path / "states.safetensors")
    floor = noise_floor(model, tokens, tmp_path / "states.safetensors")
    again = score(model, tokens, reference=tmp_path / "states.safetensors").divergence
    assert abs(again.kld) < 1e-6 and again.top1 == 1
    assert 1e-9 < floor.kld < 1e-2 and floor.top1 > 0.9
    assert noise_floor(model, tokens, tmp_path / "states.safetensors") == floor


def test_a_loss_that_is_no_number_is_flagged(truncated, tokens):
    model = load_reference(truncated.path, "cpu", torch.float32)
    with torch.no_grad():
        model.model.norm.weight[0] = torch.nan
    result = score(model, tokens)
    assert result.nonfinite_windows == 5 and result.ppl != result.ppl
