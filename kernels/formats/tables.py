"""`Table`: K vectors of d weights that many layers decode from, stored and counted once; `TABLES`: its forms by name.

A layer names the table it uses (`share`, a group of layers; kernels.formats.codebook) and holds none of it. The model
owns the tables; whoever loads it hands each layer its own (`attach`). Every form has `entries()`, computed once
from what is stored and then kept: a decoder whose input is a discrete code *is* a table, however it is stored."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from kernels.formats.bits import Scalar, Spec
from kernels.formats.stored import StoredModule
from kernels.registry import Registry


class Table(StoredModule):
    """A table in one stored form. Subclasses set `form`, register buffers from shapes and enums alone, and implement
    `compute`."""

    form: ClassVar[str]  # its name in TABLES

    def __init__(self, dim: int, index_bits: int, **hyper: Any) -> None:
        super().__init__()
        assert dim in (1, 2, 4, 8) and 1 <= index_bits <= 16
        self.dim, self.index_bits = dim, index_bits
        self._hyper = dict(dim=dim, index_bits=index_bits, **hyper)
        self._entries: Tensor | None = None

    def spec(self) -> Spec:
        """Shapes and enums (JSON) from which `from_spec` lays out an empty table of the same buffers."""
        return {"form": self.form, **self._hyper}

    @staticmethod
    def from_spec(spec: Mapping[str, Scalar], device: str | torch.device = "meta") -> Table:
        """An empty table of this description; its form may be one of another package."""
        hyper: dict[str, Any] = dict(spec)
        cls = TABLES.get(hyper.pop("form"))
        with torch.device(device):
            return cls(**hyper)

    def entries(self) -> Tensor:
        """fp32 [K, D], values of fp16 numbers. Kept: the device it is asked for on is the one it was loaded to."""
        if self._entries is None or self._entries.device != self._device():
            self._entries = self.compute().half().float()
        return self._entries

    def fill(self, **tensors: Tensor) -> None:
        """Set all buffers, insisting on the laid out shapes and dtypes."""
        assert tensors.keys() == self.stored_parts().keys(), sorted(tensors)
        for name, value in tensors.items():
            declared = self.get_buffer(name)
            assert value.shape == declared.shape and value.dtype == declared.dtype, (name, value.shape, value.dtype)
            setattr(self, name, value.contiguous())
        self._entries = None

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._entries = None
        super()._load_from_state_dict(*args, **kwargs)

    def compute(self) -> Tensor:
        """`entries` from the stored tensors."""
        raise AssertionError(f"{type(self).__name__} must define compute()")

    @property
    def resident_bits(self) -> int:
        """Bits held while decoding: what is stored, and the entries in fp32."""
        return self.stored_bits().total + 32 * self.dim * 2**self.index_bits


class PlainTable(Table):
    """The entries themselves in fp16."""

    form: ClassVar[str] = "plain"
    part_of: ClassVar[dict[str, str]] = {"values": "tables"}
    values: Tensor

    def __init__(self, dim: int, index_bits: int) -> None:
        super().__init__(dim, index_bits)
        self.register_buffer("values", torch.empty(2**index_bits, dim, dtype=torch.float16))

    def compute(self) -> Tensor:
        return self.values


TABLES: Registry[type[Table]] = Registry(
    "table",
    Table,
    {"plain": "kernels.formats.tables:PlainTable", "mlp": "kernels.formats.mlp_table:MlpTable"},
    group="ptq_harness.tables",
)
