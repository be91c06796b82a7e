"""One block as a method sees it: which layers share an input, the Hessian of an input, replacing a layer."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from harness.compress.forward import BATCH_TOKENS, PausedForward, abandon, advanced
from harness.compress.states import States
from harness.compress.statistics import add_gram, complete
from harness.model import BlockSpec
from harness.model.linear_layers import is_expert
from harness.model.pair import Base, weight_to_pack
from kernels.formats.delta import DeltaLinear
from kernels.formats.layer import LayerSpec
from kernels.formats.tables import Table
from methods.base import Compressed, Inputs, Pooled, Sensitivity

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SAMPLED = 512  # tokens whose inputs a method sees as they are
PASSES_BYTES = 8 * 2**30  # of passes that stand in a block at once; what would take more runs once for every stage


def passes_take_turns(block: BlockSpec, tokens: int, hidden: int, dtype_bytes: int, streams: int) -> bool:
    return passes_bytes(block, tokens, hidden, dtype_bytes, streams) > PASSES_BYTES


def passes_bytes(block: BlockSpec, tokens: int, hidden: int, dtype_bytes: int, streams: int) -> int:
    """What passes over so many tokens hold at most while they stand inside the block."""
    inner = sum(layer.out_features for layer in block.layers)
    return streams * tokens * (hidden + inner) * dtype_bytes


class _Slot(nn.Module):
    """Stands where a linear layer stood; runs whatever is installed (in an original's pass the original), after letting
    the block pause."""

    layer: nn.Module
    original: nn.Linear

    def __init__(self, layer: nn.Module, reached: Callable[[Tensor], bool]) -> None:
        super().__init__()
        assert isinstance(layer, nn.Linear)
        self.layer, self.original, self.reached = layer, layer, reached

    def forward(self, x: Tensor) -> Tensor:
        is_original = self.reached(x)
        return self.original(x) if is_original else self.layer(x)


class BlockRun:
    """methods.base.Block over a live block and the calibration activations in front of it; `forward` runs the block.

    `original` are the activations of the uncompressed model; without them `drift` and `original_outputs` are not to be
    had. Use as a context: inside, the block's linear layers are slots; on leaving, what is installed in them takes
    their place."""

    def __init__(
        self,
        model: PreTrainedModel,
        spec: BlockSpec,
        forward: Callable[[Tensor], Tensor],
        hidden: States,
        original: States | None = None,
        tables: Mapping[str, Table] | None = None,
        fisher: Mapping[str, Sensitivity] | None = None,
        base: Base | None = None,
    ) -> None:
        self.model, self._forward = model, forward
        self.tables, self._fisher, self._base = tables or {}, fisher or {}, base
        self.hidden, self.original, self.device = hidden, original, hidden.device
        self.layers: dict[str, LayerSpec] = {layer.name: layer for layer in spec.layers}
        # The batches of a text, each standing in front of the same stage; or one after the other.
        streams = 1 if original is None else 2
        size = (hidden.tokens, hidden.shape[2], hidden.dtype.itemsize)
        self._together = not passes_take_turns(spec, *size, streams)
        self.reports: dict[str, dict[str, float]] = {}
        self._slots = {name: _Slot(model.get_submodule(name), partial(self._reached, name)) for name in self.layers}
        self._passes: list[PausedForward] = []
        self._originals: list[
            PausedForward
        ] = []  # through the uncompressed block, from the uncompressed model's activations
        self._stale = False  # a layer was replaced that the paused passes have already run through
        self._watch: list[tuple[Tensor, str]] | None = None

    def __enter__(self) -> BlockRun:
        for name, slot in self._slots.items():
            self.model.set_submodule(name, slot)
        self._stages = self._find_stages()
        self._stage_of = {name: index for index, stage in enumerate(self._stages) for name in stage}
        return self

    def __exit__(self, *_: object) -> None:
        self._restart()
        abandon(self._originals)
        for name, slot in self._slots.items():
            self.model.set_submodule(name, slot.layer)
        self._slots.clear()  # they know this object: weights would be kept until somebody looks for circles

    def stages(self) -> list[list[str]]:
        return self._stages

    def weight(self, name: str) -> Tensor:
        """What is to be packed of a layer, fp32 [O, I]: of a pair the difference."""
        weight = self._slots[name].original.weight
        if not bool(torch.isfinite(weight).all()):
            raise ValueError(f"{name} holds weights that are not finite: the model itself is broken")
        return weight_to_pack(weight, name, self._base)

    @torch.no_grad()
    def hessian(self, name: str) -> Tensor:
        size = self.layers[name].in_features
        hessian_II = torch.zeros(size, size, device=self.device)
        if name not in self._uncalled:
            for paused in self._advance_to(self._stage_of[name]):
                add_gram(hessian_II, paused.stage_input.reshape(-1, size).float())
            complete(hessian_II)
        return hessian_II

    @torch.no_grad()
    def drift(self, name: str) -> Tensor:
        """fp32 [I, I]: sum of (x' - x) x^T, x' being the uncompressed model's input of the layer where `hessian` sees
        x. Zero for an expert: the two models send it other tokens, so that no x' belongs to an x."""
        size = self.layers[name].in_features
        drift_II = torch.zeros(size, size, device=self.device)
        if name not in self._uncalled and not is_expert(self.model, name):
            stage = self._stage_of[name]
            for paused, original in zip(self._advance_to(stage), self._originals_to(stage), strict=True):
                x_NI, original_NI = (p.stage_input.reshape(-1, size).float() for p in (paused, original))
                drift_II.addmm_((original_NI - x_NI).t(), x_NI)
        return drift_II

    @torch.no_grad()
    def pooled(self, name: str) -> Pooled:
        """Zero for a layer that no calibration token reached; for an expert all of a batch's tokens are one window."""
        size = self.layers[name].in_features
        total_II = torch.zeros(size, size, device=self.device)
        mean_I, windows = torch.zeros(size, device=total_II.device), 0
        if name not in self._uncalled:
            for paused in self._advance_to(self._stage_of[name]):
                x = paused.stage_input.float()
                for x_TI in x.reshape(-1, *x.shape[-2:]):
                    own_I = x_TI.mean(dim=0)
                    add_gram(total_II, (x_TI - own_I) / max(1, len(x_TI) - 1) ** 0.5)
                    mean_I, windows = mean_I + own_I, windows + 1
        return Pooled(mean_I / max(1, windows), complete(total_II).div_(max(1, windows)))

    @torch.no_grad()
    def inputs(self, name: str) -> Inputs:
        """Zero, and a sample of none, for a layer that no calibration token reached."""
        size = self.layers[name].in_features
        peak_I, some = torch.zeros(size, device=self.device), []
        apart = max(1, self.hidden.tokens // SAMPLED)
        if name not in self._uncalled:
            for paused in self._advance_to(self._stage_of[name]):
                x_NI = paused.stage_input.reshape(-1, size).float()
                peak_I = torch.maximum(peak_I, x_NI.abs().amax(dim=0))
                some.append(x_NI[::apart])
        return Inputs(peak_I, torch.cat(some) if some else peak_I.new_empty(0, size))

    def fisher(self, name: str) -> Sensitivity:
        """Zero for a layer that no calibration token reached."""
        layer = self.layers[name]
        zeros = (torch.zeros(size, device=self.device) for size in (layer.out_features, layer.in_features))
        return self._fisher.get(name) or Sensitivity(*zeros)

    def install(self, name: str, compressed: Compressed) -> None:
        slot, packed = self._slots[name], compressed.packed
        if self._base is not None:
            base_OI = self._base.weight(name)
            if isinstance(packed, DeltaLinear):  # of an earlier attempt
                packed.stand_on(base_OI)
            else:
                packed = DeltaLinear.standing(packed, base_OI, slot.original.bias is not None)
        packed.set_bias(slot.original.bias)
        if key := packed.table_key:
            packed.attach(self.tables[key])
        slot.layer = packed
        self.reports[name] = compressed.report
        self._stale |= any(paused.stage > self._stage_of[name] or paused.output is not None for paused in self._passes)

    def lend(self, name: str, module: nn.Module) -> None:
        self._slots[name].layer = module
        self._stale = True

    def restore(self, name: str) -> None:
        self.lend(name, self._slots[name].original)

    def run(self, hidden_NTH: Tensor) -> Tensor:
        return self._forward(hidden_NTH)

    def windows(self) -> tuple[Tensor, Tensor]:
        return self.hidden.whole(), torch.cat([*self.original_outputs()])

    def outputs(self) -> Iterator[Tensor]:
        """Hidden states behind the block as it is now, the inputs of the next one; a batch of windows at a time."""
        return (paused.result for paused in self._advance_to(len(self._stages)))

    def original_outputs(self) -> Iterator[Tensor]:
        """Hidden states behind the uncompressed block."""
        return (paused.result for paused in self._originals_to(len(self._stages)))

    def _advance_to(self, stage: int) -> Iterator[PausedForward]:
        """The pass of every batch, standing in front of `stage` (beyond the last one: finished)."""
        if self._stale or any(paused.stage > stage or paused.output is not None for paused in self._passes):
            self._restart()
        return self._standing(self._passes, self.hidden, stage)

    def _originals_to(self, stage: int) -> Iterator[PausedForward]:
        assert self.original is not None, "the block was not given the uncompressed model's activations"
        if any(paused.stage > stage for paused in self._originals):
            abandon(self._originals)
        return self._standing(self._originals, self.original, stage)

    def _standing(self, passes: list[PausedForward], states: States, stage: int) -> Iterator[PausedForward]:
        """`passes` holds those that have begun and not been abandoned."""
        batches = states.split(max(1, BATCH_TOKENS // states.shape[1]))
        if self._together:
            if not passes:
                passes += [PausedForward(self._forward, batch_NTH) for batch_NTH in batches]
            yield from advanced(passes, stage)
            return
        for batch_NTH in batches:
            passes[:] = [PausedForward(self._forward, batch_NTH)]
            yield from advanced(passes, stage)
            abandon(passes)

    def _restart(self) -> None:
        abandon(self._passes)
        self._stale = False

    def _reached(self, name: str, x: Tensor) -> bool:
        """A slot is about to run: note it while stages are being found, pause in front of the first layer of a stage.
        True if it is to run the original layer."""
        if self._watch is not None:
            self._watch.append((x, name))
            return False
        running = next((p for p in (*self._passes, *self._originals) if p.thread is threading.current_thread()), None)
        if running is not None and name == self._stages[self._stage_of[name]][0]:
            running.pause(self._stage_of[name], x)
        return running in self._originals

    @torch.no_grad()
    def _find_stages(self) -> list[list[str]]:
        """Found by watching one window: layers called with the same tensor share a stage, in order of first call."""
        self._watch = []
        self._forward(self.hidden.read(0, 1))
        calls, self._watch = self._watch, None
        stages: list[tuple[Tensor, list[str]]] = []
        for tensor, name in calls:
            shared = next((names for seen, names in stages if seen is tensor), None)
            if shared is None:
                stages.append((tensor, [name]))
            else:
                shared.append(name)
        self._uncalled = set(self.layers) - {name for _, name in calls}
        return [names for _, names in stages] + [[name] for name in sorted(self._uncalled)]
