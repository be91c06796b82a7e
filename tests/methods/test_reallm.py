"""ReALLM's loop, its calibrated form, and the codecs under both."""

import pytest
import torch

from harness.data.protocols import parse_calibration
from harness.data.windows import calibration_windows
from harness.model import load_reference
from kernels.formats.bitpack import packed_words
from kernels.formats.layer import LayerConfig, LayerSpec
from kernels.formats.scales import ScaleForm
from methods import parse_method
from methods.base import LayerData, Sensitivity
from methods.codecs.column_order import greedy_order
from methods.codecs.conv_training import unlikeness
from methods.codecs.error_feedback import layer_error, prepare, shrunk
from methods.codecs.kmeans import kmeans, nearest
from methods.codecs.svd import lowrank_part, svd_factors
from methods.codecs.vector import absmax_scales, fit_codebook, from_vectors, refit_codebook, to_vectors
from methods.codecs.vector_feedback import assign, damped_hessian
from tests.helpers import decode_uniform, hessian_of


def compress(method, weight, hessian=None, seed=0, **hyper):
    values = dict(dim=2, index_bits=6, block=64, scales="double", rank=4, adapter_bits=8) | hyper
    layer = LayerSpec("layer", "layer", *weight.shape, bias=False)
    return parse_method(method).compress(LayerData(weight, seed, hessian), layer, LayerConfig.of("codebook", **values))


@pytest.fixture(scope="module")
def weight(weights) -> torch.Tensor:
    return weights["model.layers.9.self_attn.v_proj.weight"]


def test_a_matrix_made_of_few_vectors_is_found_exactly():
    generator = torch.Generator().manual_seed(0)
    book = torch.randn(8, 2, generator=generator).clamp(-1.5, 1.5).half().float()
    book[0] = torch.tensor([2.0, -2.0])  # the largest magnitude; every block holds it, so every scale is 2
    codes = torch.randint(0, 8, (8, 64), generator=generator)
    codes[:, ::16] = 0
    weight = from_vectors(book[codes], 16)
    packed = compress("reallm:data-free", weight, rank=0, index_bits=3, block=16).packed
    assert (packed.decode() - weight).abs().max() < 2e-3  # codebook entries are book / 2 in fp16


def test_kmeans_never_leaves_a_cluster_empty_and_is_seeded():
    vectors = torch.randn(500, 2, generator=torch.Generator().manual_seed(0)).repeat_interleave(2, dim=0)
    weights = torch.ones_like(vectors)
    books = [kmeans(vectors, weights, 64, seed=5) for _ in range(2)]
    assert torch.equal(*books)
    assert len(nearest(weights, weights * vectors, books[0]).unique()) == 64


def test_weights_pull_the_codebook():
    vectors = torch.tensor([[0.0], [1.0], [10.0]])
    book = kmeans(vectors, torch.tensor([[1.0], [3.0], [1.0]]), 2, seed=0)
    assert sorted(book.flatten().tolist()) == [0.75, 10.0]


@pytest.mark.parametrize("shape", [(7, 13), (8, 64), (1, 3)])
@pytest.mark.parametrize("dim", [1, 2, 4, 8])
def test_vectors_round_trip(shape, dim):
    matrix = torch.randn(shape)
    assert torch.equal(from_vectors(to_vectors(matrix, dim), shape[0]), matrix)


def test_whitened_factors_beat_plain_ones_where_it_counts(weight):
    hessian = hessian_of(576)
    whitener = torch.linalg.cholesky(hessian + 0.01 * hessian.diagonal().mean() * torch.eye(576))
    errors = []
    for c in (None, whitener):
        left, right = svd_factors(weight, 8, c)
        errors.append(layer_error(weight, left @ right, hessian))
    assert errors[1] < errors[0]
    exact = torch.linalg.svdvals(weight)
    left, right = svd_factors(weight, 8)
    assert float((weight - left @ right).norm()) == pytest.approx(float(exact[8:].norm()), rel=2e-3)


def test_refit_finds_the_least_squares_codebook():
    """Conjugate gradients against the normal equations, formed explicitly on a matrix small enough."""
    generator = torch.Generator().manual_seed(0)
    target, scale = torch.randn(4, 10, generator=generator), torch.rand(4, 10, generator=generator) + 0.5
    codes, hessian = torch.randint(0, 3, (2, 10), generator=generator), hessian_of(10)
    start = torch.randn(3, 2, generator=generator)
    columns = []
    for unknown in torch.eye(6).view(6, 3, 2):
        columns.append((from_vectors(unknown[codes], 4) * scale).double())
    design = torch.stack(columns)  # [6, O, I]
    normal = torch.einsum("aoi,ij,boj->ab", design, hessian.double(), design)
    right = torch.einsum("aoi,ij,oj->a", design, hessian.double(), target.double())
    expected = torch.linalg.solve(normal, right).view(3, 2)
    got = refit_codebook(target, scale, codes, start, hessian, iterations=12)
    assert torch.allclose(got.double(), expected, atol=2e-3)


def test_refit_never_hurts(weight):
    hessian = hessian_of(576)
    feedback = prepare(hessian, act_order=True, damp=0.01)
    scales = absmax_scales(weight, 64, ScaleForm("double"))
    book = fit_codebook(weight / scales.scale_OI, torch.ones_like(weight), 2, 64, seed=0)
    codes = assign(weight, scales.scale_OI, book, feedback)
    better = refit_codebook(weight, scales.scale_OI, codes, book, hessian, iterations=8)
    errors = [layer_error(weight, from_vectors(b[codes], 192) * scales.scale_OI, hessian) for b in (book, better)]
    assert errors[1] < errors[0]


def test_the_loop_keeps_its_best_iterate(weight):
    once = compress("reallm:data-free,rounds=1", weight)
    more = compress("reallm:data-free", weight)
    assert 1 < more.report["rounds"] <= 10
    assert more.report["relative_error"] <= once.report["relative_error"]
    error = float((more.packed.decode() - weight).norm() / weight.norm())
    assert error == pytest.approx(more.report["relative_error"], rel=1e-4)


def test_columns_are_ordered_greedily_and_once_each(weight):
    """Against the definition, band by band; equal columns, which a search by value would confuse, included."""
    matrix = weight[:100, :80].clone()
    matrix[:, 40:44] = matrix[:, 20:21]
    order = greedy_order(matrix, 64)
    for band, rows in zip(order, (matrix[:64], matrix[64:]), strict=True):
        left, taken = list(range(16, 80)), list(range(16))
        while left:
            mean = rows[:, taken[-16:]].mean(dim=1)
            distance = [(rows[:, c] - mean).square().sum().item() for c in left]
            taken.append(left.pop(distance.index(min(distance))))
        assert sorted(band.tolist()) == list(range(80))
        # Ties between equal columns, and rounding.
        assert sum(a != b for a, b in zip(band.tolist(), taken, strict=True)) <= 8


def test_vectors_along_columns_are_vectors_along_rows_of_the_transposed_matrix(weight):
    """With one scale for all, so that the blocks are the same either way round."""
    weight = weight[:, :190] / weight.abs().amax(dim=1, keepdim=True).half().float()
    options = dict(dim=4, index_bits=6, rank=0, scales="half", block=0)
    across = compress("reallm:data-free", weight, along="columns", **options).packed
    assert across.codes.shape == (192, packed_words(48, 6))
    flat = weight.sign() * 0.7
    first, second = (
        compress("reallm:data-free", m, along=a, **options).packed.decode()
        for m, a in ((flat, "columns"), (flat.t(), "rows"))
    )
    assert torch.equal(first, second.t())
    errors = [
        float((compress("reallm:data-free", weight, along=a, **options).packed.decode() - weight).norm())
        for a in ("rows", "columns")
    ]
    assert 0.8 < errors[0] / errors[1] < 1.25


def test_a_convolutional_decoder_is_on_offer_where_rows_are_alike(weights, weight, monkeypatch):
    """Estimated by training it on a matrix whose rows are alike; elsewhere, untrained, as if it drew nothing."""
    monkeypatch.setattr("methods.reallm.data_free.CONV_STEPS", 6)
    method = parse_method("reallm:data-free,decoder=conv")
    alike, other = weights["model.layers.0.self_attn.k_proj.weight"], weight
    assert unlikeness(alike) < 0.85 < unlikeness(other)
    layer = LayerSpec("layer", "layer", *alike.shape, bias=False)
    offers = [config for config in method.mixed_candidates(layer) if config.format == "conv"]
    assert len(offers) == 3 and not any(config.format == "conv" for config in method.candidates(layer))
    config = next(c for c in offers if c["latent_channels"] == 2)
    flat = Sensitivity(torch.ones(192), torch.ones(576))
    done = method.compress(LayerData(alike), layer, config)
    error = alike - done.packed.decode()
    assert done.report["relative_error"] == pytest.approx(float(error.norm() / alike.norm()), rel=1e-4)
    assert method.expected_costs(alike, flat, layer, [config], seed=0) == [pytest.approx(flat.cost(error))]
    assert method.expected_costs(other, flat, layer, [config], seed=0) == [pytest.approx(flat.cost(other), rel=1e-5)]


@pytest.mark.parametrize("latent", ["vectors", "trellis"])
def test_the_low_rank_part_sees_what_the_latent_leaves(weight, latent, monkeypatch):
    """Under the layer's own objective, against the part that the latent was fitted beside."""
    method, layer = parse_method(f"reallm:latent={latent},window=8,rank=4"), LayerSpec("l", "l", 192, 576, bias=False)
    offered = method.candidates(layer)
    config = next(c for c in offered if c.format == "trellis" or (c["dim"], c["index_bits"]) == (2, 6))
    hessian, fitted = hessian_of(576), []
    known = shrunk(hessian, method.shrink)
    damped = damped_hessian(known, prepare(known, act_order=True, damp=method.damp))

    def first_alone(*arguments):
        fitted.append(lowrank_part(*arguments))
        return fitted[0]

    def error():
        packed = method.compress(LayerData(weight, 0, hessian), layer, config).packed
        return layer_error(weight, packed.decode(), damped)

    again = error()
    monkeypatch.setattr("methods.reallm.calibrated.lowrank_part", first_alone)
    assert again < 0.998 * error() and len(fitted) == 2


def test_the_released_settings_decode_what_they_report(weight):
    layer = LayerSpec("layer", "layer", *weight.shape, bias=False)
    method = parse_method("reallm:released,rank=4,rounds=3")
    (config,) = method.candidates(layer)
    done = method.compress(LayerData(weight), layer, config)
    error = float((done.packed.decode() - weight).norm() / weight.norm())
    assert error == pytest.approx(done.report["relative_error"], rel=1e-4)
    bits = done.packed.stored_bits()
    assert bits.tables == 3 * 576 * 16 + 16 * 2 * 16 and bits.scales >= 16 * 192
    plain = parse_method("reallm:data-free,dim=2,index_bits=4,block=64,rank=4,adapter_bits=16,rounds=3")
    (config,) = plain.candidates(layer)
    without = plain.compress(LayerData(weight), layer, config)
    assert done.report["relative_error"] < without.report["relative_error"]  # at a quarter of a bit more


@pytest.mark.parametrize(
    "shape",
    [dict(dim=2, index_bits=6), dict(dim=4, index_bits=8), dict(dim=1, index_bits=3), dict(dim=8, index_bits=6)],
)
def test_data_helps(weight, shape):
    hessian = hessian_of(576)
    errors = {}
    for variant in ("data-free,rounds=2", "calibrated"):
        packed = compress(f"reallm:{variant}", weight, hessian, **shape).packed
        errors[variant] = layer_error(weight, packed.decode(), hessian)
    assert errors["calibrated"] < 0.75 * errors["data-free,rounds=2"]


@pytest.fixture(scope="module")
def inputs(four_blocks, short_tokenizer) -> dict[str, torch.Tensor]:
    """What two layers of the fourth block see of eight windows of text, [8, T, I]."""
    model = load_reference(four_blocks.path, "cpu", torch.float32)
    seen = {}
    for name in ("self_attn.v_proj", "mlp.up_proj"):
        model.get_submodule(f"model.layers.3.{name}").register_forward_pre_hook(
            lambda _, args, name=name: seen.update({name: args[0]})
        )
    with torch.no_grad():
        model(calibration_windows(parse_calibration("c4-mini@512x8"), short_tokenizer, seed=0).tokens_NT)
    return seen


@pytest.mark.parametrize("name", ["self_attn.v_proj", "mlp.up_proj"])
def test_calibrated_beats_gptq_at_equal_bits(name, inputs, weights):
    """On windows that neither has seen."""
    weight = weights[f"model.layers.3.{name}.weight"]
    hessian, held_out = (x.flatten(0, 1).T @ x.flatten(0, 1) for x in inputs[name].split(6))
    reallm = compress("reallm", weight, hessian, rank=1).packed
    # 3.20 bits on the smaller one, 0.02 of them its codebook.
    assert reallm.stored_bits().total < (3 + 16 / 60) * weight.numel()
    gptq = decode_uniform("gptq", weight, hessian, group=60)
    assert layer_error(weight, reallm.decode(), held_out) < layer_error(weight, gptq, held_out)


@pytest.mark.parametrize("variant", ["data-free", "calibrated"])
def test_same_seed_same_bytes_other_seed_other_bytes(weight, variant):
    hessian = hessian_of(576)
    first, second, other = (
        compress(f"reallm:{variant}", weight, hessian, seed=s).packed.state_dict() for s in (1, 1, 2)
    )
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not torch.equal(first["codes"], other["codes"])


@pytest.mark.parametrize(
    "options",
    [
        "along=columns",
        "data-free,along=diagonal",
        "band=64",
        "data-free,band=3",
        "data-free,dim=8,index_bits=4,band=4",
        "data-free,band=64,order_bits=17",
    ],
)
def test_orders_that_cannot_be_are_refused(options):
    with pytest.raises(ValueError, match="along|band|order_bits"):
        parse_method(f"reallm:{options}")


def test_ragged_rows_are_padded_and_counted():
    weight = torch.randn(10, 48, generator=torch.Generator().manual_seed(0))
    packed = compress("reallm", weight, hessian_of(48), dim=4, index_bits=5, rank=1).packed
    assert packed.stored_bits().codes == 3 * 32 * -(-48 * 5 // 32)
    assert torch.isfinite(packed.decode()).all() and packed.decode().shape == (10, 48)
