"""The bit ledger: bits counted from tensors, as exact integers.

`stored` is everything needed to rebuild the block weights; it is what a budget limits. `code` is the indices alone.
`resident` is what decoding holds in memory. The denominator is the number of original block weights
(harness.model.Inventory.weights)."""

from __future__ import annotations

import json
import struct
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

from kernels.formats.bits import StoredBits
from kernels.formats.layer import LayerConfig, LayerSpec, shared_bits

FILL_TOLERANCE = Fraction(2, 100)  # bits per weight an allocation may leave unused before its row says `underspent`


@dataclass(frozen=True)
class Ledger:
    """The bits of a model's block weights, and how many weights they stand for."""

    bits: StoredBits  # packed layers
    uncovered_bits: int  # block weights no method covers, at 16 bits
    weights: int

    @property
    def stored_bits(self) -> int:
        return self.bits.total + self.uncovered_bits

    def bpw(self, bits: int) -> float:
        return bits / self.weights

    @property
    def stored_bpw(self) -> float:
        return self.bpw(self.stored_bits)

    def fits(self, budget: Fraction) -> bool:
        return self.stored_bits <= budget * self.weights


def planned(
    configs: Mapping[str, LayerConfig], layers: Iterable[LayerSpec], uncovered_bits: int, weights: int
) -> Ledger:
    """What layers of these configurations will store, from shapes alone."""
    alike = Counter((configs[layer.name], layer.out_features, layer.in_features) for layer in layers)
    return counted(alike, uncovered_bits, weights)


def counted(layers: Mapping[tuple[LayerConfig, int, int], int], uncovered_bits: int, weights: int) -> Ledger:
    """The same of so many layers of each configuration and shape (out_features, in_features)."""
    total = shared_bits({config for config, _, _ in layers})
    for (config, rows, columns), count in layers.items():
        total += config.stored_bits(LayerSpec("", "", rows, columns, bias=False)) * count
    return Ledger(total, uncovered_bits, weights)


def underspent(stored_bits: int, weights: int, budget: Fraction) -> bool:
    return stored_bits < (budget - FILL_TOLERANCE) * weights


def payload_bytes(path: Path) -> int:
    """Bytes of tensors in a safetensors file: its size less the header, which the header's own offsets must confirm."""
    with open(path, "rb") as handle:
        (header_bytes,) = struct.unpack("<Q", handle.read(8))
        header = json.loads(handle.read(header_bytes))
    end = max((entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"), default=0)
    assert path.stat().st_size == 8 + header_bytes + end, f"{path} has bytes no tensor owns"
    return end
