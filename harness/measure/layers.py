"""Single products: every shape and configuration of a model, beside the vendor's product of the same shape.

The layers of one shape and configuration are a group, run one after the other and timed together. Groups take turns, so
that by the time one comes round again its weights have left the last cache, as in a model; where all together would
stay, the cache is swept in between."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from harness.measure.machine import last_cache_bytes
from harness.measure.timing import Call, graphed, interleaved, speed_up, spread
from kernels.dispatch import kind
from kernels.formats.packed import PackedLinear
from kernels.synthetic import random_layer

BATCHES = (1, 4, 16)
FEWEST, MOST = 7, 60  # rounds
BEYOND = 2  # last caches that lie between two reads of a weight
MOST_COPIES = 32  # of a layer of random bits; where they are too small to fill the caches, the sweep does


@dataclass(frozen=True)
class Group:
    rows: int
    columns: int
    config: str
    layers: list[PackedLinear]

    @property
    def stored_bytes(self) -> float:
        """Of one layer; a table that layers share is not among them."""
        return self.layers[0].stored_bits().total / 8


def groups_of(layers: Sequence[PackedLinear]) -> list[Group]:
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
    told = [f"{name}={value}" for name, value in spec.items() if name not in plain and usual.get(name) != value]
    return " ".join([layer.format, *told])


def random_group(spec: dict[str, Any], rows: int, columns: int, device: str) -> Group:
    """Layers of random stored bits: where possible so many that the first has left the last cache when its turn comes
    again."""
    first = random_layer(spec, rows, columns)
    layers = [
        first,
        *(
            random_layer(spec, rows, columns, seed=seed)
            for seed in range(1, _copies(first.stored_bits().total / 8, device))
        ),
    ]
    for layer in layers[1:]:
        if layer.table_key:
            layer.attach(first.shared)  # one for all, as in a model
    return Group(rows, columns, describe(first), [layer.to(device) for layer in layers])


def vendor_group(rows: int, columns: int, device: str, dtype: torch.dtype) -> list[nn.Linear]:
    """As many uncompressed ones of random weights."""
    count = _copies(rows * columns * dtype.itemsize, device)
    return [
        nn.Linear(columns, rows, bias=False, device=device, dtype=dtype).requires_grad_(False) for _ in range(count)
    ]


def _copies(bytes_each: float, device: str) -> int:
    return min(MOST_COPIES, max(1, -(-BEYOND * last_cache_bytes(device) // int(bytes_each))))


def layer_times(
    groups: Sequence[Group],
    vendor: Mapping[tuple[int, int], Sequence[nn.Linear]],
    device: str,
    dtype: torch.dtype,
    seconds: float,
    progress: Callable[[int, int], None] = lambda *_: None,
) -> list[dict[str, Any]]:
    """One record per group and batch size: microseconds of one product, stored bytes per second, speed-up over the
    vendor's product of the same shape, each as median with tenth and ninetieth percentile over rounds."""
    packed = sum(group.stored_bytes * len(group.layers) for group in groups)
    before = _between(device, dtype, sweep=packed < BEYOND * last_cache_bytes(device))
    records = []
    for done, batch in enumerate(BATCHES):
        calls: dict[str, Call] = {}
        counts: dict[str, int] = {}
        for index, group in enumerate(groups):
            calls[f"group {index}"] = _prepared(group.layers, _inputs(batch, group.columns, device, dtype), device)
            counts[f"group {index}"] = len(group.layers)
        for (rows, columns), linears in vendor.items():
            calls[f"vendor {rows}x{columns}"] = _prepared(linears, _inputs(batch, columns, device, dtype), device)
            counts[f"vendor {rows}x{columns}"] = len(linears)
        taken = interleaved(calls, device, seconds, FEWEST, MOST, before)
        each = {name: [value / counts[name] for value in values] for name, values in taken.items()}
        for index, group in enumerate(groups):
            own = each[f"group {index}"]
            record = {
                "rows": group.rows,
                "columns": group.columns,
                "config": group.config,
                "kind": kind(group.layers[0], device.partition(":")[0]),
                "layers": len(group.layers),
                "stored_bpw": 8 * group.stored_bytes / (group.rows * group.columns),
                "batch": batch,
                "microseconds": spread([1e6 * value for value in own]),
                "gb_per_s": spread([group.stored_bytes / value / 1e9 for value in own]),
            }
            beside = each.get(f"vendor {group.rows}x{group.columns}")
            if beside:
                record["vendor_microseconds"] = spread([1e6 * value for value in beside])
                record["speed_up"] = speed_up(own, beside)
            records.append(record)
        progress(done + 1, len(BATCHES))
    return records


def _prepared(layers: Sequence[nn.Module], x_BI: Tensor, device: str) -> Call:
    @torch.inference_mode()
    def call() -> None:
        for layer in layers:
            layer(x_BI)

    call()
    return graphed(call, device)


def _inputs(batch: int, columns: int, device: str, dtype: torch.dtype) -> Tensor:
    return torch.randn(batch, columns, generator=torch.Generator().manual_seed(batch)).to(device, dtype)


def _between(device: str, dtype: torch.dtype, sweep: bool) -> Call:
    """What runs in front of every group: a small product of no one's, so that threads and instructions are awake, and a
    walk through other memory where the groups alone would not push each other out of the last cache."""
    small = random_layer(dict(format="uniform", bits=4, group=64, offset="zero"), 512, 512).to(device)
    x = torch.ones(1, 512, device=device, dtype=dtype)
    buffer = torch.ones(BEYOND * last_cache_bytes(device) // 4 if sweep else 1, device=device)

    @torch.inference_mode()
    def call() -> None:
        buffer.add_(1)
        small(x)

    return call
