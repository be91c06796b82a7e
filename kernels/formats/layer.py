"""One linear layer by its shapes (`LayerSpec`), and what it is to be stored as (`LayerConfig`): together they decide
the stored bits."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, Self

from kernels.formats.bits import Spec, StoredBits, table_key, table_spec

if TYPE_CHECKING:
    import torch

    from kernels.formats.packed import PackedLinear
    from kernels.formats.tables import Table


@dataclass(frozen=True)
class LayerSpec:
    """One linear layer, known from shapes alone."""

    name: str  # dotted name in the model
    # Its name within the block, shared by the same layer of every block ("self_attn.q_proj") and by all experts.
    role: str
    out_features: int
    in_features: int
    bias: bool

    @property
    def weights(self) -> int:
        return self.out_features * self.in_features


@dataclass(frozen=True)
class LayerConfig:
    """A packed format with its enums: everything but the shape. Decides the stored bits of a layer exactly."""

    format: str
    hyper: tuple[tuple[str, Any], ...]

    @classmethod
    def of(cls, format: str, **hyper: Any) -> Self:
        return cls(format, tuple(sorted(hyper.items())))

    def __getitem__(self, key: str) -> Any:
        return dict(self.hyper)[key]

    def layout(self, layer: LayerSpec, device: str | torch.device = "meta") -> PackedLinear:
        """The empty module this configuration stores for `layer`."""
        from kernels.formats.packed import PackedLinear

        shape = dict(in_features=layer.in_features, out_features=layer.out_features, bias=layer.bias)
        return PackedLinear.from_spec({"format": self.format, **shape, **dict(self.hyper)}, device)

    def stored_bits(self, layer: LayerSpec) -> StoredBits:
        """Stored bits of the layer alone: a table it shares is counted once for the model (`shared_bits`)."""
        return _stored_bits(self, layer.out_features, layer.in_features)

    @property
    def table_key(self) -> str:
        """Name of the shared table the layer decodes from; "" for none."""
        return table_key(dict(self.hyper))

    def table(self, device: str | torch.device = "meta") -> Table:
        """That table, empty."""
        from kernels.formats.tables import Table

        return Table.from_spec(table_spec(dict(self.hyper)), device)

    def to_json(self) -> Spec:
        return {"format": self.format, **dict(self.hyper)}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        return cls.of(**data)

    def without(self, key: str) -> Self:
        """The same configuration with this enum left at its default."""
        return self.of(self.format, **{k: v for k, v in self.hyper if k != key})

    def plus(self, **hyper: Any) -> Self:
        """The same configuration with these enums added."""
        return self.of(self.format, **dict(self.hyper), **hyper)

    def __str__(self) -> str:
        return f"{self.format}({', '.join(f'{k}={v}' for k, v in self.hyper)})"


@cache
def _stored_bits(config: LayerConfig, out_features: int, in_features: int) -> StoredBits:
    return config.layout(LayerSpec("", "", out_features, in_features, bias=False)).stored_bits()


def shared_bits(configs: Iterable[LayerConfig]) -> StoredBits:
    """Stored bits of the tables that layers of these configurations share, each counted once."""
    used = {config.table_key: config for config in configs if config.table_key}
    return sum((config.table().stored_bits() for config in used.values()), StoredBits())
