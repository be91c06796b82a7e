"""Two factors in a matrix's place: what they minimise, against textbooks, and every byte of them counted."""

import dataclasses

import pytest
import torch

from harness.compress.block import BlockRun
from harness.compress.forward import BlockInputs
from harness.data.protocols import parse_calibration
from harness.data.windows import calibration_windows
from harness.model import inventory, load_reference
from kernels.dispatch import kind, reference
from kernels.formats.layer import LayerConfig, LayerSpec
from kernels.formats.numbers import Numbers
from methods import parse_method
from methods.base import LayerData, Pooled, Sensitivity
from methods.codecs.factors import best_factors, principal_factors, whitener
from tests.helpers import hessian_of

SHAPES = [(96, 64), (64, 96), (80, 80)]


def matrix(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, columns, generator=generator) * torch.rand(columns, generator=generator)


def packed(text: str, data: LayerData, **hyper: object):
    layer = LayerSpec("layer", "layer", *data.weight_OI.shape, bias=False)
    return parse_method(text).compress(data, layer, LayerConfig.of("factors", **hyper)).packed


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rank", [1, 17, 64])
def test_svd_is_the_truncated_svd(shape, rank):
    weight = matrix(*shape)
    left, right = best_factors(weight)
    u, s, vh = torch.linalg.svd(weight.double(), full_matrices=False)
    expected = (u[:, :rank] * s[:rank]) @ vh[:rank]
    assert torch.allclose((left[:, :rank] @ right[:rank]).double(), expected, atol=1e-5)


@pytest.mark.parametrize("shape", SHAPES)
def test_whitened_svd_leaves_the_least_error_of_outputs_there_is(shape):
    """tr(E H E^T) of its factors is the sum of the squared singular values of W C that are cut off, exactly; no other
    matrix of that rank has less (Eckart and Young), and the plain SVD has more."""
    weight, rank = matrix(*shape), 20
    hessian = hessian_of(shape[1])
    lower = whitener(hessian, 0.01)
    damped = lower @ lower.T
    assert torch.allclose(damped, hessian.double() + 0.01 * hessian.diagonal().mean() * torch.eye(shape[1]))

    def error(left, right):
        rest = weight.double() - left[:, :rank].double() @ right[:rank].double()
        return torch.trace(rest @ damped @ rest.T).item()

    cut_off = torch.linalg.svdvals(weight.double() @ lower)[rank:].square().sum().item()
    assert error(*best_factors(weight, lower)) == pytest.approx(cut_off, rel=1e-4)
    assert error(*best_factors(weight)) > 1.05 * cut_off


@pytest.mark.parametrize("shape", SHAPES)
def test_principal_components_of_the_outputs_are_those_of_real_outputs(shape):
    """And, about no mean and in one group, they are the whitened SVD."""
    weight, rank = matrix(*shape), 12
    x = torch.randn(500, shape[1], generator=torch.Generator().manual_seed(1)) + 0.3
    left, right = principal_factors(weight, torch.cov(x.T))
    y = x.double() @ weight.T.double()
    _, _, components = torch.linalg.svd(y - y.mean(dim=0), full_matrices=False)
    expected = components[:rank].T @ components[:rank] @ weight.double()
    assert torch.allclose((left[:, :rank] @ right[:rank]).double(), expected, atol=1e-4)
    second_moment = (x.T @ x).double()
    whitened = best_factors(weight, torch.linalg.cholesky(second_moment))
    same = principal_factors(weight, second_moment)
    products = ((left[:, :rank] @ right[:rank]) for left, right in (whitened, same))
    assert torch.allclose(next(products), next(products), atol=1e-4)


def test_what_is_put_back_makes_the_mean_output_right():
    weight = matrix(64, 96)
    source = torch.Generator().manual_seed(1)
    x = torch.randn(400, 96, generator=source) + torch.rand(96, generator=source)
    data = LayerData(weight, pooled=Pooled(x.mean(dim=0), torch.cov(x.T)))
    layer = packed("bolaco", data, components=8, bits=4, shifted=True)
    off = (layer(x) - x @ weight.T).mean(dim=0)
    largest = layer.shift.abs().max().item()
    assert off.abs().max() < 2**-10 * largest and largest > 0.1  # stored in sixteen bits
    assert layer.stored_parts()["shift"] == "scales"


@pytest.mark.parametrize("bits, each, group", [(16, 16, None), (8, 8, 0), (4, 4, 64)])
def test_bits_of_factors_are_counted_by_their_bytes(bits, each, group):
    rank, rows, columns = 24, 576, 1536
    layer = LayerSpec("layer", "layer", rows, columns, bias=False)
    found = LayerConfig.of("factors", components=rank, bits=bits).stored_bits(layer)
    numbers = rank * (rows + columns)
    scales = {16: 0, 8: 2 * rank, 4: rank * (rows // 64 + columns // 64)}[bits]
    assert (found.codes, found.scales) == (each * numbers, 16 * scales) and found.total == found.codes + found.scales


@pytest.mark.parametrize("bits, most", [(16, 1e-3), (8, 0.012), (4, 0.13)])
def test_numbers_come_back_as_near_as_their_bits_allow(bits, most):
    values = torch.randn(5, 200, generator=torch.Generator().manual_seed(0)) * torch.tensor(
        [[1e-3], [1], [3], [9], [0]]
    )
    kept = Numbers(5, 200, bits)  # three groups of 64 and a ragged one of 8, where there are groups
    off = (kept.rounded(values) - values).norm(dim=1)
    assert (off[:4] <= most * values[:4].norm(dim=1)).all() and off[4] == 0


@pytest.mark.parametrize("text", ["svd", "svd:whitened", "bolaco"])
def test_estimates_are_what_is_stored_with_a_diagonal_hessian(text):
    weight, method = matrix(64, 96), parse_method(text)
    layer = LayerSpec("layer", "layer", 64, 96, bias=False)
    sensitivity = Sensitivity(torch.rand(64) + 0.1, torch.rand(96) + 0.1)
    configs = method.mixed_candidates(layer)
    costs = method.expected_costs(weight, sensitivity, layer, configs, 0)
    diagonal = sensitivity.column_I.diag()
    data = LayerData(weight, hessian_II=diagonal, pooled=Pooled(torch.zeros(96), diagonal))
    for config, cost in list(zip(configs, costs, strict=True))[::3]:
        decoded = method.compress(data, layer, config).packed.decode()
        assert sensitivity.cost(weight - decoded) == pytest.approx(cost, rel=1e-3, abs=1e-6)


@pytest.mark.parametrize("text", ["svd", "svd:whitened", "bolaco", "mpo"])
def test_a_rank_larger_than_a_matrix_has_is_its_full_one(text):
    option = "chi" if text == "mpo" else "rank"
    method = dataclasses.replace(parse_method(text), **{option: 10_000})
    (config, *_) = method.candidates(LayerSpec("layer", "layer", 192, 576, bias=False))
    assert config["chi" if text == "mpo" else "components"] == (64 if text == "mpo" else 192)


def test_factors_are_multiplied_one_after_the_other_where_that_is_less_work():
    data = LayerData(matrix(64, 96))
    x = torch.randn(3, 2, 96)
    for rank, faster in ((8, True), (60, False)):
        layer = packed("svd", data, components=rank, bits=8)
        assert kind(layer, "cpu") == ("fused" if faster else "decode-per-call")
        assert torch.allclose(layer(x), reference(layer, x), atol=1e-5)


def test_pooled_statistics_are_means_over_windows_each_about_its_own_mean(two_blocks, short_tokenizer):
    tokens = calibration_windows(parse_calibration("c4-mini@32x6"), short_tokenizer, seed=0).tokens_NT
    model = load_reference(two_blocks.path, "cpu", torch.float32)
    inputs, spec = BlockInputs(model, tokens), inventory(model).blocks[0]
    seen: list[torch.Tensor] = []
    name = next(layer.name for layer in spec.layers if layer.role == "mlp.up_proj")
    handle = model.get_submodule(name).register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        model(tokens)
    handle.remove()
    (x,) = seen
    with BlockRun(model, spec, inputs.block(0), inputs.hidden) as block:
        found = block.pooled(name)
    assert torch.allclose(found.mean_I, x.flatten(0, 1).mean(dim=0), atol=1e-5)
    expected = torch.stack([torch.cov(window.T) for window in x]).mean(dim=0)
    assert torch.allclose(found.covariance_II, expected, atol=1e-4 * expected.abs().max().item())
