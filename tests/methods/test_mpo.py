"""Matrix product operators: the paper's counts, exactness, a cut against the SVD, and products site by site."""

import itertools
import math

import pytest
import torch

from kernels.dispatch import kind, reference
from kernels.formats.dense import DenseLinear
from kernels.formats.layer import LayerConfig, LayerSpec
from kernels.formats.mpo import bond_dimensions, even_factors, from_sites, full_bond, site_shapes, to_sites
from methods import parse_method
from methods.base import LayerData, Sensitivity
from methods.codecs.mpo import decompose


def layer_of(rows: int, columns: int) -> LayerSpec:
    return LayerSpec("layer", "layer", rows, columns, bias=False)


def matrix(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("chi", [1, 4, 20, 36])
def test_the_example_of_the_paper_has_its_number_of_parameters(chi):
    """216 x 216 on three sites of 6 x 6 has 2 * 36 chi + 36 chi^2 (CompactifAI, sec. II): bits from shapes alone."""
    assert site_shapes(216, 216, 3) == ((6, 6, 6), (6, 6, 6))
    numbers = 2 * 36 * chi + 36 * chi**2
    half, eight = (LayerConfig.of("mpo", chi=chi, bits=bits).stored_bits(layer_of(216, 216)) for bits in (16, 8))
    assert (half.codes, half.scales) == (16 * numbers, 0)
    assert (eight.codes, eight.scales) == (
        8 * numbers,
        16 * 3 * chi,
    )  # a scale per right bond, of the last core per left


@pytest.mark.parametrize("size", [1, 7, 192, 576, 577, 1536, 4096, 11008, 49152])
@pytest.mark.parametrize("count", [2, 3, 5])
def test_any_size_is_cut_exactly_and_as_even_as_it_goes(size, count):
    factors = even_factors(size, count)
    assert math.prod(factors) == size and len(factors) == count and list(factors) == sorted(factors)
    if size <= 577:  # by trying all
        divisors = [d for d in range(1, size + 1) if size % d == 0]
        every = (c for c in itertools.combinations_with_replacement(divisors, count) if math.prod(c) == size)
        assert factors[-1] == min(max(c) for c in every)
    if (size, count) == (49152, 3):
        assert factors == (32, 32, 48)


@pytest.mark.parametrize("rows, columns, sites", [(24, 36, 3), (48, 30, 2), (7, 16, 3), (36, 16, 4)])
def test_an_operator_of_full_bond_is_exact(rows, columns, sites):
    weight = matrix(rows, columns)
    chi = full_bond(rows, columns, sites)
    packed = LayerConfig.of("mpo", chi=chi, bits=16, sites=sites).layout(layer_of(rows, columns), "cpu")
    cores = decompose(weight, packed)
    assert torch.allclose(packed.weight(cores), weight, atol=1e-5)
    packed.fill(**packed.tensors(cores))
    assert torch.allclose(packed.decode(), weight, atol=2e-2)  # numbers of 16 bits
    assert torch.equal(from_sites(to_sites(weight, packed.rows, packed.columns), packed.rows, packed.columns), weight)


@pytest.mark.parametrize("chi", [1, 9, 40])
def test_one_cut_is_the_svd_of_the_reordered_matrix(chi):
    weight = matrix(48, 30)
    packed = LayerConfig.of("mpo", chi=chi, bits=16, sites=2).layout(layer_of(48, 30), "cpu")
    error = (packed.weight(decompose(weight, packed)) - weight).square().sum()
    cut_off = torch.linalg.svdvals(to_sites(weight, packed.rows, packed.columns))[chi:].square().sum()
    assert error == pytest.approx(cut_off.item(), rel=1e-4, abs=1e-8)


def test_one_cut_between_all_rows_and_all_columns_is_the_svd_of_the_matrix():
    """Of a matrix whose rows are a prime's and whose columns are another's there is no other."""
    weight, chi = matrix(7, 13), 3
    packed = LayerConfig.of("mpo", chi=chi, bits=16, sites=2).layout(layer_of(7, 13), "cpu")
    assert (packed.rows, packed.columns) == ((1, 7), (13, 1))
    u, s, vh = torch.linalg.svd(weight)
    assert torch.allclose(packed.weight(decompose(weight, packed)), (u[:, :chi] * s[:chi]) @ vh[:chi], atol=1e-5)


def test_several_cuts_cost_at_most_the_sum_of_them():
    weight = matrix(24, 36)
    packed = LayerConfig.of("mpo", chi=10, bits=16).layout(layer_of(24, 36), "cpu")
    error = (packed.weight(decompose(weight, packed)) - weight).square().sum().item()
    tensor = to_sites(weight, packed.rows, packed.columns)
    first, second = tensor.reshape(len(tensor), -1), tensor.reshape(-1, tensor.shape[-1])
    cuts = [torch.linalg.svdvals(unfolded)[10:].square().sum().item() for unfolded in (first, second)]
    assert max(cuts) <= error * (1 + 1e-5) and error <= sum(cuts) * (1 + 1e-5)  # of fp32's


@pytest.mark.parametrize("rows, columns, sites, chi", [(64, 96, 3, 1), (64, 96, 3, 30), (36, 16, 4, 5), (30, 48, 2, 2)])
@pytest.mark.parametrize("bits", [16, 8])
def test_products_site_by_site_are_products_with_the_weight(rows, columns, sites, chi, bits):
    packed = LayerConfig.of("mpo", chi=chi, bits=bits, sites=sites).layout(layer_of(rows, columns), "cpu")
    packed.fill(**packed.tensors(decompose(matrix(rows, columns), packed)))
    x = torch.randn(2, 3, columns)
    assert torch.allclose(packed.contracted(x), reference(packed, x), atol=1e-4)
    assert kind(packed, "cpu") == ("fused" if packed.contracts else "decode-per-call")
    assert packed.contracts == (chi <= 2)


def test_bonds_never_exceed_what_either_side_can_use():
    assert bond_dimensions(576, 576, 3, 1000) == (1, 72, 72, 1)
    assert bond_dimensions(576, 576, 3, 40) == (1, 40, 40, 1)
    assert bond_dimensions(7, 13, 3, 1000) == (1, 7, 7, 1)


def test_the_plan_may_leave_a_matrix_whole_and_knows_what_everything_costs():
    method, layer, weight = parse_method("mpo"), layer_of(48, 36), matrix(48, 36)
    sensitivity = Sensitivity(torch.ones(48), torch.ones(36))
    configs = method.mixed_candidates(layer)
    costs = method.expected_costs(weight, sensitivity, layer, configs, 0)
    assert configs[-1].format == "dense" and costs[-1] == min(costs)
    for config, cost in zip(configs, costs, strict=True):
        packed = method.compress(LayerData(weight), layer, config).packed
        assert sensitivity.cost(weight - packed.decode()) == pytest.approx(cost, rel=1e-5)
    assert isinstance(packed, DenseLinear)
