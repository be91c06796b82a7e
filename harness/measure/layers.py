"""Single products: every shape and configuration of a model, in turn with the vendor's product of the same shape.

The layers of one shape and configuration are a group, run one after the other and timed together. Groups take turns, so
that by the time one comes round again its weights have left the last cache, as in a model; where all together would
stay, the cache is swept in between."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from harness.progress import Progress, silent
from harness.store.results import ProductTime, Spread
from kernels.dispatch import fused, kind
from kernels.formats.codebook import CodebookLinear
from kernels.formats.packed import PackedLinear
from kernels.synthetic import random_layer
from kernels.timing import (
    BEYOND,
    Call,
    copies,
    in_succession,
    interleaved,
    last_cache_bytes,
    speed_up,
    spread,
)

BATCHES = (1, 4, 16)
FEWEST, MOST = 7, 60  # rounds


@dataclass(frozen=True)
class Group:
    """Layers of one shape and configuration, which are timed together."""

    rows: int
    columns: int
    config: str
    layers: list[PackedLinear]

    @property
    def stored_bytes(self) -> float:
        """Stored bytes of one layer; a table that layers share is not among them."""
        return self.layers[0].stored_bits().total / 8


def groups_of(layers: Sequence[PackedLinear]) -> list[Group]:
    """The layers sorted into groups, in the order in which each group first comes."""
    found: dict[tuple[int, int, str], list[PackedLinear]] = {}
    for layer in layers:
        found.setdefault((layer.out_features, layer.in_features, describe(layer)), []).append(layer)
    return [Group(*key, members) for key, members in found.items()]


def describe(layer: PackedLinear) -> str:
    """The configuration without what is usual: "codebook dim=2 index_bits=6 block=64 rank=4"."""
    spec = layer.spec()
    usual: dict[str, Any] = {}
    for cls in (PackedLinear, type(layer)):
        usual |= {name: parameter.default for name, parameter in inspect.signature(cls.__init__).parameters.items()}
    plain = ("format", "in_features", "out_features", "bias")
    unusual = [f"{name}={value}" for name, value in spec.items() if name not in plain and usual.get(name) != value]
    return " ".join([layer.format, *unusual])


def random_group(spec: dict[str, Any], rows: int, columns: int, device: str) -> Group:
    """Layers of random stored bits: where possible so many that the first has left the last cache when its turn comes
    again."""
    first = random_layer(spec, rows, columns)
    count = copies(first.stored_bits().total / 8, device)
    layers = [first, *(random_layer(spec, rows, columns, seed=seed) for seed in range(1, count))]
    if isinstance(first, CodebookLinear) and first.table_key:
        for layer in layers[1:]:
            layer.attach(first.shared)  # one for all, as in a model
    return Group(rows, columns, describe(first), [layer.to(device) for layer in layers])


def vendor_group(rows: int, columns: int, device: str, dtype: torch.dtype) -> Sequence[nn.Module]:
    """Uncompressed layers of random weights, again as many as the caches ask for: on a CPU those of 16 bits that its
    backend multiplies, elsewhere the vendor's."""
    if torch.device(device).type == "cpu":
        half = random_group({"format": "dense", "dtype": "float16"}, rows, columns, device)
        if fused(half.layers[0], "cpu"):
            return half.layers
    count = copies(rows * columns * dtype.itemsize, device)
    return [
        nn.Linear(columns, rows, bias=False, device=device, dtype=dtype).requires_grad_(False) for _ in range(count)
    ]


def product_times(
    groups: Sequence[Group],
    vendor: Mapping[tuple[int, int], Sequence[nn.Module]],
    device: str,
    dtype: torch.dtype,
    seconds: float,
    progress: Progress = silent,
) -> tuple[ProductTime, ...]:
    """A record for every batch size and, within it, every group, about `seconds` of rounds for each batch size.

    `vendor` holds the uncompressed layers of a shape (rows, columns) that groups of that shape take turns with."""
    packed = sum(group.stored_bytes * len(group.layers) for group in groups)
    before = _between(device, dtype, sweep=packed < BEYOND * last_cache_bytes(device))
    records: list[ProductTime] = []
    for done, batch in enumerate(BATCHES):
        calls: dict[str, Call] = {}
        counts: dict[str, int] = {}
        for index, group in enumerate(groups):
            calls[f"group {index}"] = _all(group.layers, _inputs(batch, group.columns, device, dtype), device)
            counts[f"group {index}"] = len(group.layers)
        for (rows, columns), linears in vendor.items():
            calls[f"vendor {rows}x{columns}"] = _all(linears, _inputs(batch, columns, device, dtype), device)
            counts[f"vendor {rows}x{columns}"] = len(linears)
        taken = interleaved(calls, device, seconds, FEWEST, MOST, before)
        each = {name: [value / counts[name] for value in values] for name, values in taken.items()}
        for index, group in enumerate(groups):
            own = each[f"group {index}"]
            other = each.get(f"vendor {group.rows}x{group.columns}")
            record = ProductTime(
                rows=group.rows,
                columns=group.columns,
                config=group.config,
                kind=kind(group.layers[0], torch.device(device).type),
                layers=len(group.layers),
                stored_bpw=8 * group.stored_bytes / (group.rows * group.columns),
                batch=batch,
                microseconds=_microseconds(own),
                gb_per_s=Spread(**spread([group.stored_bytes / value / 1e9 for value in own])),
                vendor_microseconds=_microseconds(other) if other else None,
                speed_up=Spread(**speed_up(own, other)) if other else None,
            )
            records.append(record)
        progress("single products", done + 1, len(BATCHES))
    return tuple(records)


def _microseconds(seconds: Sequence[float]) -> Spread:
    return Spread(**spread([1e6 * value for value in seconds]))


def _all(layers: Sequence[nn.Module], x_NI: Tensor, device: str) -> Call:
    return in_succession([partial(layer, x_NI) for layer in layers], device)


def _inputs(batch: int, columns: int, device: str, dtype: torch.dtype) -> Tensor:
    return torch.randn(batch, columns, generator=torch.Generator().manual_seed(batch)).to(device, dtype)


def _between(device: str, dtype: torch.dtype, sweep: bool) -> Call:
    """The call that runs in front of every group: a small product that is no group's, so that threads and instructions
    are awake, and where the groups alone would not push each other out of the last cache, a walk through memory."""
    small = random_layer(dict(format="uniform", bits=4, group=64, offset="zero"), 512, 512).to(device)
    x = torch.ones(1, 512, device=device, dtype=dtype)
    buffer = torch.ones(BEYOND * last_cache_bytes(device) // 4 if sweep else 1, device=device)

    @torch.inference_mode()
    def call() -> None:
        buffer.add_(1)
        small(x)

    return call
