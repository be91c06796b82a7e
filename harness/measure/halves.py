"""Sixteen-bit embeddings and heads on a CPU: kept as they are stored, multiplied as they are kept."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from kernels.dispatch import fused
from kernels.formats.dense import HALF_DTYPES, DenseLinear


class HalfEmbedding(nn.Module):
    """Rows of a 16-bit table [V, H], times a constant where the architecture has one, in the compute dtype."""

    weight: Tensor

    def __init__(self, weight_VH: Tensor, scale: float, dtype: torch.dtype) -> None:
        super().__init__()
        self.scale, self.dtype = scale, dtype
        # No parameter: a model's dtype is that of its first one.
        self.register_buffer("weight", weight_VH, persistent=False)

    def forward(self, ids_BT: Tensor) -> Tensor:
        """[B, T, H]."""
        return nn.functional.embedding(ids_BT, self.weight).to(self.dtype) * self.scale


class HalfHead(nn.Module):
    """A linear layer without bias whose 16-bit weight [V, H] is multiplied by the fused product."""

    weight: Tensor
    layer: DenseLinear

    def __init__(self, weight_VH: Tensor) -> None:
        super().__init__()
        self.register_buffer("weight", weight_VH, persistent=False)
        rows, columns = weight_VH.shape
        layer = DenseLinear(columns, rows, False, str(weight_VH.dtype).removeprefix("torch."))
        layer.fill(weight=weight_VH)
        # Not a submodule: it is none of the packed layers.
        object.__setattr__(self, "layer", layer)

    def forward(self, x: Tensor) -> Tensor:
        """Logits [..., V]."""
        return self.layer(x)


def keep_halves(model: PreTrainedModel, half: str) -> None:
    """Put the embedding and the head of a model on a CPU back into the 16 bits they were stored in, one table where the
    two are one. A head with a bias stays as it is."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if isinstance(embedding, HalfEmbedding):
        return
    dtype = embedding.weight.dtype
    table_VH = embedding.weight.detach().to(HALF_DTYPES[half])
    scale = float(getattr(embedding, "embed_scale", 1.0))
    tied = head is not None and head.weight.data_ptr() == embedding.weight.data_ptr()
    model.set_input_embeddings(HalfEmbedding(table_VH, scale, dtype))
    if isinstance(head, nn.Linear) and head.bias is None:
        made = HalfHead(table_VH if tied else head.weight.detach().to(HALF_DTYPES[half]))
        if fused(made.layer, "cpu") is not None:
            model.set_output_embeddings(made)
