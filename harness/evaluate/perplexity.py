"""Perplexity: mean negative log-likelihood per window, kept per window so that rows can be compared pairwise."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast

from harness.model import swapped_module

BODY_TOKENS = 8192  # tokens through the decoder at once
HEAD_LOGITS = 1 << 26  # logits held at once (256 MiB in fp32)


@dataclass(frozen=True)
class Perplexity:
    """`window_nll` in nats per token; `nonfinite` counts windows whose loss is not a number, and none is averaged away."""

    window_nll: list[float]
    scored_tokens: int

    @property
    def nonfinite(self) -> int:
        return sum(not math.isfinite(value) for value in self.window_nll)

    @property
    def value(self) -> float:
        mean = math.fsum(self.window_nll) / len(self.window_nll) if not self.nonfinite else math.nan
        return math.exp(mean) if mean < 700 else math.inf

    def to_json(self) -> dict[str, Any]:
        return {"ppl": self.value, "nonfinite_windows": self.nonfinite, "scored_tokens": self.scored_tokens, "window_nll": self.window_nll}


class _Given(nn.Module):
    """Stands in for the decoder: hands out hidden states computed before."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden: Tensor | None = None

    def forward(self, *args: Any, **kwargs: Any) -> BaseModelOutputWithPast:
        return BaseModelOutputWithPast(last_hidden_state=self.hidden)


@torch.inference_mode()
def perplexity(model: PreTrainedModel, tokens_NL: Tensor, progress: Callable[[int, int], None] = lambda *_: None) -> Perplexity:
    """Score windows [N, L]: the decoder over batches of windows, the head over chunks of tokens.

    The head runs through the model's own forward with the decoder's output handed in, so that whatever an architecture does
    to its logits (soft caps, scales) is done; a [tokens, vocabulary] tensor of more than HEAD_LOGITS numbers never exists.
    """
    device = next(model.parameters()).device
    count, length = tokens_NL.shape
    given = _Given()
    losses: list[float] = []
    chunk = max(1, HEAD_LOGITS // model.config.get_text_config().vocab_size)
    for batch_BL in tokens_NL.to(device).split(max(1, BODY_TOKENS // length)):
        hidden_BLH = model.base_model(input_ids=batch_BL, use_cache=False).last_hidden_state
        hidden_NH = hidden_BLH[:, :-1].reshape(-1, hidden_BLH.shape[-1])
        target_N = batch_BL[:, 1:].reshape(-1)
        nll_N = torch.empty(len(target_N), dtype=torch.float64)
        with swapped_module(model, model.base_model_prefix, given):
            for start in range(0, len(target_N), chunk):
                given.hidden = hidden_NH[None, start : start + chunk]
                logits_NV = model(input_ids=target_N[None, start : start + chunk]).logits[0].float()
                nll_N[start : start + chunk] = nn.functional.cross_entropy(logits_NV, target_N[start : start + chunk], reduction="none").double().cpu()
        losses += nll_N.view(len(batch_BL), length - 1).mean(dim=1).tolist()
        progress(len(losses), count)
    return Perplexity(losses, count * (length - 1))
