"""Trellis codes: the search is exact and the same however it is run, and the code is as good as it says."""

import itertools

import pytest
import torch

from kernels.cpu.build import search
from kernels.formats.packed import PackedLinear
from kernels.formats.rotation import mixed
from kernels.formats.trellis import gaussian_levels, level_of_deviation, levels, states
from methods import parse_method
from methods.base import LayerConfig, LayerData, LayerSpec, Sensitivity
from methods.codecs.basis import turned
from methods.codecs.error_feedback import layer_error, prepare
from methods.codecs.trellis import CODES, _searched, best_path, expected_cost, quantise_paths
from tests.helpers import hessian_of


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def spread_hessian(size: int) -> torch.Tensor:
    """Its eigenvalues fall by thirty, in directions of no one column."""
    basis_II = torch.linalg.qr(normal(size, size))[0]
    return basis_II @ torch.logspace(0, -1.5, size).diag() @ basis_II.t()


def cost(state_J: torch.Tensor, value_JD: torch.Tensor, weight_JD: torch.Tensor, level_DS: torch.Tensor) -> float:
    return float((weight_JD * (value_JD - level_DS[:, state_J].t()).square()).double().sum())


@pytest.mark.parametrize("bits, dim", list(CODES))
def test_the_compiled_search_is_the_one_in_torch(bits: int, dim: int):
    if search() is None:
        pytest.skip("no compiler")
    value_JD, weight_JD = level_of_deviation() * normal(30, dim), normal(30, dim, seed=1).square()
    level_DS = levels(bits, dim, 9)
    assert torch.equal(best_path(value_JD, weight_JD, level_DS, bits), _searched(value_JD, weight_JD, level_DS, bits))


def test_no_path_is_better_than_the_best():
    """All 4^6 of them, from a start of zeros."""
    value_JD, weight_JD, level_DS = 40 * normal(6, 1), normal(6, 1, seed=1).square(), levels(2, 1, 8)
    found = best_path(value_JD, weight_JD, level_DS, 2)
    code_J = found & 3
    assert torch.equal(states(code_J[:, None], 2, 8)[:, 0], found)
    every = torch.tensor(list(itertools.product(range(4), repeat=6)))
    state_JN = states(every.t(), 2, 8)
    best = min(cost(state_J, value_JD, weight_JD, level_DS) for state_J in state_JN.t())
    assert cost(found, value_JD, weight_JD, level_DS) == pytest.approx(best, rel=1e-6)


@pytest.mark.parametrize("bits, dim", list(CODES))
def test_a_code_leaves_of_normal_numbers_what_it_says(bits: int, dim: int):
    code, value_NO = CODES[bits, dim], normal(8, 1000, seed=bits)
    level_DS, unit = levels(bits, dim, 12), code.reach / level_of_deviation()
    ones_JD, errors = torch.ones(1000 // dim, dim), []
    for value_O in value_NO:
        value_JD = (value_O / unit).view(-1, dim)
        state_J = best_path(value_JD, ones_JD, level_DS, bits)
        errors.append((value_JD - level_DS[:, state_J].t()).square().mean() * unit**2)
    assert float(torch.stack(errors).mean()) == pytest.approx(code.error, rel=0.06)
    assert code.error < 1.35 * 4 ** (-bits / dim)  # a perfect code of this rate leaves that


def test_levels_are_those_of_the_format():
    """A constant of the format: what is stored means something else when one of them moves."""
    level_K = gaussian_levels()
    assert level_K[[0, 64, 127, 128, 191, 255]].tolist() == [-127, -29, 0, 0, 29, 127]
    assert torch.equal(level_K, -level_K.flip(0)) and int((level_K * torch.arange(256)).sum()) == 813_264


@pytest.mark.parametrize("columns", [1, 3, 16, 36, 576, 1536, 11008])
def test_a_rotation_is_orthogonal_and_spreads_what_stands_out(columns: int):
    x = normal(3, columns)
    assert torch.allclose(mixed(mixed(x)), x, atol=1e-5)
    assert torch.allclose(mixed(x).norm(dim=1), x.norm(dim=1), rtol=1e-5)
    if columns >= 16:
        assert float(mixed(torch.eye(columns)[:1]).abs().max()) <= 1.5 * columns**-0.5


def test_a_rotated_layer_is_the_same_layer():
    """Every format may be packed for turned inputs; at many bits nothing is left of the difference."""
    weight_OI, hessian_II = normal(24, 36), hessian_of(36)
    config = LayerConfig.of("uniform", bits=8, group=0, offset="minimum", permuted=False, rotated=True)
    spec = LayerSpec("layer", "layer", 24, 36, bias=False)
    packed = config.layout(spec, "cpu")
    assert packed.stored_bits().total == 8 * 24 * 36 + 32 * 24 + 64  # a sign for every column, in whole words
    turned_OI, turned_II, rotation = turned(packed, weight_OI, hessian_II, seed=5)
    assert torch.allclose(
        turned_OI @ turned_II @ turned_OI.t(), weight_OI @ hessian_II @ weight_OI.t(), rtol=1e-3, atol=1e-2
    )
    low_O, high_O = turned_OI.amin(dim=1), turned_OI.amax(dim=1)
    scale_OG, minimum_OG = ((high_O - low_O) / 255).half()[:, None], low_O.half()[:, None]
    codes_OI = ((turned_OI - minimum_OG) / scale_OG).round().clamp(0, 255)
    packed.fill(**packed.tensors(codes_OI.int(), scale_OG, minimum_OG=minimum_OG), **rotation)
    assert float((packed.decode() - weight_OI).norm() / weight_OI.norm()) < 0.01
    assert PackedLinear.from_spec(packed.spec()).stored_bits() == packed.stored_bits()
    x = normal(5, 36, seed=2)
    assert torch.allclose(packed(x), x @ packed.decode().t(), atol=1e-3)


def test_feedback_matches_a_path_for_every_column_in_turn(weights):
    """GPTQ's recursion in fp64 with the inverse Hessian of the columns left, a path in place of the nearest level."""
    weight_OI, hessian_II = weights["model.layers.9.self_attn.v_proj.weight"][:40, :24].clone(), hessian_of(24, seed=3)
    config = LayerConfig.of("trellis", bits=2, dim=1, window=8, rotated=False)
    packed = config.layout(LayerSpec("layer", "layer", 40, 24, bias=False), "cpu")
    feedback = prepare(hessian_II, act_order=True, damp=0.1)
    packed.fill(**quantise_paths(weight_OI, packed, feedback))
    damped_II = hessian_II.double() + 0.1 * hessian_II.double().diagonal().mean() * torch.eye(24)
    scale_O, level_DS = packed.scales.decode()[:, 0].double(), levels(2, 1, 8)
    rest_OI, decoded_OI, left = weight_OI.double(), packed.decode().double(), feedback.order_I.tolist()
    weight_JD = (scale_O.square() / scale_O.square().mean()).float()[:, None]
    for column in feedback.order_I.tolist():
        value_O = rest_OI[:, column] / scale_O
        path = cost(
            best_path(value_O.float()[:, None], weight_JD, level_DS, 2), value_O.float()[:, None], weight_JD, level_DS
        )
        taken_O = decoded_OI[:, column] / scale_O
        assert float((weight_JD[:, 0] * (value_O - taken_O).square()).sum()) == pytest.approx(path, rel=1e-3)
        inverse_II = torch.linalg.inv(damped_II[left][:, left])
        place = left.index(column)
        rest_OI[:, left] -= torch.outer(
            (rest_OI[:, column] - decoded_OI[:, column]) / inverse_II[place, place], inverse_II[place]
        )
        left.remove(column)


def test_half_the_error_of_vectors_at_equal_bits(weights):
    """On a layer of the default model, stored bits counted: what the format is for."""
    weight_OI, hessian_II = weights["model.layers.9.self_attn.v_proj.weight"], hessian_of(576)
    spec = LayerSpec("layer", "layer", *weight_OI.shape, bias=False)
    data = LayerData(weight_OI, 1, hessian_II)
    method, rival = parse_method("trellis:bits=2"), parse_method("gptvq:dim=2,index_bits=4,block=64")
    (config,), (rival_config, *_) = method.candidates(spec), rival.candidates(spec)
    ours, theirs = method.compress(data, spec, config).packed, rival.compress(data, spec, rival_config).packed
    assert ours.stored_bits().total < theirs.stored_bits().total
    assert layer_error(weight_OI, ours.decode(), hessian_II) < 0.7 * layer_error(weight_OI, theirs.decode(), hessian_II)


def test_what_a_layer_will_cost_is_foreseen(weights):
    weight_OI, hessian_II = weights["model.layers.9.self_attn.v_proj.weight"], spread_hessian(576)
    feedback = prepare(hessian_II, act_order=True, damp=0.01)
    pivot_I = torch.empty(576).index_copy_(0, feedback.order_I, feedback.upper_II.diagonal().pow(-2))
    spec = LayerSpec("layer", "layer", *weight_OI.shape, bias=False)
    for bits, dim in ((2, 1), (5, 2)):
        config = LayerConfig.of("trellis", bits=bits, dim=dim, window=10, rotated=True)
        packed = parse_method("trellis:damp=0.01").compress(LayerData(weight_OI, 0, hessian_II), spec, config).packed
        error_OI = weight_OI - packed.decode()
        measured = 0.5 * float((error_OI @ hessian_II * error_OI).sum())
        expected = expected_cost(weight_OI, Sensitivity(torch.ones(192), pivot_I), bits, dim, 10)
        assert expected == pytest.approx(measured, rel=0.15)


@pytest.mark.parametrize("text, says", [("trellis:bits=2.2", "1, 1.5, 2"), ("trellis:window=20", "8 to 16")])
def test_options_that_make_no_sense(text: str, says: str):
    with pytest.raises(ValueError, match=says):
        parse_method(text)
