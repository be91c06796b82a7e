"""LQ-LoRA and LoftQ on real matrices, and the stored form of their scales."""

from dataclasses import replace

import pytest
import torch

from kernels.formats.layer import LayerSpec
from kernels.formats.packed import PackedLinear
from kernels.formats.scales import BlockScales, ScaleForm, quantise_scales
from methods import parse_method
from methods.base import LayerData, Sensitivity
from methods.lq_lora import Weighting, _quantised, decompose

NAME = "model.layers.5.self_attn.o_proj"
SPEC = LayerSpec(NAME, "self_attn.o_proj", 576, 576, bias=False)


@pytest.fixture(scope="module")
def weight(weights) -> torch.Tensor:
    return weights[f"{NAME}.weight"].float()


def sensitivity(generator=None) -> Sensitivity:
    """Some rows and columns that no gradient reached."""
    generator = generator or torch.Generator().manual_seed(0)
    row, column = (torch.rand(576, generator=generator) ** 4 for _ in range(2))
    row[:7], column[100:110] = 0.0, 0.0
    return Sensitivity(row, column)


@pytest.mark.parametrize("first", ["lowrank", "quantised"])
@pytest.mark.parametrize("weighted", [False, True])
def test_more_rounds_never_leave_a_larger_error(first, weighted, weight):
    """Each number is that of the bytes that would be stored; of the rounds done the best is kept."""
    weighting = Weighting.of(sensitivity()) if weighted else None
    config = next(c for c in parse_method("lq-lora:bits=3").candidates(SPEC) if c["block"] == 64)
    errors = []
    for rounds in (1, 2, 3, 6, 12):
        packed = config.layout(SPEC, "cpu")
        tensors, report = decompose(weight, packed, weighting, first=first, rounds=rounds, tolerance=0.0, seed=0)
        packed.fill(**tensors)
        error_OI, whole_OI = ((m if weighting is None else weighting(m)) for m in (weight - packed.decode(), weight))
        assert float(error_OI.norm() / whole_OI.norm()) == pytest.approx(report["relative_error"], rel=1e-4)
        assert report["rounds"] <= rounds
        errors.append(report["relative_error"])
    assert (
        all(later <= earlier for earlier, later in zip(errors, errors[1:], strict=False))
        and errors[-1] < 0.98 * errors[0]
    )


def test_rows_without_gradient_keep_finite_factors(weight):
    method = parse_method("lq-lora:rounds=3")
    config = method.candidates(SPEC)[0]
    for given in (sensitivity(), Sensitivity(torch.zeros(576), torch.zeros(576))):
        packed = method.compress(LayerData(weight, fisher=given), SPEC, config).packed
        assert torch.isfinite(packed.decode()).all()
        costs = method.expected_costs(weight, given, SPEC, method.candidates(SPEC)[:2], 0)
        assert all(cost >= 0 and cost < float("inf") for cost in costs)


def test_loftq_begins_with_the_weight_itself(weight):
    config = next(c for c in parse_method("lq-lora:loftq,bits=4").candidates(SPEC) if c["block"] == 64)
    packed = parse_method("lq-lora:loftq,rounds=1").compress(LayerData(weight), SPEC, config).packed
    _, plain_OI = _quantised(weight, packed)
    assert torch.equal(packed.decode_base(), plain_OI) and packed.lowrank.decode().norm() > 0
    assert (packed.decode() - weight).norm() < (plain_OI - weight).norm()


@pytest.mark.parametrize("method", ["lq-lora", "lq-lora:loftq"])
def test_estimates_are_what_the_loop_leaves(method, weight):
    """A loop for each number of bits stands for 81 configurations: seven against loops of their own. Steps
    that 256 blocks share are the worst, for a sample of rows has fewer."""
    parsed, seen = parse_method(method), sensitivity()
    configs = parsed.candidates(SPEC)
    estimates = parsed.expected_costs(weight, seen, SPEC, configs, seed=0)
    data = LayerData(weight, fisher=seen if parsed.fisher else None)
    short = replace(parsed, rounds=3)
    ratios = []
    for config, estimate in list(zip(configs, estimates, strict=True))[::40]:
        ratios.append(estimate / seen.cost(weight - short.compress(data, SPEC, config).packed.decode()))
    spread = torch.tensor(ratios)
    assert spread.mean() == pytest.approx(1, abs=0.04) and spread.std() < 0.06, ratios
    assert all(0.85 < ratio < 1.18 for ratio in ratios), ratios


def test_prices():
    """The Fisher information is what the paper's factors are fitted with; configurations have the price of all
    methods' unless asked otherwise."""
    assert parse_method("lq-lora").needs.fisher and parse_method("lq-lora").needs.sensitivity == "plain"
    assert parse_method("lq-lora:price=fisher").needs.sensitivity == "fisher"
    unweighted = parse_method("lq-lora:unweighted").needs
    assert unweighted.sensitivity == "plain" and not unweighted.text


def test_grids():
    counts = {grid: len(parse_method(f"lq-lora:grid={grid}").candidates(SPEC)) for grid in ("paper", "released")}
    assert counts == {"paper": 243, "released": 432}
    wrong = {
        "grid=all": "grid must be",
        "price=bits": "price must be",
        "first=both": "first must be",
        "bits=7": "no configuration",
        "rank=0": "rank must",
    }
    for text, hint in wrong.items():
        with pytest.raises(ValueError, match=hint):
            parse_method(f"lq-lora:{text}")


@pytest.mark.parametrize(
    "bits, group, dtype", [(2, 16, "bfloat16"), (3, 64, "float16"), (4, 256, "float32"), (8, 16, "bfloat16")]
)
def test_scales_of_few_bits(bits, group, dtype):
    """b + b0/B0 + b1/(B0 B1) bits per weight and 32 for the offset; every scale within half a step of the original."""
    form = ScaleForm("double", bits, group, dtype)
    scale_OG = torch.rand(32, 24, generator=torch.Generator().manual_seed(0)) + 0.5
    decoder = BlockScales(32, 24, form)
    for name, tensor in quantise_scales(scale_OG, form).items():
        assert getattr(decoder, name).shape == tensor.shape and getattr(decoder, name).dtype == tensor.dtype
        setattr(decoder, name, tensor)
    step_bits = 32 if dtype == "float32" else 16
    assert decoder.stored_bits().total == 768 * bits + step_bits * 768 // group + 32
    step_OG = decoder.steps.float().repeat_interleave(group).view(32, 24)
    assert ((decoder.decode() - scale_OG).abs() <= step_OG * (0.5 + 2**bits * 2.0**-8)).all()


def test_nothing_said_of_adapters_means_they_start_without_effect(weight):
    nf, qlora = parse_method("nf"), parse_method("qlora:dora=true")
    plain = nf.candidates(SPEC)[0]
    adapted = qlora.candidates(SPEC)[0]
    assert (
        adapted["rank"] == 9
        and adapted["row_scales"]
        and qlora.family(adapted) == qlora.family(adapted.without("rank"))
    )
    with_adapters = qlora.compress(LayerData(weight), SPEC, adapted).packed
    assert torch.equal(with_adapters.decode(), nf.compress(LayerData(weight), SPEC, plain).packed.decode())
    bits = with_adapters.stored_bits()
    assert (
        bits.adapters == 8 * 9 * (576 + 576) + 2 * 16 * 9 and bits.scales == plain.stored_bits(SPEC).scales + 16 * 576
    )
    assert PackedLinear.from_spec(with_adapters.spec()).stored_bits() == bits
