"""Which models can be run here, told from their configuration alone, and how many positions they know."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PretrainedConfig


def require_supported(config: PretrainedConfig) -> None:
    """Raises ValueError, in one line that names the type of model, for all but decoder-only language models of
    attention."""
    if reason := _obstacle(config):
        raise ValueError(f"models of type {config.model_type} {reason}: give a decoder-only language model")


def _obstacle(config: PretrainedConfig) -> str:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_MASKED_LM_MAPPING

    if getattr(config, "is_encoder_decoder", False):
        return "have an encoder and a decoder"
    sort = type(config)
    if sort in MODEL_FOR_MASKED_LM_MAPPING and not getattr(config, "is_decoder", False):
        return "are encoders, whose tokens see those behind them"
    if sort not in MODEL_FOR_CAUSAL_LM_MAPPING:
        return "are no causal language models that transformers knows"
    if MODEL_FOR_CAUSAL_LM_MAPPING[sort]._is_stateful:
        return "carry a recurrent state from token to token, which is not supported"
    return ""


def known_positions(config: PretrainedConfig) -> int | None:
    """Tokens a window may hold; None where the configuration sets no end."""
    text = config.get_text_config()
    found = (getattr(text, name, None) for name in ("max_position_embeddings", "max_seq_len"))
    return next((count for count in found if isinstance(count, int) and count > 0), None)
