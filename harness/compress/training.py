"""The one training loop of the fine-tuned track: adapters on packed layers, everything else frozen; or the layers' own
numbers, where a method has no adapters (harness.compress.whole).

The loss is the divergence from the uncompressed model, or that of the next token (harness.compress.distil), on windows
of calibration text, each seen once, in an order drawn by the seed; AdamW, linear warm-up, then a cosine to zero. All of
this is the run's and the same for every method; a method only says its learning rate and whether rows get magnitudes
(DoRA, arXiv 2402.09353). peft does the adapting: for as long as training
takes, a packed layer stands in the model as a `FrozenLinear`, a linear layer whose weight is decoded whenever it is
asked for.

Training starts from the low-rank part a method has fitted, or from LoRA's own start where that part is zero, in fp32.
At the end the factors are rounded to their stored form, once, and it is those that are saved and scored. Killed, it
goes on from its last checkpoint, on a CPU to the same numbers: data order is the seed's, nothing else is random."""

from __future__ import annotations

import contextlib
import json
import math
import shutil
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from harness.compress.distil import backward_from_divergence, backward_from_next_token, states_file
from harness.compress.whole import decoded_once, learning, store_learnt
from harness.compressed import CompressedModel
from harness.data.files import sync_dir
from harness.data.sealed import believed, load_tensors, save_tensors
from harness.model import Inventory, decoder_blocks
from harness.progress import Progress, silent
from kernels.dispatch import reference_only
from kernels.formats.lowrank import quantise_lowrank
from kernels.formats.packed import PackedLinear
from methods.base import Adaptation
from methods.schedule import warm_cosine

if TYPE_CHECKING:
    from transformers import PreTrainedModel


BETAS = (0.9, 0.99)  # of AdamW; a second moment over a thousand steps would not outlive its own warm-up here
CLIP = 1.0  # norm of a step's gradient
KEPT_BYTES = 4 * 2**30  # for the way back; a model that needs more runs its blocks twice
CHECKPOINT_SECONDS = 60.0
ADAPTER = "default"  # peft's name for an only adapter


class FrozenLinear(nn.Linear):
    """A packed layer without its low-rank part and row scales, as peft wants a layer: `weight` is decoded at every use
    and never kept."""

    packed: PackedLinear
    shown: Tensor | None = None  # in the weight's place

    def __init__(self, packed: PackedLinear) -> None:
        nn.Module.__init__(self)  # not nn.Linear's: there is no parameter
        self.in_features, self.out_features = packed.in_features, packed.out_features
        object.__setattr__(self, "packed", packed)  # its buffers are not this module's

    @property
    def weight(self) -> Tensor:  # type: ignore[override]  # decoded, where nn.Linear keeps a parameter
        return self.packed.decode_base() if self.shown is None else self.shown

    @property
    def bias(self) -> Tensor | None:  # type: ignore[override]
        return self.packed.constant

    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return nn.functional.linear(x, self.weight.to(x.dtype), bias)


@dataclass(frozen=True)
class TrainingReport:
    """What a training took, and the loss of every step before it, in nats per token."""

    steps: int
    tokens: int
    seconds: float
    losses: tuple[float, ...]


@reference_only()
def finetune(
    compressed: CompressedModel,
    adaptation: Adaptation,
    tokens_NT: Tensor,
    batch: int,
    seed: int,
    folder: Path,
    progress: Progress = silent,
    checkpoint_seconds: float = CHECKPOINT_SECONDS,
    states: Path | None = None,
) -> TrainingReport:
    """Train the low-rank parts (and row scales) of the packed layers, or their own numbers, in place. `folder` keeps
    the checkpoint, to go on from; `states` holds those of the uncompressed model (`distil.remember_states`) to diverge
    from, None for the loss of the next token.

    Raises ValueError when there is nothing to train, or when the loss is no longer a number."""
    start = time.perf_counter()
    file = folder / "training.safetensors"
    order_N = torch.randperm(len(tokens_NT), generator=torch.Generator().manual_seed(seed))
    steps = order_N.split(batch)
    trained = learning(compressed) if adaptation.whole else _adapted(compressed, adaptation, seed)
    with trained as adapted, _for_training(compressed, tokens_NT.shape[1], adaptation.whole) as (model, decoded):
        parameters = {name: p for name, p in adapted.named_parameters() if p.requires_grad}
        optimiser = torch.optim.AdamW(parameters.values(), lr=adaptation.rate, betas=BETAS, weight_decay=0.0)
        device = next(iter(parameters.values())).device

        def backward(window: int, windows: int) -> float:
            window_T = tokens_NT[window].to(device)
            if states is None:
                return backward_from_next_token(model, window_T, windows)
            return backward_from_divergence(model, window_T, states_file(states, window), windows)

        losses, before = _restore(file, parameters, optimiser)
        saved = time.monotonic()
        for index, step_B in enumerate(steps):
            if index < len(losses):
                continue  # done before the last kill
            optimiser.param_groups[0]["lr"] = adaptation.rate * warm_cosine(index, len(steps))
            optimiser.zero_grad()
            with decoded():
                losses.append(sum(backward(window, len(step_B)) for window in step_B.tolist()))
            nn.utils.clip_grad_norm_(list(parameters.values()), CLIP)
            optimiser.step()
            if not math.isfinite(losses[-1]):
                raise ValueError(f"the loss became {losses[-1]} in training: try a smaller {adaptation.option}")
            if time.monotonic() - saved >= checkpoint_seconds and index + 1 < len(steps):
                _checkpoint(file, parameters, optimiser, losses, before + time.perf_counter() - start)
                saved = time.monotonic()
            progress("train", index + 1, len(steps))
        store_learnt(adapted) if adaptation.whole else _store(adapted)
    seconds = before + time.perf_counter() - start
    return TrainingReport(len(steps), tokens_NT.numel(), seconds, tuple(losses))


def save_adapter(compressed: CompressedModel, adaptation: Adaptation, folder: Path) -> None:
    """Write the stored factors as a folder that peft loads onto the same model: the uncompressed one for `fp16-lora`,
    `frozen_bases` of the packed one for the others."""
    shutil.rmtree(folder, ignore_errors=True)
    with _adapted(compressed, adaptation, seed=0) as adapted, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft looks for a vocabulary that might have been resized, on the hub
        temporary = folder.with_name(f".{folder.name}.tmp")
        shutil.rmtree(temporary, ignore_errors=True)
        adapted.save_pretrained(temporary, save_embedding_layers=False)
    temporary.rename(folder)
    sync_dir(folder.parent)


def frozen_bases(compressed: CompressedModel) -> PreTrainedModel:
    """The model with a `FrozenLinear` for every layer that has adapters: what its adapter folder is to be loaded
    onto."""
    for name, packed in compressed.packed.items():
        if packed.rank:
            compressed.model.set_submodule(name, FrozenLinear(packed))
    return compressed.model


@contextlib.contextmanager
def _adapted(compressed: CompressedModel, adaptation: Adaptation, seed: int) -> Iterator[Any]:
    """The model under peft, its adapters set to the stored low-rank parts; on leaving, the packed layers are back in
    their places."""
    from peft import LoraConfig, get_peft_model

    packed = {name: layer for name, layer in compressed.packed.items() if layer.rank}
    if not packed:
        raise ValueError("no layer has a low-rank part to train: write rank=8, say, among the method's options")
    ranks = {name: layer.rank for name, layer in packed.items()}
    config = LoraConfig(  # alpha = rank: the product of the factors is what is added, as in the stored form
        r=1,
        lora_alpha=1,
        rank_pattern=ranks,
        alpha_pattern=ranks,
        target_modules=list(packed),
        use_dora=adaptation.dora,
        task_type="CAUSAL_LM",
    )
    model = frozen_bases(compressed)
    try:
        with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
            torch.manual_seed(seed)  # peft draws the factor that does not start at zero
            with _undecoded(model):
                adapted = get_peft_model(model, config)
        _load(adapted, packed)
        yield adapted
    finally:
        for name, layer in packed.items():
            model.set_submodule(name, layer)
        for leftover in ("peft_config", "active_adapter"):
            model.__dict__.pop(leftover, None)
        model.requires_grad_(False)


@contextlib.contextmanager
def _undecoded(model: PreTrainedModel) -> Iterator[None]:
    """While peft takes layers in, it asks for a weight twenty times, to see where it is and of what type: zeros that
    take no memory can tell. (Magnitudes that it makes of them are overwritten by `_load`.)"""
    layers = [layer for layer in model.modules() if isinstance(layer, FrozenLinear)]
    for layer in layers:
        device = next(layer.packed.buffers()).device
        layer.shown = torch.zeros((), device=device).expand(layer.out_features, layer.in_features)
    try:
        yield
    finally:
        for layer in layers:
            layer.shown = None


@torch.no_grad()
def _load(adapted: Any, packed: dict[str, PackedLinear]) -> None:
    for name, layer in packed.items():
        module = adapted.base_model.model.get_submodule(name)
        assert layer.lowrank is not None
        left_OR, right_RI = layer.lowrank.factors()
        if left_OR.any() and right_RI.any():
            # How a method splits a component between its factors is of no matter to it, but all the difference to a
            # step of equal size for all numbers: a whitened SVD has factors that are hundreds of times apart.
            ratio_R = (
                (right_RI.norm(dim=1) / left_OR.norm(dim=0).clamp_min(torch.finfo(torch.float32).tiny))
                .sqrt()
                .clamp(1e-6, 1e6)
            )
            module.lora_B[ADAPTER].weight.copy_(left_OR * ratio_R)
            module.lora_A[ADAPTER].weight.copy_(right_RI / ratio_R[:, None])
        if layer.row_scale is not None:
            norm_O = (layer.decode_base() + left_OR @ right_RI).norm(dim=1)
            if not norm_O.all():
                raise ValueError(
                    f"{name} has rows of zeros, no magnitude to train: write dora=false (reallm: row_scales=false)"
                )
            module.lora_magnitude_vector[ADAPTER].weight.copy_(layer.row_scale.float() * norm_O)


@torch.no_grad()
def _store(adapted: Any) -> None:
    """Round what was trained to its stored form."""
    for name in adapted.targeted_module_names:
        module = adapted.base_model.model.get_submodule(name)
        layer: PackedLinear = module.base_layer.packed
        assert layer.lowrank is not None
        left_OR, right_RI = module.lora_B[ADAPTER].weight.float(), module.lora_A[ADAPTER].weight.float()
        layer.refill(**{f"lowrank.{k}": v for k, v in quantise_lowrank(left_OR, right_RI, layer.lowrank.bits).items()})
        if layer.row_scale is not None:
            norm_O = (layer.decode_base() + layer.lowrank.decode()).norm(dim=1)
            scale_O = module.lora_magnitude_vector[ADAPTER].weight.float() / norm_O.clamp_min(
                torch.finfo(torch.float32).tiny
            )
            layer.refill(row_scale=torch.where(norm_O > 0, scale_O, 1.0).half())


@contextlib.contextmanager
def _for_training(
    compressed: CompressedModel, tokens: int, whole: bool
) -> Iterator[tuple[PreTrainedModel, Callable[[], AbstractContextManager[None]]]]:
    """The model, and what surrounds the passes of a step.

    What a window of `tokens` keeps for the way back has every decoded weight in it, so none is decoded twice: frozen
    ones are decoded for good, trained ones once a step. Where that would be too much, blocks keep only their inputs and
    run again (gradient checkpointing), and no decoded weight outlives its block. Dropout stays off, for a step must be
    the same when it is repeated."""
    model = compressed.model
    _, blocks = decoder_blocks(model)
    model.eval()
    again = kept_bytes(compressed.inventory, tokens, model.dtype.itemsize, whole) > KEPT_BYTES
    frozen = [layer for layer in model.modules() if isinstance(layer, FrozenLinear)]
    try:
        for block in blocks if again else ():
            block.forward = partial(checkpoint, block.forward, use_reentrant=False)
        for layer in () if again else frozen:
            layer.shown = layer.packed.decode_base()
        yield model, contextlib.nullcontext if again else partial(decoded_once, model)
    finally:
        for layer in frozen:
            layer.shown = None
        for block in blocks if again else ():
            del block.forward


def kept_bytes(stock: Inventory, tokens: int, dtype_bytes: int, whole: bool) -> int:
    """What autograd holds of all blocks: decoded weights (and where layers' own numbers are trained, `whole`, their
    gradients and what codes stand for under scales of one, before and behind a transposition), and about twice the
    inputs and outputs of every linear layer."""
    moved = sum(layer.in_features + layer.out_features for layer in stock.layers)
    return dtype_bytes * (stock.weights + 2 * tokens * moved) + (12 * stock.weights if whole else 0)


def _checkpoint(
    file: Path,
    parameters: dict[str, nn.Parameter],
    optimiser: torch.optim.Optimizer,
    losses: list[float],
    seconds: float,
) -> None:
    tensors = {f"{name}/value": p.detach() for name, p in parameters.items()}
    for name, parameter in parameters.items():
        tensors |= {f"{name}/{key}": value for key, value in optimiser.state[parameter].items()}
    save_tensors(file, tensors, {"losses": json.dumps(losses), "seconds": json.dumps(seconds)})


def _restore(
    file: Path, parameters: dict[str, nn.Parameter], optimiser: torch.optim.Optimizer
) -> tuple[list[float], float]:
    """(losses of the steps done, the seconds they took)."""
    kept = believed(file, load_tensors)
    if kept is None:
        return [], 0.0
    tensors, metadata = kept
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(tensors.pop(f"{name}/value"))
    for name, parameter in parameters.items():
        if f"{name}/step" not in tensors:  # no loss has depended on it yet (an expert no token was sent to)
            continue
        state = {key: tensors[f"{name}/{key}"] for key in ("step", "exp_avg", "exp_avg_sq")}
        optimiser.state[parameter] = {
            key: value if key == "step" else value.to(parameter.device) for key, value in state.items()
        }
    return json.loads(metadata["losses"]), json.loads(metadata["seconds"])
