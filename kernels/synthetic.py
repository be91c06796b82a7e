"""Layers of random stored bits, for tests and for timing shapes without weights: almost any bits are a layer."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from kernels.formats.bitpack import pack
from kernels.formats.bits import Scalar, Spec, table_spec
from kernels.formats.codebook import CodebookLinear
from kernels.formats.conv import ConvLinear, weight_levels
from kernels.formats.order import index_bits
from kernels.formats.packed import PackedLinear
from kernels.formats.stored import StoredModule
from kernels.formats.tables import Table

TYPICAL: dict[str, Spec] = {  # what benchmarks and tuners measure: the formats as methods store them, by bits
    "4-bit": dict(format="uniform", bits=4, group=128, offset="symmetric"),
    "3-bit": dict(format="uniform", bits=3, group=128, offset="symmetric"),
    "2-bit": dict(format="uniform", bits=2, group=64, offset="symmetric"),
    "nf4": dict(format="codebook", dim=1, index_bits=4, block=64, scales="dynamic", table="nf"),
    "nf3": dict(format="codebook", dim=1, index_bits=3, block=64, scales="dynamic", table="nf"),
    "nf2": dict(format="codebook", dim=1, index_bits=2, block=64, scales="dynamic", table="nf"),
    "2x64 (3 bits)": dict(format="codebook", dim=2, index_bits=6, block=64),
    "4x256 (2 bits)": dict(format="codebook", dim=4, index_bits=8, block=64),
    "4x256 + rank 64": dict(format="codebook", dim=4, index_bits=8, block=64, rank=64),
}


def random_layer(
    spec: Mapping[str, Scalar], rows: int, columns: int, bias: bool = False, seed: int = 0
) -> PackedLinear:
    """A layer of this configuration on the CPU, with a table of its own where it decodes from a shared one. Scales and
    entries are small positive numbers, orders of rows and columns are permutations, everything else (padding too) is
    uniformly random bits."""
    generator = torch.Generator().manual_seed(seed)
    layer = PackedLinear.from_spec({**spec, "in_features": columns, "out_features": rows, "bias": bias}, "cpu")
    if layer.table_key:
        layer.attach(random_table(table_spec(layer.spec()), seed))
    layer.fill(**_random(layer, generator) | _valid(layer, generator))
    if bias:
        layer.set_bias(torch.randn(rows, generator=generator))
    return layer


def random_table(spec: Mapping[str, Scalar], seed: int = 0) -> Table:
    """A table of this description on the CPU, of random bits like a layer's."""
    table = Table.from_spec(spec, "cpu")
    table.fill(**_random(table, torch.Generator().manual_seed(seed)))
    return table


def _valid(layer: PackedLinear, generator: torch.Generator) -> dict[str, Tensor]:
    """Buffers in which not any bits would be a layer: packed permutations, and codes of fewer levels than they could
    tell apart."""
    if layer.reassembly is not None:
        place_I, copies_I = _reassembly(layer.in_features, generator)
        return {f"reassembly.{name}": t for name, t in layer.reassembly.tensors(place_I, copies_I).items()}
    if isinstance(layer, CodebookLinear) and layer.order is not None:
        bands = len(layer.order.packed)
        order_ZI = torch.stack([torch.randperm(layer.in_features, generator=generator) for _ in range(bands)])
        return {f"order.{name}": tensor for name, tensor in layer.order.store(order_ZI).items()}
    if not isinstance(layer, ConvLinear):
        return {}
    stored = {}
    if layer.weight_bits < 16:
        weights, levels = sum(o * i * k * k for o, i, k in layer.shapes), weight_levels(layer.weight_bits, layer.levels)
        codes_N = torch.randint(len(levels), (1, weights), generator=generator)
        stored["weights"] = pack(codes_N, layer.weight_bits)[0]
    if layer.reorder:
        for name, count in (("row_order", layer.out_features), ("column_order", layer.in_features)):
            order_N = torch.randperm(count, generator=generator)
            stored[name] = pack(order_N[None], index_bits(count))[0]
    return stored


def _reassembly(columns: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Places and copies of channels: a random tenth stands at three places, and as many places fewer have the rest."""
    copies_I = torch.ones(columns, dtype=torch.long)
    order_I = torch.randperm(columns, generator=generator)
    split = columns // 10
    copies_I[order_I[:split]] = 3
    merged_I = torch.zeros(columns, dtype=torch.bool)
    merged_I[order_I[split : 3 * split]] = True  # each with the last channel of all, which is never split
    last = int(order_I[-1])
    place_I = torch.where(merged_I, 0, copies_I).cumsum(0) - torch.where(merged_I, 0, copies_I)
    place_I[merged_I] = place_I[last]
    return place_I, copies_I


def _random(module: StoredModule, generator: torch.Generator) -> dict[str, Tensor]:
    tensors = {}
    for name in module.stored_parts():
        like = module.get_buffer(name)
        if name == "order":
            tensors[name] = torch.randperm(len(like), generator=generator).to(torch.int16)
        elif like.is_floating_point():
            tensors[name] = (0.01 + 0.1 * torch.rand(like.shape, generator=generator)).to(like.dtype)
        else:
            limits = torch.iinfo(like.dtype)
            tensors[name] = torch.randint(limits.min, limits.max + 1, like.shape, generator=generator, dtype=like.dtype)
    return tensors
