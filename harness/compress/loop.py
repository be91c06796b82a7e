"""The block loop: calibrate, compress, hand the packed block's outputs to the next one. Checkpointed per block.

A block is finished when its file exists; a killed run reloads finished blocks, pushes the calibration tokens through
them and goes on. Nothing else is carried between blocks, so the bytes are the same as those of an undisturbed run."""

from __future__ import annotations

import json
import logging
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict

import torch
from torch import Tensor

from harness.compress.block import BlockRun
from harness.compress.forward import BlockInputs
from harness.compressed import CompressedModel, attach_tables, round_rest
from harness.data.sealed import believed, load_tensors, save_tensors
from harness.data.tensor_file import TensorFile
from harness.model import Inventory
from harness.model.paging import pages_of, resident, tensor_of
from harness.model.pair import Base
from harness.progress import Progress, first_line, silent
from kernels.dispatch import reference_only
from kernels.formats.bits import FULL
from kernels.formats.dense import HALF_DTYPES
from kernels.formats.layer import LayerConfig, LayerSpec
from kernels.formats.packed import PackedLinear
from kernels.formats.tables import Table
from methods.base import Compressed, Inputs, LayerData, Method, Needs, Pooled, Sensitivity, layer_seed
from methods.codecs.error_feedback import Indefinite, NotFinite

if TYPE_CHECKING:
    from transformers import PreTrainedModel


FALLBACK = "fallback"  # in the report of a layer that could not be packed as asked for
ERROR_ROWS = 64  # of a matrix whose outputs' error is measured: all of them would cost as much as GPTQ itself
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class CompressionReport:
    """What methods noted of every layer, by name, and the seconds spent on blocks, in all attempts."""

    layers: dict[str, dict[str, float]]
    seconds: float


@reference_only()
def compress_model(
    model: PreTrainedModel,
    stock: Inventory,
    method: Method,
    configs: Mapping[str, LayerConfig],
    tokens_NT: Tensor | None,
    seed: int,
    folder: Path,
    half: str = "float16",
    fisher: Mapping[str, Sensitivity] | None = None,
    act_bits: int = FULL,
    progress: Progress = silent,
    base: Base | None = None,
) -> tuple[CompressedModel, CompressionReport]:
    """Compress every block in place; returns the model and what was noted on the way.

    `tokens_NT` may be None for a method that needs no activations, `fisher` for one that does not ask for it. `folder`
    keeps finished blocks, `half` is the 16-bit type of everything that is not packed, `act_bits` what inputs of packed
    layers are rounded to. With a `base`, what is packed is the difference to it."""
    tables = _tables(model, method, configs, stock.layers, seed, folder / "tables.safetensors")
    round_rest(model, stock, HALF_DTYPES[half])
    # A data-free method sees no activation, but runs through the same loop on a single short window of nothing.
    needs = method.needs
    needs_data = needs.hessian or needs.pooled or needs.inputs or needs.original
    assert tokens_NT is not None or not needs_data
    pages = pages_of(model)
    inputs = BlockInputs(
        model,
        tokens_NT if tokens_NT is not None and needs_data else torch.zeros(1, 8, dtype=torch.long),
        folder if pages else None,
    )
    hidden = inputs.hidden
    original = hidden.copy() if needs.original else None
    reports: dict[str, dict[str, float]] = {}
    seconds = 0.0
    for index, spec in enumerate(stock.blocks):
        file = folder / f"block_{index:04d}.safetensors"
        kept = believed(file, load_tensors)
        start = time.perf_counter()
        with resident(model, index):
            with BlockRun(model, spec, inputs.block(index), hidden, original, tables, fisher, base) as block:
                if kept:
                    done = _install(block, *kept, hidden.device)
                else:
                    pack_block(block, method, configs, seed, act_bits)
                if original is not None:
                    original.replace(block.original_outputs())
                if needs_data:
                    hidden.replace(block.outputs())
            if not kept:
                done = CompressionReport(block.reports, time.perf_counter() - start)
                _save_block(model, spec.layers, file, done)
            if pages:
                pages.packed_in(index, block.layers, TensorFile(file))
        reports |= done.layers
        seconds += done.seconds
        progress("compress", index + 1, len(stock.blocks))
    attach_tables(model, tables)
    return CompressedModel(model, stock, half, base), CompressionReport(reports, seconds)


def pack_block(
    block: BlockRun, method: Method, configs: Mapping[str, LayerConfig], seed: int, act_bits: int = FULL
) -> None:
    """Pack every layer of a block: statistics are measured stage by stage, each layer is compressed with its own, and
    what is packed takes the layer's place at once, so that (in true-sequential order) later stages see it."""
    needs, stages = method.needs, block.stages()
    original = {} if needs.true_sequential else {stage[0]: _statistics(block, needs, stage[0]) for stage in stages}
    packed: dict[str, PackedLinear] = {}
    for stage in stages:
        measured = original.get(stage[0]) or _statistics(block, needs, stage[0])
        for name in stage:
            data = LayerData(
                weight_OI=block.weight(name),
                seed=layer_seed(seed, name),
                act_bits=act_bits,
                **measured,
                fisher=block.fisher(name) if needs.fisher else None,
                table=block.tables.get(configs[name].table_key),
            )
            compressed = _compressed(method, data, block.layers[name], configs[name])
            compressed.packed.round_inputs(act_bits)
            block.install(name, compressed)
            errors = _errors(compressed.packed, data)
            block.reports[name] = compressed.report | errors
            packed[name] = compressed.packed
    if needs.outputs:
        tuning = method.tune_block(block, packed, seed)
        for name, layer in packed.items():
            block.install(name, Compressed(layer, block.reports[name] | tuning))


def _compressed(method: Method, data: LayerData, layer: LayerSpec, config: LayerConfig) -> Compressed:
    """The layer, packed; without error feedback between its columns where its Hessian does not allow any, which the
    report counts. Raises NotFinite, naming the layer."""
    try:
        return method.compress(data, layer, config)
    except NotFinite as error:
        raise NotFinite(f"{layer.name}: {error}") from error
    except (Indefinite, torch.linalg.LinAlgError) as error:
        if data.hessian_II is None:  # nothing that could be left out
            raise
        log.warning("%s: %s; it is packed with the diagonal of its Hessian alone", layer.name, first_line(error))
        plain = replace(
            data,
            hessian_II=data.hessian_II.diagonal().clamp_min(0.0).diag(),
            drift_II=None if data.drift_II is None else torch.zeros_like(data.drift_II),
        )
        compressed = method.compress(plain, layer, config)
        return replace(compressed, report=compressed.report | {FALLBACK: 1})


@torch.no_grad()
def _errors(packed: PackedLinear, data: LayerData) -> dict[str, float]:
    """What share of the squared weights was lost and, where there is a Hessian, of the squared outputs on the
    calibration tokens (of at most ERROR_ROWS rows); in front of any tuning of the block."""
    error_OI = packed.decode() - data.weight_OI
    found = {"weight_error": _share(error_OI, error_OI, data.weight_OI, data.weight_OI)}
    if data.hessian_II is not None:
        some = slice(None, None, -(-len(error_OI) // ERROR_ROWS))
        error_RI, weight_RI = error_OI[some], data.weight_OI[some]
        found["output_error"] = _share(error_RI, error_RI @ data.hessian_II, weight_RI, weight_RI @ data.hessian_II)
    return found


def _share(lost: Tensor, lost_turned: Tensor, whole: Tensor, whole_turned: Tensor) -> float:
    """<lost, lost_turned> / <whole, whole_turned>; 0 where there was nothing to lose."""
    total = (whole * whole_turned).sum().item()
    return (lost * lost_turned).sum().item() / total if total > 0 else 0.0


class Statistics(TypedDict):
    """What is measured of a layer's input, which the layers of its stage share; None for what is not needed."""

    hessian_II: Tensor | None
    drift_II: Tensor | None
    pooled: Pooled | None
    inputs: Inputs | None


def _statistics(block: BlockRun, needs: Needs, name: str) -> Statistics:
    return {
        "hessian_II": block.hessian(name) if needs.hessian else None,
        "drift_II": block.drift(name) if needs.drift else None,
        "pooled": block.pooled(name) if needs.pooled else None,
        "inputs": block.inputs(name) if needs.inputs else None,
    }


def _save_block(model: PreTrainedModel, layers: Sequence[LayerSpec], file: Path, done: CompressionReport) -> None:
    packed: dict[str, PackedLinear] = {}
    for layer in layers:
        module = model.get_submodule(layer.name)
        assert isinstance(module, PackedLinear), f"a method must pack every layer of its block, {layer.name} too"
        packed[layer.name] = module
    tensors = {f"{n}.{leaf}": module.get_buffer(leaf) for n, module in packed.items() for leaf in module.stored_parts()}
    metadata = {
        "specs": json.dumps({n: module.spec() for n, module in packed.items()}),
        "done": json.dumps({"reports": done.layers, "seconds": done.seconds}),
    }
    save_tensors(file, tensors, metadata)


def _install(
    block: BlockRun, tensors: Mapping[str, Tensor], metadata: Mapping[str, str], device: torch.device
) -> CompressionReport:
    """Put a finished block's layers in their places."""
    for name, spec in json.loads(metadata["specs"]).items():
        packed = PackedLinear.from_spec(spec, device)
        packed.fill(**{leaf: tensors[f"{name}.{leaf}"].to(device) for leaf in packed.stored_parts()})
        block.install(name, Compressed(packed))
    done = json.loads(metadata["done"])
    return CompressionReport(done["reports"], done["seconds"])


def _tables(
    model: PreTrainedModel,
    method: Method,
    configs: Mapping[str, LayerConfig],
    layers: Sequence[LayerSpec],
    seed: int,
    file: Path,
) -> dict[str, Table]:
    """The tables that layers share, fitted once to the original weights."""
    of_table = {config.table_key: config for config in configs.values() if config.table_key}
    if not of_table:
        return {}
    kept, device = believed(file, load_tensors), next(model.parameters()).device
    if kept is None:
        # Blocks packed with other tables would decode to something else.
        shutil.rmtree(file.parent, ignore_errors=True)
        fitted = method.fit_tables(
            configs, layers, lambda name: tensor_of(model, f"{name}.weight").detach().float().to(device), seed
        )
        stored = {
            f"{key}/{leaf}": table.get_buffer(leaf) for key, table in fitted.items() for leaf in table.stored_parts()
        }
        save_tensors(file, stored)
        kept = load_tensors(file)
    tensors = {name: tensor.to(device) for name, tensor in kept[0].items()}
    tables = {key: config.table() for key, config in of_table.items()}
    for key, table in tables.items():
        table.load_state_dict({leaf: tensors[f"{key}/{leaf}"] for leaf in table.stored_parts()}, assign=True)
    return tables
