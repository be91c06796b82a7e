"""Which models `kernels.cpu.model` decodes, and how their modules are handed to it.

The Llama family: pre-norm decoder blocks of rotary attention and a gated MLP. What differs in it is told by the modules
themselves, except for the few facts in `FAMILIES`. Whether a model was understood is not taken on trust: its tokens are
held against transformers' own forward before anything is timed (harness.measure.measurement)."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, StaticCache

from harness.measure.halves import HalfEmbedding, HalfHead
from kernels.cpu.model import BlockParts, ModelParts, TokenDecoder
from kernels.dispatch import fused
from kernels.formats.packed import PackedLinear

LANES = 16  # fp32 numbers that are worked on at once
ACTIVATIONS = {"silu": False, "gelu_pytorch_tanh": True}  # whether it is GELU
ROLES = {
    "query": "self_attn.q_proj",
    "key": "self_attn.k_proj",
    "value": "self_attn.v_proj",
    "output": "self_attn.o_proj",
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
    "down": "mlp.down_proj",
}


@dataclass(frozen=True)
class Family:
    """What a type of model does that its modules do not tell."""

    norm_offset: float = 0.0  # added to the weights of its norms
    sandwich: bool = False  # norms behind attention and MLP, too


FAMILIES = {
    "llama": Family(),
    "mistral": Family(),
    "qwen2": Family(),
    "qwen3": Family(),
    "gemma3_text": Family(norm_offset=1.0, sandwich=True),
}


def token_decoder(model: PreTrainedModel, cache: StaticCache, positions: int) -> TokenDecoder | str:
    """A decoder that goes on behind what is in `cache`, a static one of `positions`; or why this model has none."""
    kind = model.config.model_type
    if kind not in FAMILIES:
        return f"models of type {kind} are run by transformers (natively: {', '.join(FAMILIES)})"
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if not (isinstance(embedding, HalfEmbedding) and isinstance(head, HalfHead)):
        return "the head has a bias, or no 16-bit product"
    blocks = model.base_model.layers
    for block in blocks:
        for role in ROLES.values():
            layer = block.get_submodule(role)
            if not isinstance(layer, PackedLinear) or fused(layer, "cpu") is None:
                return f"{role} has no fused product"
            if layer.reassembly is not None or layer.rounds:
                return f"{role} rounds or reassembles its inputs"
    config = model.config
    activation = getattr(config, "hidden_activation", None) or config.hidden_act
    if activation not in ACTIVATIONS:
        return f"the activation {activation} is not among {', '.join(ACTIVATIONS)}"
    size = blocks[0].self_attn.head_dim
    if size % LANES:
        return f"heads of {size} are no multiple of {LANES}"
    if any(layer.keys.shape[2] != positions or layer.keys.dtype != torch.float32 for layer in cache.layers):
        return "its cache is shorter than the run (a sliding window), or not in fp32"
    family = FAMILIES[kind]
    attention = blocks[0].self_attn
    parts = ModelParts(
        blocks=[
            _block(model, block, index, cache.layers[index], family, positions) for index, block in enumerate(blocks)
        ],
        embedding=embedding.weight,
        embedding_scale=embedding.scale,
        norm=_factor(model.base_model.norm, family),
        head=head.layer,
        epsilon=config.rms_norm_eps,
        attention_scale=attention.scaling,
        attention_cap=getattr(config, "attn_logit_softcapping", None) or 0.0,
        logit_cap=getattr(config, "final_logit_softcapping", None) or 0.0,
        gelu=ACTIVATIONS[activation],
    )
    return TokenDecoder(parts)


def _block(model: PreTrainedModel, block: Any, index: int, cached: Any, family: Family, positions: int) -> BlockParts:
    attention = block.self_attn
    before_mlp = block.pre_feedforward_layernorm if family.sandwich else block.post_attention_layernorm
    cosines, sines = _rotations(model, index, positions)
    window = getattr(attention, "sliding_window", None) or 0
    return BlockParts(
        **{name: block.get_submodule(role) for name, role in ROLES.items()},
        norm_before_attention=_factor(block.input_layernorm, family),
        norm_before_mlp=_factor(before_mlp, family),
        norm_after_attention=_factor(block.post_attention_layernorm, family) if family.sandwich else None,
        norm_after_mlp=_factor(block.post_feedforward_layernorm, family) if family.sandwich else None,
        norm_query=_factor(attention.q_norm, family) if hasattr(attention, "q_norm") else None,
        norm_key=_factor(attention.k_norm, family) if hasattr(attention, "k_norm") else None,
        cosines=cosines,
        sines=sines,
        keys=cached.keys,
        values=cached.values,
        window=window if window < positions else 0,
    )


def _factor(norm: Any, family: Family) -> Tensor:
    return norm.weight.detach().float() + family.norm_offset if family.norm_offset else norm.weight.detach().float()


def _rotations(model: PreTrainedModel, index: int, positions: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines [positions, head_dim] of a block's rotary embedding; those of one kind are made once."""
    rotary: Any = model.base_model.rotary_emb
    more = {}
    if "layer_type" in inspect.signature(rotary.forward).parameters:
        more["layer_type"] = model.config.layer_types[index]
    kept: dict[Any, tuple[Tensor, Tensor]] = rotary.__dict__.setdefault("_rotations", {})
    key = (positions, *more.values())
    if key not in kept:
        with torch.no_grad():
            cosines, sines = rotary(torch.empty(0), torch.arange(positions)[None], **more)
        kept[key] = (cosines[0].contiguous(), sines[0].contiguous())
    return kept[key]
