"""Weights that are linear layers by another name, as linear layers, so that nothing else has to know of them.

GPT-2 keeps its weights transposed ([in, out], `Conv1D`); mixtures of experts keep one tensor of three dimensions for a
projection of all experts. Both become `nn.Linear`s when a model is made, before anything is counted or measured."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from kernels.formats.packed import PackedLinear

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def with_linear_layers(model: PreTrainedModel) -> PreTrainedModel:
    """The model itself, such weights in place replaced by linear layers of the same values."""
    from transformers.pytorch_utils import Conv1D

    for name, module in otherwise_named(model):
        if isinstance(module, Conv1D):
            model.set_submodule(name, linear_of(module.weight.detach().t().contiguous(), module.bias.detach()))
        else:
            model.set_submodule(name, LinearExperts(module))
    return model


def otherwise_named(model: PreTrainedModel) -> list[tuple[str, nn.Module]]:
    """The modules that hold such weights, by name."""
    from transformers.pytorch_utils import Conv1D

    return [(name, m) for name, m in model.named_modules() if isinstance(m, Conv1D) or _are_experts(m)]


def linear_of(weight_OI: Tensor, bias_O: Tensor | None) -> nn.Linear:
    """A linear layer of these very tensors, frozen."""
    linear = nn.Linear(1, 1, bias=False, device="meta")
    linear.out_features, linear.in_features = weight_OI.shape
    linear.weight = nn.Parameter(weight_OI, requires_grad=False)
    linear.register_parameter("bias", None if bias_O is None else nn.Parameter(bias_O, requires_grad=False))
    return linear


def is_expert(model: nn.Module, name: str) -> bool:
    """Whether this is a projection of an expert: a layer that sees the tokens a router sends it."""
    owner = name.rsplit(".", 2)[0]  # less the projection and the number
    return isinstance(model.get_submodule(owner), LinearExperts)


def _are_experts(module: Any) -> bool:
    """Whether this is one of transformers' modules of experts (transformers.integrations.moe), which say of themselves
    how their tensors are laid out, and holds nothing but the projections."""
    if not all(hasattr(module, name) for name in ("has_gate", "has_bias", "is_transposed")):
        return False
    names = [_entrance(module), "down_proj"]
    names += [f"{name}_bias" for name in names if module.has_bias]
    return {name for name, _ in module.named_parameters()} == set(names)


def _entrance(experts: Any) -> str:
    return "gate_up_proj" if experts.has_gate else "up_proj"


class LinearExperts(nn.Module):
    """Experts one by one, a linear layer [O, I] for each projection of each.

    Each of them runs in every pass, if on no token, so that layers are called in the same order for every batch: that
    is what stages are found by (harness.compress.block). Packed ones are past that, and skipped."""

    def __init__(self, experts: Any) -> None:
        super().__init__()
        self.projections = (_entrance(experts), "down_proj")
        for name in self.projections:
            weights = getattr(experts, name).detach()
            biases = getattr(experts, f"{name}_bias").detach() if experts.has_bias else [None] * len(weights)
            if experts.is_transposed:
                weights = weights.transpose(1, 2).contiguous()
            self.add_module(name, nn.ModuleList(map(linear_of, weights, biases)))
        for name in list(experts._parameters):
            delattr(experts, name)  # its activation is used on, its weights are ours
        self.activate: Callable[[Tensor], Tensor]
        object.__setattr__(self, "activate", experts._apply_gate if experts.has_gate else experts.act_fn)

    def forward(self, hidden_NH: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Every token's sum over its experts [N, H]; of each token, which experts and how much of them [N, k]."""
        out_NH = torch.zeros_like(hidden_NH)
        layers = (self.get_submodule(name).children() for name in self.projections)
        for number, (entrance, down) in enumerate(zip(*layers, strict=True)):
            token_S, place_S = torch.where(top_k_index == number)
            if not len(token_S) and isinstance(entrance, PackedLinear):
                continue
            expert_SH = down(self.activate(entrance(hidden_NH[token_S])))
            out_NH.index_add_(0, token_S, (expert_SH * top_k_weights[token_S, place_S, None]).to(out_NH.dtype))
        return out_NH
