"""Codebooks: each code is the index of one of K vectors of d weights, times a scale per block of input columns.

    w[o, i] = table[code[o // d, i], o % d] * scale[o, i // block]

The d weights of a vector are consecutive *rows* of one column, as in ReALLM's released code: one column of the matrix
is a whole number of vectors, so column-by-column error feedback assigns vectors without looking ahead. With
along="columns" they are consecutive columns of one row, table[code[o, i // d], i % d]. What they run along is padded up
to a multiple of d; the padded codes are stored and counted. With `band`, columns stand in an order of their own in
every band of rows (kernels.formats.order), which decides which of them share a scale. The table (`table`) is one of

    learnt        stored with the layer, a codebook of its own
    nf            the NormalFloat constants, not stored (d = 1)
    plain, mlp    of a form in kernels.formats.tables, shared by the layers of group `share`, stored and counted once
                  with the model
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from kernels.formats.bitpack import pack, packed_words, unpack
from kernels.formats.bits import table_key
from kernels.formats.normal_float import nf_levels
from kernels.formats.order import BandOrder
from kernels.formats.packed import PackedLinear
from kernels.formats.scales import BlockScales, ScaleForm, per_column
from kernels.formats.tables import TABLES, Table

OWN = ("learnt", "nf")  # tables of a layer's own; others stand in TABLES, and layers refer to them


class CodebookLinear(PackedLinear):
    """A layer of codes into a table of 2**index_bits vectors of `dim` weights, under a scale per `block` columns."""

    format: ClassVar[str] = "codebook"
    part_of: ClassVar[dict[str, str]] = {"codes": "codes", "codebook": "tables"}
    codes: Tensor  # int32 [J, W], or with along="columns" [O, W]
    codebook: Tensor | None  # fp16 [K, D]
    shared: Table  # the table of the model's that `attach` was given, where `table_key` names one

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool,
        *,
        dim: int,
        index_bits: int,
        block: int,
        scales: str = "double",
        scale_bits: int = 8,
        scale_group: int = 256,
        scale_dtype: str = "float32",
        table: str = "learnt",
        share: str = "",
        band: int = 0,
        order_bits: int = 0,
        along: str = "rows",
        **added: Any,
    ) -> None:
        super().__init__(
            in_features,
            out_features,
            bias,
            dim=dim,
            index_bits=index_bits,
            block=block,
            scales=scales,
            scale_bits=scale_bits,
            scale_group=scale_group,
            scale_dtype=scale_dtype,
            table=table,
            share=share,
            band=band,
            order_bits=order_bits,
            along=along,
            **added,
        )
        assert dim in (1, 2, 4, 8) and 1 <= index_bits <= 16 and block >= 0 and along in ("rows", "columns")
        assert along == "columns" or band % dim == 0
        assert table in OWN or table in TABLES, f"unknown table '{table}'"
        assert bool(share) == (table not in OWN) and (table != "nf" or dim == 1)
        self.dim, self.index_bits = dim, index_bits
        self.table_key = table_key(self._hyper)
        self.block = min(block or in_features, in_features)  # 0: one block for the whole row
        self.along = along
        down, across = out_features, in_features  # codes
        if along == "rows":
            down = -(-out_features // dim)
        else:
            across = -(-in_features // dim)
        self.codes_across = across
        self.register_buffer("codes", torch.empty(down, packed_words(across, index_bits), dtype=torch.int32))
        self.register_buffer(
            "codebook", torch.empty(2**index_bits, dim, dtype=torch.float16) if table == "learnt" else None
        )
        form = ScaleForm(scales, scale_bits, scale_group, scale_dtype)
        self.scales = BlockScales(out_features, -(-in_features // self.block), form)
        self.order = BandOrder(out_features, in_features, band, order_bits) if band else None

    def attach(self, table: nn.Module) -> None:
        """Decode from a table that the model owns. Not a submodule: the bytes are not this layer's."""
        assert isinstance(table, Table) and (table.form, table.dim, table.index_bits) == (
            self._hyper["table"],
            self.dim,
            self.index_bits,
        )
        object.__setattr__(self, "shared", table)

    def entries(self) -> Tensor:
        """The table, fp32 [K, D]."""
        if self.table_key:
            return self.shared.entries()
        if self.codebook is not None:
            return self.codebook.float()
        return nf_levels(self.index_bits).to(self.codes.device)[:, None]

    def tensors(
        self, code_JI: Tensor, scales: Mapping[str, Tensor], entry_KD: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Buffers of the base by name, for `fill`: the inverse of `indices`.

        `code_JI` [J, I], or [O, J] with along="columns"; `scales` are buffers of `BlockScales` as `quantise_scales`
        makes them; `entry_KD` is stored in fp16 by a layer with a codebook of its own, and of no effect in others."""
        own: dict[str, Tensor] = {}
        if self.codebook is not None:
            assert entry_KD is not None, "a learnt codebook is stored with the layer"
            own["codebook"] = entry_KD.half()
        prefixed = {f"scales.{name}": tensor for name, tensor in scales.items()}
        return {"codes": pack(code_JI, self.index_bits), **own, **prefixed}

    def decode_codes(self) -> Tensor:
        return self.base_of(self.base_learnt(), self.indices())

    def indices(self) -> Tensor:
        """Codes, int32 [J, I], or with along="columns" [O, J]: J vectors down a column or along a row."""
        return unpack(self.codes, self.index_bits, self.codes_across)

    def unit(self, code_JI: Tensor, entry_KD: Tensor) -> Tensor:
        """What the codes stand for under scales of one, [O, I] in the stored order of columns."""
        if self.dim == 1:  # an embedding takes five times as long for single numbers
            vector_JID = entry_KD.flatten().index_select(0, code_JI.flatten()).view(*code_JI.shape, 1)
        else:
            vector_JID = torch.nn.functional.embedding(code_JI, entry_KD)
        if self.along == "columns":
            return vector_JID.flatten(1)[:, : self.in_features]
        return vector_JID.transpose(1, 2).reshape(-1, self.in_features)[: self.out_features]

    def base_learnt(self) -> dict[str, Tensor]:
        """A table of a layer's own is among them, one that layers share is not."""
        own = {} if self.codebook is None else {"entries": self.entries()}
        return {"scale": self.scales.decode()} | own

    def base_of(self, learnt: Mapping[str, Tensor], codes: Tensor) -> Tensor:
        unit_OI = self.unit(codes, learnt["entries"] if "entries" in learnt else self.entries())
        base_OI = unit_OI * per_column(learnt["scale"], self.block, self.in_features)
        return base_OI if self.order is None else self.order.restore(base_OI)

    def base_tensors(self, learnt: Mapping[str, Tensor]) -> dict[str, Tensor]:
        own = {} if self.codebook is None else {"codebook": learnt["entries"].half()}
        return self.scales.tensors(learnt["scale"]) | own
