"""Layers of random stored bits, for tests and for timing shapes without weights: any bits are a layer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kernels.codebook import table_spec
from kernels.packed import PackedLinear
from kernels.stored import StoredModule
from kernels.tables import Table


def random_layer(spec: dict[str, Any], rows: int, columns: int, bias: bool = False, seed: int = 0) -> PackedLinear:
    """A layer of this configuration on the CPU, with a table of its own where it decodes from a shared one. Scales and entries are small
    positive numbers, an order of columns is a permutation, everything else (padding too) is uniformly random bits."""
    generator = torch.Generator().manual_seed(seed)
    layer = PackedLinear.from_spec({**spec, "in_features": columns, "out_features": rows, "bias": bias}, "cpu")
    if layer.table_key:
        layer.attach(random_table(table_spec(layer.spec()), seed))
    layer.fill(**_random(layer, generator))
    if bias:
        layer.set_bias(torch.randn(rows, generator=generator))
    return layer


def random_table(spec: dict[str, Any], seed: int = 0) -> Table:
    table = Table.from_spec(spec, "cpu")
    table.fill(**_random(table, torch.Generator().manual_seed(seed)))
    return table


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
