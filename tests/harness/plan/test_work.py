"""Predicted arithmetic against the operations that torch counts."""

from fractions import Fraction

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM

from harness.compress.loop import compress_model
from harness.data.protocols import parse_calibration
from harness.model import inventory
from harness.plan import work
from harness.plan.allocation import uniform
from harness.plan.sensitivity import measure_fisher, measure_sensitivities
from methods import parse_method
from tests.helpers import planned_cell

WIDTH, INNER, VOCABULARY, CONTEXT, SEQUENCES = 512, 1024, 256, 64, 80


@pytest.fixture
def model():
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=WIDTH,
        intermediate_size=INNER,
        num_hidden_layers=1,
        num_attention_heads=8,
        num_key_value_heads=4,
        vocab_size=VOCABULARY,
    )
    return LlamaForCausalLM(config).eval()


def predicted(monkeypatch, stock, method):
    """Without the factorisations, which torch does not count."""
    for name in ("PIVOTS", "FACTORS", "SOLVE"):
        monkeypatch.setattr(work, name, 0)
    calibration = parse_calibration(f"c4-mini@{CONTEXT}x{SEQUENCES}")
    cell = planned_cell(method, "3.25", calibration=calibration, allocate="ilp")
    return work.predicted_flop(cell, stock, WIDTH, VOCABULARY)


def counting():
    """torch does not know the in-place product that Gram matrices are summed with."""

    def product(total_shape, a_shape, b_shape, **_):
        return 2 * a_shape[0] * a_shape[1] * b_shape[1]

    return FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: product})


def test_stages_are_those_that_a_run_sees(model):
    names = [[layer.role for layer in stage] for stage in work.stages(inventory(model).blocks[0])]
    assert names == [
        ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
        ["self_attn.o_proj"],
        ["mlp.gate_proj", "mlp.up_proj"],
        ["mlp.down_proj"],
    ]


def test_measuring_takes_what_is_predicted(model, monkeypatch):
    tokens_NT = torch.randint(VOCABULARY, (SEQUENCES, CONTEXT), generator=torch.Generator().manual_seed(0))
    expected = predicted(monkeypatch, inventory(model), "gptq")["measure layers"]
    monkeypatch.setattr("harness.plan.sensitivity.pivots", lambda mean_II, tokens, damp: mean_II.diagonal().clone())
    with counting() as counted:
        measure_sensitivities(model, tokens_NT, seed=0)
    assert expected == pytest.approx(counted.get_total_flops(), rel=0.15)


def test_the_fisher_information_takes_what_is_predicted(model, monkeypatch):
    tokens_NT = torch.randint(VOCABULARY, (SEQUENCES, CONTEXT), generator=torch.Generator().manual_seed(0))
    expected = predicted(monkeypatch, inventory(model), "lq-lora:price=fisher")["measure layers"]
    with counting() as counted:
        measure_fisher(model, tokens_NT)
    assert expected == pytest.approx(counted.get_total_flops(), rel=0.15)


def test_packing_takes_what_is_predicted(model, monkeypatch, tmp_path):
    """What the method does with its statistics; the passes run in threads, where torch does not count."""
    tokens_NT = torch.randint(VOCABULARY, (SEQUENCES, CONTEXT), generator=torch.Generator().manual_seed(0))
    stock, method = inventory(model), parse_method("gptq")
    passes = 2 * 2 * tokens_NT.numel() * (stock.weights + 2 * CONTEXT * WIDTH * len(stock.blocks))
    expected = predicted(monkeypatch, stock, "gptq")["compress"] - passes
    configs = uniform(method, stock, Fraction(13, 4)).layers
    with counting() as counted:
        compress_model(model, stock, method, configs, tokens_NT, 0, tmp_path)
    assert expected == pytest.approx(counted.get_total_flops(), rel=0.25)


def test_passes_that_take_turns_are_counted_as_often_as_they_run(model, monkeypatch):
    stock = inventory(model)
    once = predicted(monkeypatch, stock, "gptq")["compress"]
    monkeypatch.setattr("harness.compress.block.PASSES_BYTES", 0)
    assert once < predicted(monkeypatch, stock, "gptq")["compress"] < 3 * once
