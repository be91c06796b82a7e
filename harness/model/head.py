"""The head of a causal language model, run apart from its decoder: the decoder's hidden states in front of it, and the
logits it makes of them, a few hundred tokens at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast

from harness.model import decoder, decoder_name, swapped_module


@dataclass
class _Handed(BaseModelOutputWithPast):
    """A decoder's output that holds states and nothing else a head may ask for (logits of routers, say)."""

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)


class _Given(nn.Module):
    """Stands in for the decoder: hands out hidden states computed before."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden: Tensor | None = None

    def forward(self, *args: Any, **kwargs: Any) -> _Handed:
        return _Handed(last_hidden_state=self.hidden)


@contextmanager
def head_of(model: PreTrainedModel) -> Iterator[Callable[[Tensor], Tensor]]:
    """hidden [N, H] -> logits [N, V] in fp32 through the model's own forward, so that whatever an architecture does to
    its logits (soft caps, scales) is done."""
    given = _Given()

    def head(hidden_NH: Tensor) -> Tensor:
        given.hidden = hidden_NH[None]
        return (
            model(input_ids=torch.zeros(1, len(hidden_NH), dtype=torch.long, device=hidden_NH.device)).logits[0].float()
        )

    with swapped_module(model, decoder_name(model), given):
        yield head


def hidden_states(model: PreTrainedModel, tokens_BT: Tensor, length: int) -> Tensor:
    """States in front of the head that predict a token of windows of `length`: [B * (L - 1), H]. The last token
    predicts none; the papers' code runs it all the same, lm-eval's does not."""
    hidden_BTH = decoder(model)(input_ids=tokens_BT, use_cache=False).last_hidden_state
    return hidden_BTH[:, : length - 1].reshape(-1, hidden_BTH.shape[-1])
