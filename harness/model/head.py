"""The head of a causal language model, run apart from its decoder: the decoder's hidden states in front of it, and the
logits it makes of them, a few hundred tokens at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from harness.model import decoder, decoder_name, swapped_module

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@contextmanager
def head_of(model: PreTrainedModel) -> Iterator[Callable[[Tensor], Tensor]]:
    """hidden [N, H] -> logits [N, V] in fp32 through the model's own forward, so that whatever an architecture does to
    its logits (soft caps, scales) is done."""
    from harness.model.handed import Given

    given = Given()

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
