"""QLLM's reassembly against its definitions, and on the first blocks of the real model."""

from dataclasses import replace
from fractions import Fraction
from itertools import product

import pytest
import torch

from harness.compress.loop import compress_model
from harness.data.protocols import parse_calibration
from harness.data.windows import calibration_windows
from harness.model import inventory, load_reference
from harness.plan.allocation import uniform
from kernels.formats.activations import quantised
from kernels.formats.layer import LayerSpec
from kernels.formats.reassembly import Reassembly
from methods import parse_method
from methods.base import Inputs, LayerData
from methods.codecs.reassembly import assembled, choose, distances, options


@pytest.fixture(scope="module")
def layer() -> tuple[torch.Tensor, Inputs]:
    """A weight, and inputs three of whose channels are outliers."""
    generator = torch.Generator().manual_seed(0)
    sample_NI = torch.randn(256, 96, generator=generator)
    sample_NI[:, [5, 40, 77]] *= torch.tensor([12.0, 25.0, 60.0])
    weight_OI = torch.randn(64, 96, generator=generator)
    weight_OI[:, [5, 40, 77]] /= 10
    return weight_OI, Inputs(sample_NI.abs().amax(dim=0), sample_NI)


def test_the_loss_of_two_as_one_is_what_the_output_changes_by(layer):
    weight_OI, inputs = layer
    found = distances(weight_OI, inputs.sample_NI)
    for i, j in ((0, 1), (5, 40), (33, 90)):
        x_NI, joined = inputs.sample_NI, weight_OI[:, i] + weight_OI[:, j]
        change = (x_NI[:, i] + x_NI[:, j])[:, None] / 2 * joined - x_NI[:, [i, j]] @ weight_OI[:, [i, j]].t()
        assert found[i, j] == pytest.approx(float(change.square().sum()), rel=1e-3)


def test_as_many_go_as_were_added_and_none_that_was_taken_apart(layer):
    weight_OI, inputs = layer
    loss_AB = distances(weight_OI, inputs.sample_NI)[::2, 1::2]
    seen = 0
    for place_I, copies_I in options(weight_OI, inputs, 0.3):
        reassembly = Reassembly(96)
        reassembly.load_state_dict(reassembly.tensors(place_I, copies_I), assign=True)
        channel_L, place_L, _ = reassembly.links()
        assert sorted(set(place_L.tolist())) == list(range(96))  # every place is taken
        members_I = place_L.bincount(minlength=96)
        shared = {int(c) for c, p in zip(channel_L, place_L, strict=True) if members_I[p] > 1}
        assert not shared & set((copies_I > 1).nonzero().flatten().tolist())
        # The limit of what any place holds falls with every step, down to that of the unsplit.
        seen += bool((copies_I > 1).any())
        if (added := int(copies_I.sum()) - 96) == 1:
            (gone,) = (c for c in shared if c % 2 == 0)
            free_AB = loss_AB[(copies_I == 1)[::2]][:, (copies_I == 1)[1::2]]
            (kept,) = shared - {gone}
            assert loss_AB[gone // 2, kept // 2] == free_AB.min() and added == 1
    assert seen >= 5
    assert assembled(torch.zeros(2, 2), torch.tensor([1, 2, 3, 1]), 2) is None


def test_outliers_of_few_bits_are_taken_apart_and_nothing_else_is(layer):
    weight_OI, inputs = layer
    place_I, copies_I = choose(weight_OI, inputs, 4, lambda w: w, 0.3)
    assert copies_I[77] > 1 and copies_I[77] == copies_I.max()
    reassembly = Reassembly(96)
    reassembly.load_state_dict(reassembly.tensors(place_I, copies_I), assign=True)
    wanted = inputs.sample_NI @ weight_OI.t()
    turned = quantised(reassembly.turn(inputs.sample_NI), 4) @ reassembly.gather(weight_OI).t()
    alone = quantised(inputs.sample_NI, 4) @ weight_OI.t()
    assert (turned - wanted).norm() < 0.7 * (alone - wanted).norm()
    assert choose(weight_OI, inputs, 16, lambda w: w, 0.3)[1].max() == 1  # nothing to gain
    empty = Inputs(torch.zeros(96), inputs.sample_NI[:0])  # an expert that no token reached
    assert choose(weight_OI, empty, 4, lambda w: w, 0.3)[1].max() == 1


def test_what_is_stored_is_that(layer):
    """Rounding to nearest of the gathered weight; and the published size with our tables beside it."""
    weight_OI, inputs = layer
    method = parse_method("qllm:reassembled")
    spec = LayerSpec("l", "l", 64, 96, bias=False)
    config = next(c for c in method.candidates(spec) if c["bits"] == 4 and c["group"] == 0)
    packed = method.compress(LayerData(weight_OI, inputs=inputs, act_bits=4), spec, config).packed
    gathered_OI = packed.reassembly.gather(weight_OI)
    step_O = (gathered_OI.amax(dim=1).clamp_min(0) - gathered_OI.amin(dim=1).clamp_max(0)) / 15
    assert ((packed.decode_entered() - gathered_OI).abs() <= 0.51 * step_O[:, None]).all()
    wide = LayerSpec("w", "w", 4096, 4096, bias=False)
    bits = config.stored_bits(wide)
    per_weight = Fraction(bits.codes + bits.scales, wide.weights)
    assert float(per_weight) == pytest.approx(4.004, abs=1e-3)  # the paper's count
    assert Fraction(bits.total, wide.weights) - per_weight == Fraction(24, 4096)  # ours has the tables too


@pytest.fixture(scope="module")
def corrected(two_blocks, short_tokenizer, tmp_path_factory):
    """(method, bits of activations) -> mean divergence of the first two blocks' logits, and the layers' reports."""
    tokens = calibration_windows(parse_calibration("c4-mini@128x8"), short_tokenizer, seed=0).tokens_NT
    held_out = calibration_windows(parse_calibration("c4-mini@128x4"), short_tokenizer, seed=1).tokens_NT
    original = load_reference(two_blocks.path, "cpu", torch.float32)
    with torch.no_grad():
        wanted = original(held_out).logits.log_softmax(dim=-1)
    found = {}
    for text, bits in product(("rtn:offset=zero,bits=4,group=0", "qllm:reassembled,bits=4,group=0"), (16, 4)):
        found[text.partition(":")[0], bits] = _packed(
            text, bits, two_blocks, tokens, held_out, wanted, tmp_path_factory
        )
    text = "qllm:bits=4,group=0,epochs=2"
    found["corrected", 4] = _packed(text, 4, two_blocks, tokens, held_out, wanted, tmp_path_factory)
    return found


def _packed(text, bits, resolved, tokens, held_out, wanted, folders):
    model = load_reference(resolved.path, "cpu", torch.float32)
    method = parse_method(text)
    plan = uniform(method, inventory(model), Fraction(9, 2))
    folder = folders.mktemp("qllm")
    compressed, report = compress_model(model, inventory(model), method, plan.layers, tokens, 0, folder, act_bits=bits)
    assert all(layer.act_bits == bits for layer in compressed.packed.values())
    with torch.no_grad():
        log_p = compressed.model(held_out).logits.log_softmax(dim=-1)
    return float((wanted.exp() * (wanted - log_p)).sum(dim=-1).mean()), report.layers


def test_reassembly_helps_activations_of_few_bits_and_correction_helps_more(corrected):
    kld = {name: value for name, (value, _) in corrected.items()}
    assert kld["rtn", 16] < kld["rtn", 4]
    assert kld["qllm", 4] < 0.8 * kld["rtn", 4]
    assert kld["corrected", 4] < 1.05 * kld["qllm", 4]
    report = next(iter(corrected["corrected", 4][1].values()))
    assert report["loss_after"] < report["loss_before"] and report["channels_added"] >= 0


def test_options_that_make_no_sense_are_refused():
    method = parse_method("qllm")
    for wrong in (dict(most=0.9), dict(rank=0), dict(grid="hessian"), dict(follow=2.0)):
        with pytest.raises(ValueError):
            replace(method, **wrong)
