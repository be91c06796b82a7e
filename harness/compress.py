"""The block loop: calibrate, compress, hand the packed block's outputs to the next one. Checkpointed per block.

A block is finished when its file exists; a killed run reloads finished blocks, pushes the calibration tokens through them and
goes on. Nothing else is carried between blocks, so the bytes are the same as those of an undisturbed run.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from harness.calibration import BlockInputs, BlockRun
from harness.compressed import CompressedModel, install, round_rest
from harness.files import atomic_path
from harness.model import decoder_blocks, inventory
from kernels.dense import HALF_DTYPES
from kernels.packed import PackedLinear
from methods.base import LayerConfig, Method

Progress = Callable[[str, int, int], None]  # phase, done, total


def compress_model(
    model: PreTrainedModel,
    method: Method,
    plan: Mapping[str, LayerConfig],
    tokens_NT: Tensor | None,
    seed: int,
    folder: Path,
    half: str = "float16",
    progress: Progress = lambda *_: None,
) -> tuple[CompressedModel, dict[str, Any]]:
    """Compress every block in place; returns the model and {"layers": {name: report}, "seconds"}.

    `tokens_NT` may be None for a data-free method. `folder` keeps finished blocks, `half` is the 16-bit type of everything that is
    not packed.
    """
    stock = inventory(model)
    round_rest(model, stock, HALF_DTYPES[half])
    _, modules = decoder_blocks(model)
    # A data-free method sees no activation, but runs through the same loop on a single short window of nothing.
    needs_data = method.needs.hessian
    inputs = BlockInputs(model, tokens_NT if needs_data else torch.zeros(1, 8, dtype=torch.long))
    hidden_NTH = inputs.hidden_NTH
    reports: dict[str, Any] = {}
    seconds = 0.0
    for index, (spec, module) in enumerate(zip(stock.blocks, modules, strict=True)):
        file = folder / f"block_{index:04d}.safetensors"
        finished = file.exists()
        start = time.perf_counter()
        done = _load_block(model, file) if finished else {}
        with BlockRun(model, spec, module, hidden_NTH, inputs.kwargs[index]) as block:
            if not finished:
                method.compress_block(block, plan, seed)
            hidden_NTH = block.outputs() if needs_data else hidden_NTH
        if not finished:
            done = {"reports": block.reports, "seconds": time.perf_counter() - start}
            _save_block(model, spec.layers, file, done)
        reports |= done["reports"]
        seconds += done["seconds"]
        progress("compress", index + 1, len(stock.blocks))
    return CompressedModel(model, stock, half), {"layers": reports, "seconds": seconds}


def _save_block(model: PreTrainedModel, layers: tuple, file: Path, done: dict[str, Any]) -> None:
    packed = {layer.name: model.get_submodule(layer.name) for layer in layers}
    assert all(isinstance(layer, PackedLinear) for layer in packed.values()), "a method must pack every layer of its block"
    tensors = {f"{n}.{leaf}": layer.get_buffer(leaf).contiguous().cpu() for n, layer in packed.items() for leaf in layer.stored_parts()}
    metadata = {"specs": json.dumps({n: layer.spec() for n, layer in packed.items()}), "done": json.dumps(done)}
    with atomic_path(file) as path:
        save_file(tensors, path, metadata=metadata)


def _load_block(model: PreTrainedModel, file: Path) -> dict[str, Any]:
    device = next(model.parameters()).device
    tensors = load_file(file, device=str(device))
    with safe_open(file, framework="pt") as handle:
        metadata = handle.metadata()
    for name, spec in json.loads(metadata["specs"]).items():
        packed = PackedLinear.from_spec(spec, device)
        packed.fill(**{leaf: tensors[f"{name}.{leaf}"] for leaf in packed.stored_parts()})
        install(model, name, packed)
    return json.loads(metadata["done"])
