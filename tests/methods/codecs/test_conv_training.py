"""Training of convolutional decoders: what it reaches, and that it reaches the same again."""

import pytest
import torch
from torch.nn import functional as F

from kernels.formats.conv import ConvLinear, draw
from kernels.formats.layer import LayerConfig, LayerSpec
from kernels.formats.packed import PackedLinear
from methods import parse_method
from methods.base import LayerData
from methods.codecs import conv_training as conv
from methods.codecs.conv_training import (
    chain_order,
    fit_conv,
    latent_values,
    round_latents,
    round_layer,
    search_latents,
)

SMALL = dict(patch=32, latent_channels=2, latent_bits=2, stages=1, width=4, weight_bits=5, scales="none")


def layout(weight: torch.Tensor, **hyper) -> ConvLinear:
    rows, columns = weight.shape
    return PackedLinear.from_spec(
        dict(format="conv", out_features=rows, in_features=columns, bias=False) | SMALL | hyper, "cpu"
    )


def fit(weight: torch.Tensor, steps: int = 60, **options) -> tuple[ConvLinear, dict[str, float]]:
    training = {name: options.pop(name) for name in ("importance_OI", "sweeps", "seed") if name in options}
    packed = layout(weight, **options)
    tensors, report = fit_conv(weight, packed, steps=steps, **training)
    packed.fill(**tensors)
    return packed, report


def relative(weight: torch.Tensor, packed: PackedLinear) -> float:
    return float((packed.decode() - weight).norm() / weight.norm())


@pytest.fixture(scope="module")
def weight(weights) -> torch.Tensor:
    """Part of a real matrix, with a ragged edge on both sides."""
    return weights["model.layers.0.self_attn.k_proj.weight"][:90, :150].float()


def image(rows: int = 128, columns: int = 192) -> torch.Tensor:
    """Smooth in both directions: noise without its high frequencies."""
    coarse = torch.randn(1, 1, 9, 13, generator=torch.Generator().manual_seed(0))
    return F.interpolate(coarse, (rows, columns), mode="bicubic", align_corners=True)[0, 0]


def test_training_reduces_the_error_of_a_real_matrix_and_says_by_how_much(weight):
    short, long = (fit(weight, steps, block=64, scales="double")[1]["relative_error"] for steps in (2, 60))
    packed, report = fit(weight, 60, block=64, scales="double", sweeps=2)
    assert report["relative_error"] < 0.98 * long < 0.75 * short
    assert relative(weight, packed) == pytest.approx(report["relative_error"], rel=1e-5) and report["seconds"] > 0


@pytest.mark.parametrize(
    "hyper",
    [{}, dict(latent_bits=16, weight_bits=16), dict(reorder=True, levels="uniform"), dict(stages=0), dict(stages=2)],
)
def test_every_form_is_trained_as_it_is_stored(weight, hyper):
    packed, report = fit(weight, 30, sweeps=1, **hyper)
    assert relative(weight, packed) == pytest.approx(report["relative_error"], rel=1e-5)
    assert report["relative_error"] < 1


def test_the_rest_beside_a_low_rank_branch(weight):
    packed = layout(weight, rank=2)
    tensors, _ = fit_conv(weight, packed, steps=5)
    assert packed.stored_parts().keys() - tensors == {
        f"lowrank.{n}" for n in ("left", "right", "left_scale", "right_scale")
    }


@pytest.mark.parametrize("hyper", [{}, dict(patch=16, reorder=True)])
def test_same_seed_same_bytes_other_seed_other_bytes(weight, hyper, monkeypatch):
    monkeypatch.setattr(conv, "BATCH", 4096)  # several batches a pass, in an order of the seed's
    first, second, other = (fit(weight, 12, sweeps=1, seed=seed, **hyper)[0].state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not torch.equal(first["latents"], other["latents"]) and not torch.equal(first["weights"], other["weights"])


def test_an_image_is_where_it_wins():
    """Smooth in rows and columns: at equal bits a fraction of plain vector quantisation's squared error (an eighth when
    measured)."""
    matrix = image()
    packed, _ = fit(matrix, 600, patch=64, latent_channels=1, latent_bits=4, stages=2)
    layer = LayerSpec("layer", "layer", *matrix.shape, bias=False)
    config = LayerConfig.of("codebook", dim=8, index_bits=3, block=64, scales="double", rank=0, adapter_bits=8)
    vectors = parse_method("reallm:data-free").compress(LayerData(matrix), layer, config).packed
    assert packed.stored_bits().total < vectors.stored_bits().total
    assert relative(matrix, packed) ** 2 < 0.25 * relative(matrix, vectors) ** 2


def test_noise_is_where_it_does_not():
    noise = torch.randn(96, 192, generator=torch.Generator().manual_seed(0))
    packed, report = fit(noise, 100, latent_channels=1, latent_bits=4)
    assert packed.stored_bits().total > noise.numel()  # one bit of latents; the bound for normal weights is 0.25
    assert report["relative_error"] ** 2 > 0.35


def test_importance_moves_the_error_to_where_it_costs_less(weight):
    importance = torch.ones_like(weight)
    importance[::2] = 30.0
    plain, weighted = (fit(weight, 60, importance_OI=i)[0].decode() - weight for i in (None, importance))
    assert weighted[::2].norm() < 0.9 * plain[::2].norm() and weighted[1::2].norm() > plain[1::2].norm()


def test_padding_is_not_learnt(weight):
    """A cell beyond the edge costs nothing: filling the matrix up with zeros that cost nothing changes no byte."""
    whole = F.pad(weight, (0, 160 - 150, 0, 96 - 90))
    importance = F.pad(torch.ones_like(weight), (0, 160 - 150, 0, 96 - 90))
    ragged, filled = layout(weight, scales="half", block=160), layout(whole, scales="half", block=160)
    stored = [
        fit_conv(w, p, importance_OI=i, steps=8)[0] for w, p, i in ((weight, ragged, None), (whole, filled, importance))
    ]
    assert torch.equal(stored[0]["latents"], stored[1]["latents"]) and torch.equal(
        stored[0]["weights"], stored[1]["weights"]
    )


@pytest.mark.parametrize(
    "hyper", [dict(stages=0), {}, dict(stages=2, kernel=5), dict(latent_bits=1), dict(latent_bits=4)]
)
def test_a_search_never_hurts_and_judges_every_latent_by_its_own_reach(hyper):
    matrix = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
    packed, generator = layout(matrix, **hyper), torch.Generator().manual_seed(1)
    network = [round_layer(conv._layer(*shape, generator, matrix.device), packed)[0] for shape in packed.shapes]
    patches, cost = conv.to_patches(matrix, 32), torch.rand(4, 32, 32, generator=generator)
    codes = torch.randint(0, 2**packed.latent_bits, (4, 2, packed.side, packed.side), generator=generator)

    def error(codes):
        return float((cost * (draw(latent_values(codes, packed), network) - patches).square()).sum())

    with torch.no_grad():
        found = search_latents(codes, network, patches, cost, packed)
        again = search_latents(found, network, patches, cost, packed)
        assert error(found) < 0.99 * error(codes) and error(again) <= error(found) * (1 + 1e-6)
        for _ in range(20):  # once nothing moves any more, no code has a better neighbour
            found, again = again, search_latents(again, network, patches, cost, packed)
            if torch.equal(found, again):
                break
        for at in ((0, 0, 0, 0), (3, 1, packed.side - 1, 2), (1, 0, 3, 3)):
            for step in (-1, 1):
                tried = again.clone()
                tried[at] = (tried[at] + step).clamp(0, 2**packed.latent_bits - 1)
                assert error(tried) >= error(again) * (1 - 1e-6)


def test_orders_are_chains_of_nearest_rows():
    matrix = torch.randn(40, 8, generator=torch.Generator().manual_seed(0))
    matrix[30] = 3 * matrix[0]
    order = chain_order(matrix).tolist()
    unit = F.normalize(matrix, dim=1)
    assert sorted(order) == list(range(40)) and order[:2] == [0, 30]
    for place in range(1, 40):
        left = order[place:]
        assert (unit[left] @ unit[order[place - 1]]).argmax() == 0


def test_rounding_passes_gradients_through():
    raw = torch.tensor([[[[-5.0, 0.1, 5.0]]]], requires_grad=True)
    value, codes = round_latents(raw, 2)
    assert codes.flatten().tolist() == [0, 2, 3] and torch.allclose(
        value, latent_values(codes, layout(torch.ones(1, 1)))
    )
    value.sum().backward()
    assert torch.allclose(raw.grad, 1 - torch.tanh(raw.detach()).square())


@pytest.mark.parametrize("matrix", [torch.zeros(20, 40), torch.full((3, 5), 1e-6), torch.full((20, 40), 1e4)])
@pytest.mark.parametrize("scales", ["none", "half"])
def test_odd_matrices_stay_finite(matrix, scales):
    packed, report = fit(matrix, 5, sweeps=1, scales=scales, reorder=True)
    assert torch.isfinite(packed.decode()).all() and report["relative_error"] < 1.1
