"""Whole tokens of a language model of the Llama family without Python in between: what model.h is handed.

Layers are multiplied by the same products as everywhere else. The keys and values of the tokens in front stand in
tensors of the caller's, and are continued there."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.cpu.build import library
from kernels.cpu.view import DENSE_KINDS, Layer, View, view
from kernels.formats.packed import PackedLinear

LAYERS = ("query", "key", "value", "output", "gate", "up", "down")
NORMS = (
    "norm_before_attention",
    "norm_after_attention",
    "norm_before_mlp",
    "norm_after_mlp",
    "norm_query",
    "norm_key",
)


class _Block(ctypes.Structure):
    """`DecoderBlock` of layer.h, field by field."""

    _fields_ = [
        *((name, ctypes.POINTER(Layer)) for name in LAYERS),
        *((name, ctypes.c_void_p) for name in NORMS),
        ("cosines", ctypes.c_void_p),
        ("sines", ctypes.c_void_p),
        ("keys", ctypes.c_void_p),
        ("values", ctypes.c_void_p),
        ("window", ctypes.c_int64),
    ]


class _Model(ctypes.Structure):
    """`Model` of layer.h, field by field."""

    _fields_ = [
        *(
            (name, ctypes.c_int64)
            for name in ("blocks", "hidden", "inner", "heads", "kv_heads", "head_dim", "vocabulary", "positions")
        ),
        ("block", ctypes.POINTER(_Block)),
        ("embedding", ctypes.c_void_p),
        ("embedding_kind", ctypes.c_int64),
        ("embedding_scale", ctypes.c_double),
        ("norm", ctypes.c_void_p),
        ("head", ctypes.POINTER(Layer)),
        *((name, ctypes.c_double) for name in ("epsilon", "attention_scale", "attention_cap", "logit_cap")),
        ("gelu", ctypes.c_int64),
    ]


@dataclass(frozen=True)
class BlockParts:
    """One decoder block. Norms are fp32 factors [H], of heads [head_dim]; None where the architecture has none."""

    query: PackedLinear
    key: PackedLinear
    value: PackedLinear
    output: PackedLinear
    gate: PackedLinear
    up: PackedLinear
    down: PackedLinear
    norm_before_attention: Tensor
    norm_before_mlp: Tensor
    cosines: Tensor  # fp32 [positions, head_dim]
    sines: Tensor
    keys: Tensor  # fp32 [B, kv_heads, positions, head_dim]
    values: Tensor
    norm_after_attention: Tensor | None = None
    norm_after_mlp: Tensor | None = None
    norm_query: Tensor | None = None
    norm_key: Tensor | None = None
    window: int = 0  # positions a query sees; 0: all


@dataclass(frozen=True)
class ModelParts:
    """Everything that turns a token's number into logits."""

    blocks: Sequence[BlockParts]
    embedding: Tensor  # [V, H], 16 bits or fp32
    norm: Tensor  # fp32 [H]
    head: PackedLinear
    epsilon: float  # of all norms
    attention_scale: float
    embedding_scale: float = 1.0
    attention_cap: float = 0.0  # tanh(score / cap) * cap; 0: none
    logit_cap: float = 0.0
    gelu: bool = False  # the MLP's activation: SiLU, or GELU by tanh


class TokenDecoder:
    """Decodes the tokens of B sequences, one of each at a time."""

    def __init__(self, parts: ModelParts) -> None:
        compiled = library()
        assert compiled is not None
        self._step = compiled.step
        self._kept: list[Tensor | View | ctypes.Structure] = []  # what the structures point to
        blocks = (_Block * len(parts.blocks))(*(self._block(block) for block in parts.blocks))
        batch, kv_heads, positions, head_dim = parts.blocks[0].keys.shape
        self._model = _Model(
            blocks=len(blocks),
            hidden=parts.norm.numel(),
            inner=parts.blocks[0].gate.out_features,
            heads=parts.blocks[0].query.out_features // head_dim,
            kv_heads=kv_heads,
            head_dim=head_dim,
            vocabulary=len(parts.embedding),
            positions=positions,
            block=blocks,
            embedding=self._pointer(parts.embedding),
            embedding_kind=DENSE_KINDS[parts.embedding.dtype],
            embedding_scale=parts.embedding_scale,
            norm=self._pointer(parts.norm),
            head=self._layer(parts.head),
            epsilon=parts.epsilon,
            attention_scale=parts.attention_scale,
            attention_cap=parts.attention_cap,
            logit_cap=parts.logit_cap,
            gelu=parts.gelu,
        )
        self._address = ctypes.addressof(self._model)
        self._positions = positions
        self.logits_BV = torch.empty(batch, parts.head.out_features)

    def step(self, ids_B1: Tensor, position: int) -> None:
        """Append the tokens (int64 [B, 1]) at `position`, put what they predict into `logits_BV`, and the likeliest
        next tokens in their place."""
        assert ids_B1.is_contiguous() and ids_B1.dtype == torch.int64 and ids_B1.numel() == len(self.logits_BV)
        assert position < self._positions
        ids, logits, threads = ids_B1.data_ptr(), self.logits_BV.data_ptr(), torch.get_num_threads()
        self._step(self._address, ids, len(self.logits_BV), position, logits, ids, threads)

    def _block(self, block: BlockParts) -> _Block:
        layers = {name: self._layer(getattr(block, name)) for name in LAYERS}
        tensors = {name: getattr(block, name) for name in (*NORMS, "cosines", "sines", "keys", "values")}
        pointers = {name: self._pointer(tensor) for name, tensor in tensors.items() if tensor is not None}
        return _Block(**layers, **pointers, window=block.window)

    def _layer(self, layer: PackedLinear) -> ctypes._Pointer[Layer]:
        seen = view(layer)
        self._kept.append(seen)
        return ctypes.pointer(seen.structure)

    def _pointer(self, tensor: Tensor) -> int:
        assert tensor.is_contiguous()
        self._kept.append(tensor)
        return tensor.data_ptr()
