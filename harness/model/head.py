"""The head of a causal language model, run apart from its decoder: the decoder's hidden states in front of it, and the
logits it makes of them, a few hundred tokens at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from harness.model import decoder, decoder_name, swapped_module
from kernels.dispatch import plain

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

    with swapped_module(model, decoder_name(model), given), _with_our_product(model):
        yield head


class _Product(nn.Linear):
    """A head of these very tensors, whose product is the fastest there is of as exact ones."""

    def __init__(self, head: nn.Linear) -> None:
        super().__init__(1, 1, bias=False, device="meta")
        self.out_features, self.in_features = head.weight.shape
        self.weight, self.bias = head.weight, head.bias

    def forward(self, x: Tensor) -> Tensor:
        y = plain(self.weight, x)
        return y if self.bias is None else y + self.bias


def _with_our_product(model: PreTrainedModel) -> AbstractContextManager[None]:
    found = model.get_output_embeddings()
    # A class of its own may do more than multiply.
    names = [name for name, module in model.named_modules() if module is found and type(module) is nn.Linear]
    return swapped_module(model, names[0], _Product(found)) if names else nullcontext()


def hidden_states(model: PreTrainedModel, tokens_BT: Tensor, length: int) -> Tensor:
    """States in front of the head that predict a token of windows of `length`: [B * (L - 1), H]. The last token
    predicts none; the papers' code runs it all the same, lm-eval's does not."""
    hidden_BTH = decoder(model)(input_ids=tokens_BT, use_cache=False).last_hidden_state
    return hidden_BTH[:, : length - 1].reshape(-1, hidden_BTH.shape[-1])
