"""A checkpoint of another program as a cell: its block weights as packed layers, bits counted from its own tensors.

What becomes a grid or a table of ours is laid out anew without a change of a number, and what a row calls *stored* is
what the checkpoint itself spends: `Artifact.ledger` is of its tensors, zero points, permutations and padding included.
Embeddings, head, norms and biases are rounded to 16 bits, like everybody's."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from harness.compressed import CompressedModel
from harness.data.assets import ResolvedModel
from harness.ledger import Ledger
from harness.model import empty_model, inventory, read_config
from harness.plan.cells import Cell, Compute
from harness.portal import IMPORTS
from harness.portal.files import quantization_of, resolve
from harness.portal.foreign import Brought, Checkpoint, Importer
from harness.portal.method import Imported
from harness.progress import Progress
from kernels.formats.bits import StoredBits
from kernels.formats.dense import HALF_DTYPES, DenseLinear
from kernels.formats.layer import LayerConfig, LayerSpec
from kernels.registry import suggestion

if TYPE_CHECKING:
    from transformers import PreTrainedModel

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Arrived:
    """A checkpoint that was read."""

    compressed: CompressedModel
    ledger: Ledger  # the checkpoint's own
    layers: dict[str, tuple[LayerConfig, float]]  # configuration and the checkpoint's bits per weight, by name
    note: str  # what the checkpoint says of itself and is not
    seconds: float


def format_of(path: Path) -> str:
    """The name of a checkpoint's format in IMPORTS. Raises ValueError for one that nobody here reads."""
    if path.suffix == ".gguf":
        return "gguf"
    method = quantization_of(path).get("quant_method")
    if method is None:
        raise ValueError(f"{path} says nothing of a quantisation: a plain model is given with --model")
    if method == "bitsandbytes" or method in IMPORTS:
        return str(method)
    raise ValueError(
        f"{path} is quantised by '{method}', which is not read here: {suggestion(str(method), [*IMPORTS])}"
    )


def imported_cell(source: ResolvedModel, model: ResolvedModel, compute: Compute, bos: str, half: str) -> Cell:
    """The row of a checkpoint of `model`."""
    format = format_of(source.path)
    method = Imported(format=format, sha256=source.fingerprint[:16])
    return Cell(
        method=method,
        method_text=f"imported:{source.name}",
        model=model,
        budget=None,
        calibration=None,
        training=None,
        seed=0,
        compute=compute,
        bos=bos,
        half=half,
        source=source,
    )


def bring_in(source: ResolvedModel, base: Path, half: str, progress: Progress) -> Arrived:
    """`base` is the folder of the uncompressed model, whose configuration, less its weights, the result has. Raises
    ValueError, with the names, where the checkpoint is of another model, or its tensors are not what its configuration
    needs them to be; one that only has the wrong name is read, and a warning logged."""
    start = time.perf_counter()
    importer: Importer = IMPORTS.get(format_of(source.path))
    model = empty_model(read_config(base), torch.float32)
    stock = inventory(model)
    total, configs = StoredBits(), {}
    with importer.open(source.path, model) as checkpoint:
        importer.check(checkpoint.quantization)
        for done, layer in enumerate(stock.layers):
            brought = importer.layer(checkpoint, layer) or _plain(checkpoint, layer, half)
            if layer.bias:
                brought.layer.set_bias(checkpoint.shaped(f"{layer.name}.bias", layer.out_features))
            model.set_submodule(layer.name, brought.layer)
            total += brought.bits
            hyper = {k: v for k, v in brought.layer.spec().items() if k not in ("in_features", "out_features", "bias")}
            configs[layer.name] = (LayerConfig.from_json(hyper), brought.bits.total / layer.weights)
            progress("import", done + 1, len(stock.layers))
        note = importer.mislabelled(checkpoint)
        _fill(model, checkpoint, HALF_DTYPES[half])
        if left := checkpoint.left:
            raise ValueError(f"{source.path} holds {len(left)} tensors that {base.name} has no place for ({left[0]})")
    if resolve(str(source.path)).fingerprint != source.fingerprint:
        raise ValueError(f"{source.path} changed while it was read: nothing of it is kept; run again")
    model.tie_weights()
    model.requires_grad_(False)
    compressed = CompressedModel(model.eval(), stock, half)
    if all(isinstance(layer, DenseLinear) for layer in compressed.packed.values()):
        raise ValueError(f"{source.path} holds no quantised matrix, whatever its config says: it is mislabelled")
    ledger = Ledger(total, stock.uncovered_bits, stock.weights)
    if note:
        note = f"{source.name} is {note}: {ledger.stored_bpw:.4f} bits per weight are stored"
        log.warning("%s", note)
    return Arrived(compressed, ledger, configs, note, time.perf_counter() - start)


def _plain(checkpoint: Checkpoint, spec: LayerSpec, half: str) -> Brought:
    """A matrix that the checkpoint left as it was."""
    weight_OI = checkpoint.shaped(f"{spec.name}.weight", spec.out_features, spec.in_features)
    if not weight_OI.is_floating_point():
        raise ValueError(
            f"{checkpoint.path}: {spec.name}.weight is {weight_OI.dtype}, which its config does not explain"
        )
    layer = DenseLinear(spec.in_features, spec.out_features, spec.bias, dtype=half)
    layer.fill(weight=weight_OI.to(HALF_DTYPES[half]))
    return Brought(layer, StoredBits(codes=8 * weight_OI.nbytes))


def _fill(model: PreTrainedModel, checkpoint: Checkpoint, half: torch.dtype) -> None:
    """Everything that is not packed, rounded to 16 bits; what is tied to another tensor may be there once or twice."""
    tied: set[str] = set(getattr(model, "all_tied_weights_keys", {}) or {})
    for name, parameter in list(model.named_parameters(remove_duplicate=False)):
        if not parameter.is_meta:
            continue
        if name in tied:
            if name in checkpoint:
                checkpoint.take(name)
            continue
        found = checkpoint.shaped(name, *parameter.shape)
        owner, _, leaf = name.rpartition(".")
        value = nn.Parameter(found.to(half).float(), requires_grad=False)
        setattr(model.get_submodule(owner), leaf, value)
