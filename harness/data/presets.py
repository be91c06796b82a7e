"""Configurations of published models, so that `plan` can count their bits without a download.

Values are those of each model's config.json; only what decides shapes is kept.
"""

from __future__ import annotations

from typing import Any


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


PRESETS: dict[str, dict[str, Any]] = {
    "llama2-7b": _llama(4096, 11008, 32, 32, 32, 32000),
    "llama2-13b": _llama(5120, 13824, 40, 40, 40, 32000),
    "llama2-70b": _llama(8192, 28672, 80, 64, 8, 32000),
    "llama3-8b": _llama(4096, 14336, 32, 32, 8, 128256),
    "llama3-70b": _llama(8192, 28672, 80, 64, 8, 128256),
    "mistral-7b": _llama(4096, 14336, 32, 32, 8, 32000, "mistral"),
    "smollm2-135m": _llama(576, 1536, 30, 9, 3, 49152) | {"tie_word_embeddings": True},
    "qwen2.5-0.5b": _llama(896, 4864, 24, 14, 2, 151936, "qwen2") | {"tie_word_embeddings": True},
    "qwen2.5-7b": _llama(3584, 18944, 28, 28, 4, 152064, "qwen2"),
}
