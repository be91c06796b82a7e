"""Fitting a decoder instead of a table, on real weights."""

import pytest
import torch

from kernels.formats.mlp_table import MlpTable
from kernels.formats.scales import ScaleForm
from methods.codecs import mlp_training as mlp_table
from methods.codecs.kmeans import kmeans, nearest
from methods.codecs.vector import absmax_scales, to_vectors

SMALL = dict(dim=4, index_bits=7, digits=7, width=16, layers=1, weight_bits=8, seed=0)


def fit_mlp_table(vectors, weights, *, steps, seed, **shape) -> MlpTable:
    return mlp_table.fit_mlp_table(vectors, weights, MlpTable(**shape), seed=seed, steps=steps)


@pytest.fixture(scope="module")
def vectors(weights) -> torch.Tensor:
    units = []
    for block in (3, 17):
        weight = weights[f"model.layers.{block}.self_attn.q_proj.weight"].float()
        units.append(to_vectors(weight / absmax_scales(weight, 64, ScaleForm("double")).scale_OI, 4).reshape(-1, 4))
    return torch.cat(units)[::5].contiguous()


def error(entries: torch.Tensor, vectors: torch.Tensor, weights: torch.Tensor | None = None) -> float:
    weights = torch.ones_like(vectors) if weights is None else weights
    code = nearest(weights, weights * vectors, entries)
    return float((weights * (vectors - entries[code]).square()).sum() / weights.sum())


def test_training_bends_the_product_quantiser_towards_k_means(vectors):
    ones = torch.ones_like(vectors)
    start, trained = (fit_mlp_table(vectors, ones, **SMALL, steps=steps) for steps in (1, 400))
    plain = kmeans(vectors, ones, 128, seed=0, iterations=15)
    errors = [error(entries, vectors) for entries in (start.entries(), trained.entries(), plain)]
    assert errors[1] < 0.9 * errors[0] and errors[1] < 1.1 * errors[2]
    assert trained.stored_bits().total < 16 * 4 * 128
    assert len(nearest(ones, vectors, trained.entries()).unique()) == 128  # no entry is dead


def test_the_start_is_a_product_quantiser(vectors):
    """Without a perceptron: as good as a scalar codebook per dimension, which an additive table of two digits is near
    to."""
    ones = torch.ones_like(vectors)
    scalar = error(kmeans(vectors[:, :1], ones[:, :1], 4, seed=0), vectors.reshape(-1, 1))
    for digits in (4, 8):
        table = fit_mlp_table(
            vectors, ones, dim=4, index_bits=8, digits=digits, width=0, layers=0, weight_bits=8, seed=0, steps=60
        )
        assert error(table.entries(), vectors) < 1.05 * scalar


def test_weights_pull_the_table(vectors):
    pulled = torch.where(vectors.abs().amax(dim=1, keepdim=True) > 0.8, 20.0, 1.0).expand_as(vectors).contiguous()
    pulled = pulled * torch.tensor([1.0, 1.0, 5.0, 1.0])
    tables = [fit_mlp_table(vectors, w, **SMALL, steps=200).entries() for w in (torch.ones_like(vectors), pulled)]
    assert error(tables[1], vectors, pulled) < 0.95 * error(tables[0], vectors, pulled)


def test_same_seed_same_bytes_other_seed_other_bytes(vectors):
    ones = torch.ones_like(vectors)
    first, second, other = (
        fit_mlp_table(vectors, ones, **SMALL | {"seed": s}, steps=40).state_dict() for s in (1, 1, 2)
    )
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not torch.equal(first["codes"], other["codes"])


@pytest.mark.parametrize("digits", [2, 3, 5, 7])
def test_any_number_of_digits(vectors, digits):
    """Fewer than dimensions, unequal ones, and as many as there are bits; six-bit weights; fewer vectors than a
    batch."""
    few = vectors[:1000]
    table = fit_mlp_table(few, torch.ones_like(few), **SMALL | {"digits": digits, "weight_bits": 6}, steps=60)
    entries = table.entries()
    assert sum(table.digit_bits) == 7 and len(table.digit_bits) == digits
    assert torch.isfinite(entries).all() and error(entries, few) < float(few.square().mean())
