"""A model's forward pass, one block at a time, and a block's, one stage at a time.

`BlockInputs` asks the model what every block receives besides its hidden state (masks, rotary angles, biases of
positions), without running any block. `PausedForward` is a pass through a block that stops in front of every stage."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from harness.compress.states import States
from harness.model import decoder, decoder_blocks, states_of
from harness.model.paging import resident

if TYPE_CHECKING:
    from transformers import PreTrainedModel


BATCH_TOKENS = 8192  # tokens pushed through a block at once: amortises decoding packed layers, bounds activations


@dataclass(frozen=True)
class Arguments:
    """What a block is called with besides its hidden state."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def same(self, other: Arguments) -> bool:
        """Whether all tensors are the same."""
        pairs = zip(*(tree_leaves((of.args, of.kwargs)) for of in (self, other)), strict=True)
        return all(torch.equal(mine, its) for mine, its in pairs if isinstance(mine, Tensor))


class BlockStub(nn.Module):
    """Stands in for a block: notes what it is called with and hands the hidden state on, or `replay`, if that is set,
    in its place."""

    arguments: Arguments
    hidden: Tensor

    def __init__(self, block: nn.Module, returns_tuple: bool) -> None:
        super().__init__()
        self.returns_tuple = returns_tuple
        object.__setattr__(self, "block", block)  # not a submodule: .to() and state_dict() must not see it twice
        self.replay: Tensor | None = None

    def __getattr__(self, name: str) -> Any:  # models read attributes of their blocks (attention_type)
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(object.__getattribute__(self, "block"), name)

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor | tuple[Tensor]:
        out = self.replay
        if out is None:
            self.hidden = hidden_states
            self.arguments = Arguments(args, kwargs)
            out = hidden_states
        return (out,) if self.returns_tuple else out


@contextmanager
def stubbed_blocks(model: PreTrainedModel, returns_tuple: bool) -> Iterator[list[BlockStub]]:
    """Inside, every decoder block of the model is a stub: a forward pass costs the embedding and the head alone. What
    comes out of that pass is right only if the stubs return what the blocks do, a tensor or a tuple (Falcon, MPT)."""
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


@torch.no_grad()
def _returns_tuple(model: PreTrainedModel) -> bool:
    """Whether the blocks do: the first one runs on a single token."""
    found: list[bool] = []
    with stubbed_blocks(model, returns_tuple=False) as stubs:

        def look(module: nn.Module, args: Any, out: Any) -> None:
            found.append(not isinstance(out, Tensor))
            for stub in stubs:
                stub.returns_tuple = found[0]

        first = stubs[0].block
        decoder_blocks(model)[1][0] = first
        handle = first.register_forward_hook(look)
        try:
            _body(model, torch.zeros(1, 1, dtype=torch.long))
        finally:
            handle.remove()
    return found[0]


def _body(model: PreTrainedModel, tokens_BT: Tensor) -> None:
    decoder(model)(input_ids=tokens_BT.to(next(model.parameters()).device), use_cache=False)


class BlockInputs:
    """The states in front of the first block (`hidden`: in memory, or in a file in `spill`), and blocks that run on as
    many such windows as one likes.

    What else a block is called with is found by handing the model a batch of that size: masks and biases need not
    broadcast (Bloom's hold the batch and the heads in one dimension). Raises ValueError where it depends on the tokens
    themselves: blocks run on states whose tokens nobody knows."""

    @torch.no_grad()
    def __init__(self, model: PreTrainedModel, tokens_NT: Tensor, spill: Path | None = None) -> None:
        self.model, self.first_T = model, tokens_NT[0]
        self.returns_tuple = _returns_tuple(model)
        with stubbed_blocks(model, self.returns_tuple) as stubs:
            _body(model, tokens_NT[:1])
            self._known = {1: [stub.arguments for stub in stubs]}
            first_NTH = stubs[0].hidden
            shape = (*tokens_NT.shape, first_NTH.shape[-1])
            self.hidden = States(shape, first_NTH.dtype, first_NTH.device, spill)
            self.hidden.write(0, first_NTH)
            for index, window_T in enumerate(tokens_NT[1:], start=1):
                _body(model, window_T[None])
                self.hidden.write(index, stubs[0].hidden)
        if not all(stub.arguments.same(first) for stub, first in zip(stubs, self._known[1], strict=True)):
            raise ValueError(
                f"models of type {model.config.model_type} tell their blocks something of every token besides its "
                "state, which is not supported: give another model"
            )

    @torch.no_grad()
    def advance(self, index: int) -> None:
        """Push the states through a block, window by window."""
        with resident(self.model, index):
            self.hidden.replace(map(self.block(index), self.hidden.split(1)))

    def block(self, index: int) -> Callable[[Tensor], Tensor]:
        """The forward pass of a block as it is when it is called, on states [B, T, H], gradients and all."""
        return partial(self._run, index)

    def _run(self, index: int, hidden_BTH: Tensor) -> Tensor:
        given = self._arguments(len(hidden_BTH))[index]
        return states_of(decoder_blocks(self.model)[1][index](hidden_BTH, *given.args, **given.kwargs))

    @torch.no_grad()
    def _arguments(self, batch: int) -> list[Arguments]:
        """Of every block, for a batch of this size."""
        if batch not in self._known:
            with stubbed_blocks(self.model, self.returns_tuple) as stubs:
                _body(self.model, self.first_T.expand(batch, -1))
            self._known[batch] = [stub.arguments for stub in stubs]
        return self._known[batch]


class _Abandoned(Exception):
    """Unwinds a forward pass that nobody will continue."""


class PausedForward:
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

    @property
    def stage_input(self) -> Tensor:
        """The input of the stage it stands in front of."""
        assert self.input is not None
        return self.input

    @property
    def result(self) -> Tensor:
        """The block's output, once it has run through."""
        assert self.output is not None
        return self.output

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


def advanced(passes: list[PausedForward], stage: int) -> Iterator[PausedForward]:
    for paused in passes:
        while paused.stage < stage and paused.output is None:
            paused.advance()
        yield paused


def abandon(passes: list[PausedForward]) -> None:
    for paused in passes:
        paused.abandon()
    passes.clear()
