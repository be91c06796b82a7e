"""Export `hf`: a cell as it is, for `transformers` with this package beside it (harness.portal.quantizer).

Every stored tensor keeps its name, so what is loaded is what was scored, bit for bit. A packed layer also has an empty
tensor where its weight would be: transformers without this package knows no such quantisation, says so in a line of its
log, and would go on with random weights; a tensor of the wrong shape it refuses.

A difference (`--base`) leaves with the base it stands on: each packed layer has the base's weight in 16 bits beside it,
and everything else that the cell does not store is the base's too, so that the folder needs no other.

Variant `base` leaves the low-rank parts of a trained cell out and puts them beside it as a folder that
`PeftModel.from_pretrained` reads."""

from __future__ import annotations

from collections.abc import Container
from typing import Any, ClassVar

import torch

from harness.model.pair import Base
from harness.portal import QUANT_METHOD
from harness.portal.folder import ADAPTER, CellReader, Exporter, Request, Tensors, write_adapter, write_folder
from kernels.formats.delta import BASE
from kernels.formats.dense import HALF_DTYPES

VERSION = 1  # of the configuration
ADAPTED = ("lowrank.", "row_scale")  # tensors of a layer that its adapter holds
LOAD = """import harness  # only where the package is not installed but beside you
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("this folder")"""
LOAD_BASE = f"""{LOAD}

from peft import PeftModel

model = PeftModel.from_pretrained(model, "this folder/{ADAPTER}")"""


class HuggingFace(Exporter):
    options = ("whole", "base")
    holds_pairs: ClassVar[bool] = True

    def write(self, request: Request) -> None:
        cell, reader = request.cell, CellReader(request.cell)
        if pair := cell.artifact.spec.base:
            pair.check()
        layers: dict[str, dict[str, Any]] = {name: dict(spec) for name, spec in reader.description.layers.items()}
        without: tuple[str, ...] = ()
        if request.option == "base":
            if not cell.store.adapter.is_dir():
                raise ValueError(f"{cell.label} has no adapters of its own: leave --variant base out")
            without = ADAPTED
            for spec in layers.values():
                if spec.get("rank"):
                    spec |= {"rank": 0, "row_scales": False}
        if request.option == "base" and any(spec["format"] == "dense" for spec in layers.values()):
            raise ValueError(f"{cell.label} adapts the uncompressed model: peft reads {cell.store.adapter} as it is")
        quantization = {
            "quant_method": QUANT_METHOD,
            "version": VERSION,
            "half": reader.description.half,
            "stored_bpw": cell.artifact.stored_bpw,
            "layers": layers,
            "tables": reader.description.tables,
        }

        def tensors() -> Tensors:
            for name, tensor in reader.packed():
                owner = next((layer for layer in _owners(name) if layer in layers), "")
                if not (owner and name[len(owner) + 1 :].startswith(without or ("\0",))):
                    yield name, tensor
            for name, spec in layers.items():
                if spec["format"] != "dense":
                    yield f"{name}.weight", torch.empty(0, dtype=torch.float16)
            yield from reader.rest()
            if pair:
                own = {name for tensors in (reader.rest(), reader.uncovered()) for name, _ in tensors}
                yield from standing_on(Base.load(pair, "cpu"), layers, own, HALF_DTYPES[reader.description.half])

        base = request.option == "base"
        write_folder(request, "hf", tensors, quantization, LOAD_BASE if base else LOAD, cell.artifact.spec.dtype)
        if base:
            write_adapter(request)


def standing_on(base: Base, layers: Container[str], own: Container[str], half: torch.dtype) -> Tensors:
    """What a cell of a pair does not store: the weight under every difference, and what the tuned model has of its base
    unchanged, each under one of its names. `own` are the names of what the cell stores beside packed layers."""
    seen = {tensor.data_ptr() for name, tensor in base.tensors.items() if name in own}
    for name, tensor in base.tensors.items():
        owner, _, leaf = name.rpartition(".")
        if leaf == "weight" and owner in layers:
            yield f"{owner}.{BASE}", tensor
        elif tensor.data_ptr() not in seen:
            seen.add(tensor.data_ptr())  # tied tensors are stored once, and not at all where the cell has its own
            yield name, tensor.to(half) if tensor.is_floating_point() else tensor


def _owners(name: str) -> list[str]:
    """The modules a tensor may belong to, from its name."""
    parts = name.split(".")
    return [".".join(parts[:end]) for end in range(len(parts) - 1, 0, -1)]


EXPORTER = HuggingFace()
