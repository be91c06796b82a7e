"""The head of a causal language model, run apart from its decoder: the decoder's hidden states in front of it, and the
logits it makes of them, some tokens at a time."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from harness.model import decoder, decoder_name, swapped_module
from harness.model.paging import pages_of
from kernels.dispatch import prepared

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def head_of(model: PreTrainedModel) -> Callable[[Tensor], Tensor]:
    """hidden [N, H] -> logits [N, V] in fp32 through the model's own forward, so that whatever an architecture does to
    its logits (soft caps, scales) is done. The decoder is in its place between two calls."""
    from harness.model.handed import Given

    given = Given()
    modules: dict[str, nn.Module] = {decoder_name(model): given}
    if name := _plain_head(model):  # of a model larger than memory there is no room for a copy
        modules[name] = _Product(model.get_submodule(name), copied=pages_of(model) is None)

    def head(hidden_NH: Tensor) -> Tensor:
        given.hidden = hidden_NH[None]
        ids_1N = torch.zeros(1, len(hidden_NH), dtype=torch.long, device=hidden_NH.device)
        with ExitStack() as stack:
            for name, module in modules.items():
                stack.enter_context(swapped_module(model, name, module))
            return model(input_ids=ids_1N).logits[0].float()

    return head


class _Product(nn.Linear):
    """A linear layer of another's tensors, multiplied by the fastest product there is of as exact ones."""

    def __init__(self, linear: nn.Module, copied: bool) -> None:
        super().__init__(1, 1, bias=False, device="meta")
        assert isinstance(linear, nn.Linear)
        self.out_features, self.in_features = linear.weight.shape
        self.weight, self.bias = linear.weight, linear.bias
        self.product = prepared(self.weight, copied)

    def forward(self, x: Tensor) -> Tensor:
        y = self.product(x)
        return y if self.bias is None else y + self.bias


def _plain_head(model: PreTrainedModel) -> str | None:
    """The name of the head, where it is a linear layer and does nothing more than multiply."""
    head = model.get_output_embeddings()
    return next((n for n, module in model.named_modules() if module is head and type(module) is nn.Linear), None)


def hidden_states(model: PreTrainedModel, tokens_BT: Tensor, length: int) -> Tensor:
    """States in front of the head that predict a token of windows of `length`: [B * (L - 1), H]. The last token
    predicts none; the papers' code runs it all the same, lm-eval's does not."""
    hidden_BTH = decoder(model)(input_ids=tokens_BT, use_cache=False).last_hidden_state
    return hidden_BTH[:, : length - 1].reshape(-1, hidden_BTH.shape[-1])
