"""What stands in for a decoder while its head is run alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPast


@dataclass
class _Handed(BaseModelOutputWithPast):
    """A decoder's output that holds states and nothing else a head may ask for (logits of routers, say)."""

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)


class Given(nn.Module):
    """Stands in for the decoder: hands out hidden states computed before."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden: Tensor | None = None

    def forward(self, *args: Any, **kwargs: Any) -> _Handed:
        return _Handed(last_hidden_state=self.hidden)
