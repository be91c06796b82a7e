"""Where the weights of a Hugging Face causal language model are: decoder blocks, their linear layers, and the rest.

Works from a configuration alone (modules on the meta device) as well as on a loaded model. Bits per weight are counted
over every parameter of two or more dimensions inside the decoder blocks; embeddings, head, norms and biases are "the
rest" and stay at 16 bits for every method.

What is counted is in `shapes`, and needs no torch; `network` has the modules, and is imported with the first name that
is asked for of it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from harness.model.shapes import PRESETS, BlockSpec, Inventory, laid_out
from kernels.registry import on_demand

__all__ = [
    "PRESETS",
    "BlockSpec",
    "Inventory",
    "decoder",
    "decoder_blocks",
    "decoder_name",
    "empty_model",
    "half_dtype",
    "in_place_of_states",
    "inventory",
    "laid_out",
    "load_reference",
    "read_config",
    "skeleton",
    "states_of",
    "swapped_module",
]

if TYPE_CHECKING:
    from harness.model.network import (
        decoder,
        decoder_blocks,
        decoder_name,
        empty_model,
        half_dtype,
        in_place_of_states,
        inventory,
        load_reference,
        read_config,
        skeleton,
        states_of,
        swapped_module,
    )
else:
    __getattr__ = on_demand("harness.model.network", __all__)
