"""Streams calibration tokens through the model one block at a time.

`BlockInputs` records what every block receives besides its hidden state (masks, rotary angles), once, without running any
block. `BlockRun` is one block as a method sees it: which layers share an input, the Hessian of an input, replacing a layer.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from harness.model import BlockSpec, decoder_blocks
from kernels.tables import Table
from methods.base import Compressed, LayerSpec, Sensitivity

BATCH_TOKENS = 8192  # tokens pushed through a block at once: amortises decoding packed layers, bounds activations


class BlockStub(nn.Module):
    """Stands in for a block: notes its arguments and hands the hidden state on, or `replay`, if that is set, in its place."""

    def __init__(self, block: nn.Module, returns_tuple: bool) -> None:
        super().__init__()
        self.returns_tuple = returns_tuple
        object.__setattr__(self, "block", block)  # not a submodule: .to() and state_dict() must not see it twice
        self.hidden: list[Tensor] = []
        self.kwargs: dict[str, Any] = {}
        self.replay: Tensor | None = None

    def __getattr__(self, name: str) -> Any:  # models read attributes of their blocks (attention_type)
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(object.__getattribute__(self, "block"), name)

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor | tuple[Tensor]:
        assert not args, "blocks are called with keyword arguments"
        out = self.replay
        if out is None:
            self.hidden.append(hidden_states)
            self.kwargs = kwargs
            out = hidden_states
        return (out,) if self.returns_tuple else out


@contextmanager
def stubbed_blocks(model: PreTrainedModel, returns_tuple: bool = False) -> Iterator[list[BlockStub]]:
    """Inside, every decoder block of the model is a stub: a forward pass costs the embedding and the head alone. What comes out of
    that pass is right only if the stubs return what the blocks do, a tensor or a tuple (Falcon, MPT)."""
    _, blocks = decoder_blocks(model)
    originals = list(blocks)
    stubs = [BlockStub(block, returns_tuple) for block in originals]
    try:
        for index, stub in enumerate(stubs):
            blocks[index] = stub
        yield stubs
    finally:
        for index, original in enumerate(originals):
            blocks[index] = original


class BlockInputs:
    """Hidden states [N, T, H] in front of the first block, and each block's keyword arguments for a batch of any size."""

    @torch.no_grad()
    def __init__(self, model: PreTrainedModel, tokens_NT: Tensor) -> None:
        device = next(model.parameters()).device
        with stubbed_blocks(model) as stubs:
            # One window at a time, so that recorded masks and angles have batch 1 and broadcast over any batch.
            for row_T in tokens_NT:
                model.base_model(input_ids=row_T[None].to(device), use_cache=False)
        self.hidden_NTH = torch.cat(stubs[0].hidden)
        self.kwargs = [stub.kwargs for stub in stubs]


def run_block(module: nn.Module, hidden_NTH: Tensor, kwargs: dict[str, Any]) -> Tensor:
    out = module(hidden_NTH, **kwargs)
    return out if isinstance(out, Tensor) else out[0]


def add_gram(gram_II: Tensor, x_NI: Tensor, strip: int = 256) -> None:
    """Add x^T x to the upper triangle, in strips of rows: little more than half the work of the full product."""
    for start in range(0, len(gram_II), strip):
        gram_II[start : start + strip, start:].addmm_(x_NI[:, start : start + strip].t(), x_NI[:, start:])


def completed(gram_II: Tensor) -> Tensor:
    """The symmetric matrix whose upper triangle `add_gram` filled."""
    return gram_II.triu().add_(gram_II.triu(1).t())


class _Abandoned(Exception):
    """Unwinds a forward pass that nobody will continue."""


class _PausedForward:
    """A block's forward pass over one batch that stops in front of every stage, so that no work is done twice.

    Runs in a thread of its own, strictly in turn with the caller: exactly one of the two is ever running.
    """

    def __init__(self, forward: Callable[[Tensor], Tensor], hidden_NTH: Tensor) -> None:
        self.stage = -1  # stage in front of which the pass stands; -1 before it has begun
        self.input: Tensor | None = None  # that stage's input
        self.output: Tensor | None = None
        self._error: BaseException | None = None
        self._turn, self._stopped = threading.Semaphore(0), threading.Semaphore(0)
        self._abandoned = False
        self.thread = threading.Thread(target=self._run, args=(forward, hidden_NTH), daemon=True)
        self.thread.start()

    @torch.no_grad()
    def _run(self, forward: Callable[[Tensor], Tensor], hidden_NTH: Tensor) -> None:
        self._turn.acquire()
        try:
            if not self._abandoned:
                self.output = forward(hidden_NTH)
        except _Abandoned:
            pass
        except BaseException as error:  # handed to the caller in advance()
            self._error = error
        self._stopped.release()

    def pause(self, stage: int, x: Tensor) -> None:
        """Called by the pass itself, from inside the block."""
        self.stage, self.input = stage, x
        self._stopped.release()
        self._turn.acquire()
        self.input = None
        if self._abandoned:
            raise _Abandoned

    def advance(self) -> None:
        self._turn.release()
        self._stopped.acquire()
        if self._error is not None:
            raise self._error

    def abandon(self) -> None:
        self._abandoned = True
        self._turn.release()
        self.thread.join()


def _advanced(passes: list[_PausedForward], stage: int) -> Iterator[_PausedForward]:
    for paused in passes:
        while paused.stage < stage and paused.output is None:
            paused.advance()
        yield paused


def _abandon(passes: list[_PausedForward]) -> None:
    for paused in passes:
        paused.abandon()
    passes.clear()


class _Slot(nn.Module):
    """Stands where a linear layer stood; runs whatever is installed (in an original's pass the original), after letting the block pause."""

    def __init__(self, layer: nn.Module, reached: Callable[[Tensor], bool]) -> None:
        super().__init__()
        self.layer, self.original, self.reached = layer, layer, reached

    def forward(self, x: Tensor) -> Tensor:
        is_original = self.reached(x)
        return self.original(x) if is_original else self.layer(x)


class BlockRun:
    """methods.base.Block over a live block and the calibration activations in front of it.

    `original_NTH` are the activations of the uncompressed model; without them `drift` and `original_outputs` are not to be had.
    Use as a context: inside, the block's linear layers are slots; on leaving, what is installed in them takes their place.
    """

    def __init__(
        self, model: PreTrainedModel, spec: BlockSpec, module: nn.Module, hidden_NTH: Tensor, kwargs: dict[str, Any],
        original_NTH: Tensor | None = None, tables: Mapping[str, Table] | None = None,
        fisher: Mapping[str, Sensitivity] | None = None,
    ) -> None:  # fmt: skip
        self.model, self.module, self.kwargs = model, module, kwargs
        self.tables, self._fisher = tables or {}, fisher or {}
        self.hidden_NTH, self.original_NTH = hidden_NTH, original_NTH
        self.layers: dict[str, LayerSpec] = {layer.name: layer for layer in spec.layers}
        self.reports: dict[str, dict[str, float]] = {}
        self._slots = {name: _Slot(model.get_submodule(name), partial(self._reached, name)) for name in self.layers}
        self._passes: list[_PausedForward] = []
        self._originals: list[_PausedForward] = []  # through the uncompressed block, from the uncompressed model's activations
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
        _abandon(self._originals)
        for name, slot in self._slots.items():
            self.model.set_submodule(name, slot.layer)

    def stages(self) -> list[list[str]]:
        return self._stages

    def weight(self, name: str) -> Tensor:
        weight_OI = self._slots[name].original.weight.detach().float()
        if not bool(torch.isfinite(weight_OI).all()):
            raise ValueError(f"{name} holds weights that are not finite: the model itself is broken")
        return weight_OI

    @torch.no_grad()
    def hessian(self, name: str) -> Tensor:
        size = self.layers[name].in_features
        hessian_II = torch.zeros(size, size, device=self.hidden_NTH.device)
        if name not in self._uncalled:
            for paused in self._advance_to(self._stage_of[name]):
                add_gram(hessian_II, paused.input.reshape(-1, size).float())
            hessian_II = completed(hessian_II)
        return hessian_II

    @torch.no_grad()
    def drift(self, name: str) -> Tensor:
        """fp32 [I, I]: sum of (x' - x) x^T, x' being the uncompressed model's input of the layer where `hessian` sees x."""
        size = self.layers[name].in_features
        drift_II = torch.zeros(size, size, device=self.hidden_NTH.device)
        if name not in self._uncalled:
            stage = self._stage_of[name]
            for paused, original in zip(self._advance_to(stage), self._originals_to(stage), strict=True):
                x_NI, original_NI = (p.input.reshape(-1, size).float() for p in (paused, original))
                drift_II.addmm_((original_NI - x_NI).t(), x_NI)
        return drift_II

    def fisher(self, name: str) -> Sensitivity:
        """Zero for a layer that no calibration token reached."""
        layer = self.layers[name]
        zeros = (torch.zeros(size, device=self.hidden_NTH.device) for size in (layer.out_features, layer.in_features))
        return self._fisher.get(name) or Sensitivity(*zeros)

    def install(self, name: str, compressed: Compressed) -> None:
        slot = self._slots[name]
        compressed.packed.set_bias(slot.original.bias)
        if key := compressed.packed.table_key:
            compressed.packed.attach(self.tables[key])
        slot.layer = compressed.packed
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
        return self.hidden_NTH, self.original_outputs()

    @torch.no_grad()
    def outputs(self) -> Tensor:
        """Hidden states behind the block as it is now: the inputs of the next one."""
        return torch.cat([paused.output for paused in self._advance_to(len(self._stages))])

    @torch.no_grad()
    def original_outputs(self) -> Tensor:
        """Hidden states behind the uncompressed block."""
        return torch.cat([paused.output for paused in self._originals_to(len(self._stages))])

    def _advance_to(self, stage: int) -> Iterator[_PausedForward]:
        """The pass of every batch, standing in front of `stage` (beyond the last one: finished)."""
        if self._stale or any(paused.stage > stage or paused.output is not None for paused in self._passes):
            self._restart()
        self._passes = self._passes or self._begin(self.hidden_NTH)
        return _advanced(self._passes, stage)

    def _originals_to(self, stage: int) -> Iterator[_PausedForward]:
        assert self.original_NTH is not None, "the block was not given the uncompressed model's activations"
        if any(paused.stage > stage for paused in self._originals):
            _abandon(self._originals)
        if not self._originals:
            self._originals += self._begin(self.original_NTH)
        return _advanced(self._originals, stage)

    def _begin(self, hidden_NTH: Tensor) -> list[_PausedForward]:
        return [_PausedForward(self._forward, batch_NTH) for batch_NTH in hidden_NTH.split(max(1, BATCH_TOKENS // hidden_NTH.shape[1]))]

    def _restart(self) -> None:
        _abandon(self._passes)
        self._stale = False

    def _forward(self, hidden_NTH: Tensor) -> Tensor:
        return run_block(self.module, hidden_NTH, self.kwargs)

    def _reached(self, name: str, x: Tensor) -> bool:
        """A slot is about to run: note it while stages are being found, pause in front of the first layer of a stage. True if it is to
        run the original layer."""
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
        self._forward(self.hidden_NTH[:1])
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
