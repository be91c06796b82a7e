"""Every weight of a model by shape alone, and what that is for published models: no torch is needed to count them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from kernels.formats.layer import LayerSpec


def _llama(
    hidden: int, ffn: int, layers: int, heads: int, kv_heads: int, vocab: int, model_type: str = "llama", **more: Any
) -> dict[str, Any]:
    return dict(
        model_type=model_type,
        hidden_size=hidden,
        intermediate_size=ffn,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        vocab_size=vocab,
        tie_word_embeddings=False,
        **more,
    )


# Configurations of published models, so that `plan` can count their bits without a download: of each config.json what
# decides shapes.
PRESETS: dict[str, dict[str, Any]] = {
    "llama2-7b": _llama(4096, 11008, 32, 32, 32, 32000),
    "llama2-13b": _llama(5120, 13824, 40, 40, 40, 32000),
    "llama2-70b": _llama(8192, 28672, 80, 64, 8, 32000),
    "llama3.2-1b": _llama(2048, 8192, 16, 32, 8, 128256) | {"tie_word_embeddings": True},
    "llama3-8b": _llama(4096, 14336, 32, 32, 8, 128256),
    "llama3-70b": _llama(8192, 28672, 80, 64, 8, 128256),
    "mistral-7b": _llama(4096, 14336, 32, 32, 8, 32000, "mistral"),
    "smollm2-135m": _llama(576, 1536, 30, 9, 3, 49152) | {"tie_word_embeddings": True},
    "qwen2.5-0.5b": _llama(896, 4864, 24, 14, 2, 151936, "qwen2") | {"tie_word_embeddings": True},
    "qwen2.5-7b": _llama(3584, 18944, 28, 28, 4, 152064, "qwen2"),
}


@dataclass(frozen=True)
class BlockSpec:
    name: str
    layers: tuple[LayerSpec, ...]


@dataclass(frozen=True)
class Inventory:
    """Every weight of a model, by shape alone."""

    blocks: tuple[BlockSpec, ...]
    # Block weights that are no linear layer -> count; 16 bits each.
    uncovered: dict[str, int] = field(default_factory=dict)
    rest_weights: int = 0

    @property
    def layers(self) -> list[LayerSpec]:
        return [layer for block in self.blocks for layer in block.layers]

    @property
    def weights(self) -> int:
        """The denominator of bits per weight."""
        return sum(layer.weights for layer in self.layers) + sum(self.uncovered.values())

    @property
    def uncovered_bits(self) -> int:
        return 16 * sum(self.uncovered.values())

    @property
    def uncovered_note(self) -> str:
        """What a reader must know of them; "" where there are none."""
        if not self.uncovered:
            return ""
        roles = dict.fromkeys(role_of(name, block.name) for name in self.uncovered for block in self.blocks)
        share = sum(self.uncovered.values()) / self.weights
        names = ", ".join(filter(None, roles))
        return f"{100 * share:.2g} % of the block weights are in no linear layer and count at 16 bits ({names})"


def role_of(name: str, block: str) -> str:
    """A name inside a block, less the number of an expert; "" for a name outside."""
    prefix, _, role = name.partition(f"{block}.")
    head, _, last = role.rpartition(".")
    return "" if prefix else head if last.isdecimal() else role


def laid_out(preset: str) -> Inventory:
    """The inventory of a preset, all of which are Llama's blocks: what harness.model.network finds in transformers' own
    modules of that configuration."""
    config = PRESETS[preset]
    hidden, ffn, vocabulary = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    kept = hidden // config["num_attention_heads"] * config["num_key_value_heads"]  # width of keys, and of values
    bias = config["model_type"] == "qwen2"  # of queries, keys and values
    shapes = {
        "self_attn.q_proj": (hidden, hidden, bias),
        "self_attn.k_proj": (kept, hidden, bias),
        "self_attn.v_proj": (kept, hidden, bias),
        "self_attn.o_proj": (hidden, hidden, False),
        "mlp.gate_proj": (ffn, hidden, False),
        "mlp.up_proj": (ffn, hidden, False),
        "mlp.down_proj": (hidden, ffn, False),
    }
    names = [f"model.layers.{index}" for index in range(config["num_hidden_layers"])]
    blocks = tuple(
        BlockSpec(name, tuple(LayerSpec(f"{name}.{role}", role, *shape) for role, shape in shapes.items()))
        for name in names
    )
    biases = sum(layer.out_features for block in blocks for layer in block.layers if layer.bias)
    norms = (2 * len(blocks) + 1) * hidden
    heads = 1 if config["tie_word_embeddings"] else 2  # tables of the vocabulary: embeddings, and the head
    return Inventory(blocks, rest_weights=heads * vocabulary * hidden + norms + biases)
