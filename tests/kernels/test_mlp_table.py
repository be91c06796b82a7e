"""The decoder form of a table: a function of its buffers alone, of the bits it says."""

import math

import pytest
import torch

from kernels.formats.mlp_table import MlpTable

SHAPES = [
    dict(dim=4, index_bits=8, digits=8, width=16, layers=2, weight_bits=8),
    dict(dim=4, index_bits=10, digits=4, width=8, layers=1, weight_bits=6),  # digits of 3, 3, 2 and 2 bits
    dict(dim=8, index_bits=5, digits=3, width=5, layers=3, weight_bits=5),  # fewer digits than dimensions
    dict(dim=2, index_bits=6, digits=2, width=0, layers=0, weight_bits=8),
    dict(dim=1, index_bits=1, digits=1, width=1, layers=1, weight_bits=2),
]


def filled(hyper: dict, seed: int = 0) -> tuple[MlpTable, tuple[torch.Tensor, ...]]:
    generator = torch.Generator().manual_seed(seed)
    table = MlpTable(**hyper)
    numbers = tuple(torch.randn(n, generator=generator) for n in (len(table.levels), table.weights, len(table.biases)))
    table.fill(**table.store(*numbers))
    return table, numbers


@pytest.mark.parametrize("hyper", SHAPES)
def test_a_layout_on_meta_counts_what_a_real_one_stores(hyper):
    with torch.device("meta"):
        planned = MlpTable(**hyper)
    real, _ = filled(hyper)
    assert planned.levels.is_meta and planned.stored_bits() == real.stored_bits()
    bits = real.stored_bits()
    assert bits.total == bits.tables == 8 * sum(b.numel() * b.element_size() for b in real.buffers())
    width, layers, digits, dim = (hyper[name] for name in ("width", "layers", "digits", "dim"))
    weights = dim * digits + (width * (digits + dim + (layers - 1) * width) if layers else 0)
    rows = width * layers + dim * (2 if layers else 1)
    levels = sum(2**b for b in real.digit_bits)
    packed = 32 * math.ceil(weights * hyper["weight_bits"] / 32)
    assert bits.total == packed + 16 * (levels + rows + width * layers + dim)


def test_a_large_table_takes_a_twentieth():
    hyper = dict(dim=4, index_bits=12, digits=8, width=32, layers=2, weight_bits=6)
    assert MlpTable(**hyper).stored_bits().total < 16 * 4 * 4096 / 20


@pytest.mark.parametrize("hyper", SHAPES)
def test_buffers_are_the_table(hyper):
    table, _ = filled(hyper)
    with torch.device("meta"):
        other = MlpTable(**hyper)
    other = other.to_empty(device="cpu")
    other.load_state_dict(table.state_dict())
    entries = table.entries()
    assert entries.shape == (2 ** hyper["index_bits"], hyper["dim"]) and entries.dtype == torch.float32
    assert torch.equal(entries, entries.half().float()) and torch.isfinite(entries).all()
    assert torch.equal(entries, table.entries()) and torch.equal(entries, other.entries())
    assert torch.equal(entries, table.half().entries())


@pytest.mark.parametrize("hyper", SHAPES)
def test_every_entry_is_the_definition_s(hyper):
    table, (levels, weights, biases) = filled(hyper)
    assert sum(table.digit_bits) == hyper["index_bits"] and max(table.digit_bits) - min(table.digit_bits) <= 1
    largest = 2 ** (hyper["weight_bits"] - 1) - 1
    matrices = []
    for matrix in table.matrices(weights):
        scale = (matrix.abs().amax(dim=1, keepdim=True) / largest).half().float()
        matrices.append(((matrix / scale).round().clamp(-largest, largest) * scale).double())
    biases = biases.half().double().split(table.bias_sizes)
    entries = table.entries()
    for code in range(0, len(entries), max(1, len(entries) // 61)):
        text = format(code, f"0{hyper['index_bits']}b")
        z, start = [], 0
        for bits in table.digit_bits:
            z.append(levels[start + int(text[:bits], 2)].half().double())
            text, start = text[bits:], start + 2**bits
        z = torch.stack(z)
        entry = matrices[-1] @ z + biases[-1]
        h = None
        for matrix, bias in zip(matrices[:-2], biases[:-1], strict=True):
            step = torch.nn.functional.gelu(matrix @ (z if h is None else h) + bias)
            h = step if h is None else h + step
        if h is not None:
            entry = entry + matrices[-2] @ h
        assert torch.allclose(entries[code].double(), entry, rtol=1e-3, atol=1e-6)


def test_training_sees_the_stored_weights():
    table, (_, weights, _) = filled(SHAPES[1])
    weights.requires_grad_()
    seen = table.straight_through(weights)
    seen.sum().backward()
    assert torch.equal(weights.grad, torch.ones_like(weights)) and not torch.equal(seen, weights)
    again = table.store(table.levels.float(), seen.detach(), table.biases.float())
    assert torch.allclose(again["row_scale"].float(), table.row_scale.float(), rtol=2e-3)
    assert torch.equal(again["codes"], table.codes)


def test_rows_of_zeros_and_wrong_shapes():
    table, _ = filled(SHAPES[0])
    table.fill(**table.store(table.levels.float(), torch.zeros(table.weights), torch.zeros(len(table.biases))))
    assert torch.equal(table.entries(), torch.zeros(256, 4))
    stored = dict(table.named_buffers())
    with pytest.raises(AssertionError, match="levels"):
        table.fill(**stored | {"levels": table.levels[1:]})
    with pytest.raises(AssertionError):
        MlpTable(dim=4, index_bits=4, digits=5, width=4, layers=1, weight_bits=8)
