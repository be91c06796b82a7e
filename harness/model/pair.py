"""The base of a model that is a pair: what the tuned model's weights are the difference to, in 16 bits.

It belongs to no cell: every tenant of the base shares it, so a cell holds its fingerprint, and it is read from where
the user says it is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

from harness.data.assets import ResolvedModel
from harness.model.network import half_dtype, load_reference, read_config
from kernels.formats.dense import HALF_DTYPES

if TYPE_CHECKING:
    from torch import Tensor

    from harness.model.shapes import Inventory


@dataclass(frozen=True)
class Base:
    fingerprint: str
    tensors: dict[str, Tensor]  # all there are, in the base's own 16-bit type, by name

    @classmethod
    def load(cls, model: ResolvedModel, device: str) -> Self:
        """Raises ValueError when its folder holds another model by now, and as `load_reference` does."""
        half = HALF_DTYPES[half_dtype(read_config(model.path))]
        state = load_reference(model.path, device, half, model.fingerprint).state_dict()
        return cls(model.fingerprint, {n: t.to(half) if t.is_floating_point() else t for n, t in state.items()})

    @property
    def bytes(self) -> int:
        """Of all tensors, those that are tied once."""
        apart = {(tensor.data_ptr(), *tensor.shape): tensor for tensor in self.tensors.values()}
        return sum(tensor.numel() * tensor.element_size() for tensor in apart.values())

    def weight(self, layer: str) -> Tensor:
        """Of a linear layer, 16 bits [O, I]."""
        return self.tensors[f"{layer}.weight"]


def weight_to_pack(weight: Tensor, layer: str, base: Base | None) -> Tensor:
    """What is stored of a layer of this weight, fp32 [O, I]: the weight, or the difference to its base's."""
    weight_OI = weight.detach().float()
    return weight_OI if base is None else weight_OI - base.weight(layer).float()


def require_pair(tuned: Inventory, base: Inventory, names: tuple[str, str]) -> None:
    """Raises ValueError when the block weights of the two are not of the same names and shapes."""
    sizes = [{layer.name: (layer.out_features, layer.in_features) for layer in stock.layers} for stock in (tuned, base)]
    for name in dict.fromkeys((*sizes[0], *sizes[1])):
        shapes = [" x ".join(map(str, own[name])) if name in own else "absent" for own in sizes]
        if shapes[0] != shapes[1]:
            raise ValueError(
                f"{names[0]} and {names[1]} are no pair ({name} is {shapes[0]} in one and {shapes[1]} in the other): "
                "give --base the model that --model was tuned from"
            )
    if tuned.uncovered != base.uncovered:
        raise ValueError(f"{names[0]} and {names[1]} are no pair: their blocks hold other weights beside linear layers")
