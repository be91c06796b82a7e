"""Bits by what they are used for, and the spec that decides them; without torch, for whoever only counts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

Scalar = str | int | float | bool
Spec = dict[str, Scalar]  # shapes and enums from which an empty module is laid out: JSON, and never a learnt number

FULL = 16  # bits of activations that are left as they are
ACT_BITS = range(2, FULL + 1)
PARTS = ("codes", "scales", "tables", "adapters")


@dataclass(frozen=True)
class StoredBits:
    """A number of bits for each use of the stored tensors. Padding is counted where it is stored."""

    codes: int = 0  # indices of weights, nothing else
    scales: int = 0  # scales, zero points, minima, per-row factors
    tables: int = 0  # codebooks, decoders, permutations
    adapters: int = 0  # low-rank factors and their scales

    @property
    def total(self) -> int:
        return self.codes + self.scales + self.tables + self.adapters

    def __add__(self, other: StoredBits) -> StoredBits:
        return StoredBits(*(getattr(self, part) + getattr(other, part) for part in PARTS))

    def __mul__(self, times: int) -> StoredBits:
        return StoredBits(*(times * getattr(self, part) for part in PARTS))


def table_key(spec: Mapping[str, Scalar]) -> str:
    """Name of the shared table that a layer of this spec decodes from; "" for none."""
    return f"{spec['share']}:{spec['table']}{spec['dim']}x{spec['index_bits']}" if spec.get("share") else ""


def table_spec(spec: Mapping[str, Scalar]) -> Spec:
    """What kernels.formats.tables.Table.from_spec lays that table out from."""
    return {"form": spec["table"], "dim": spec["dim"], "index_bits": spec["index_bits"]}
