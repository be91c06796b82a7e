"""One model runner for every row: a static key-value cache, greedy, one token of every sequence at a time."""

from __future__ import annotations

import inspect
import math
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, StaticCache

from harness.compressed import CompressedModel
from harness.measure.halves import keep_halves
from harness.measure.native import token_decoder
from harness.model.families import known_positions
from harness.model.linear_layers import linear_of
from kernels.dispatch import fused
from kernels.formats.stored import StoredModule
from kernels.timing import Call, graphed
from kernels.views import Kept

CONTEXT = 128  # tokens in front of the first that is timed
STEPS = 128  # tokens a cache has room for behind them, fewer where the model knows fewer positions
PROMPT = 512  # tokens of the prompt whose reading is timed
WARM = 2  # steps before anything is timed


def timed_model(loaded: CompressedModel) -> PreTrainedModel:
    """The model that is run, packed layers as they are.

    On a CPU 16-bit weights stay 16-bit weights, those of uncompressed layers, of the embedding and of the head: they
    are multiplied as they are stored. Elsewhere (the vendor's product of 16-bit weights is the fastest there is), and
    where no kernel can be compiled, uncompressed layers are the linear layers they stand for, in the compute dtype."""
    model = loaded.model
    on_cpu = model.device.type == "cpu"
    for name, layer in loaded.packed.items():
        if layer.format == "dense" and not (on_cpu and fused(layer, "cpu")):
            bias_O = None if layer.bias is None else layer.bias.to(model.dtype)
            model.set_submodule(name, linear_of(layer.decode().to(model.dtype), bias_O))
    if on_cpu:
        keep_halves(model, loaded.half)
    return model


class Runner:
    """A batch of sequences behind their prompts [B, T], T of two or more; every `step` appends the tokens `ids_B1` and
    puts the likeliest next ones in their place, at most `steps` times (as often as a cache has room for).

    `name` says what runs a step: "native" (kernels.cpu.model, on a CPU), "cuda-graph" (transformers' forward, recorded
    once it is warm), or "transformers" (the interpreter in between); `reason` why it is not native."""

    def __init__(
        self, model: PreTrainedModel, prompt_BT: Tensor, steps: int | None = None, native: bool = True
    ) -> None:
        self.model, self.device = model, str(prompt_BT.device)
        self.left = _room(model) if steps is None else steps
        self.position = prompt_BT.shape[1] - 1
        positions = prompt_BT.shape[1] + self.left
        self.cache = _cache(model, positions)
        self._keep = _keep(model)
        self._forward(prompt_BT[:, :-1])
        self.ids_B1 = prompt_BT[:, -1:].clone()
        self.logits_BV: Tensor | None = None
        self._replayed: Call = self._step
        on_cpu = torch.device(self.device).type == "cpu"
        self.name = "transformers" if on_cpu else "cuda-graph"
        self.reason = "" if on_cpu else "on a GPU transformers' forward is recorded"
        if native and on_cpu:
            decoder = token_decoder(model, self.cache, positions)
            if isinstance(decoder, str):
                self.reason = decoder
            else:
                self.name, self._decoder, self._replayed = "native", decoder, self._native_step

    def warm(self) -> None:
        """Run steps until everything that is prepared at first use is there; on a GPU then one step becomes a graph."""
        for _ in range(WARM):
            self.step()
        self._replayed = graphed(self._replayed, self.device)

    def step(self) -> None:
        assert self.left > 0, "no room in the cache"
        self.left -= 1
        self._replayed()
        self.position += 1

    def _native_step(self) -> None:
        self._decoder.step(self.ids_B1, self.position)
        self.logits_BV = self._decoder.logits_BV

    @torch.inference_mode()
    def _step(self) -> None:
        self.logits_BV = self._forward(self.ids_B1)
        self.ids_B1.copy_(self.logits_BV.argmax(dim=-1, keepdim=True))

    @torch.inference_mode()
    def _forward(self, ids_BT: Tensor) -> Tensor:
        return self.model(ids_BT, past_key_values=self.cache, use_cache=True, **self._keep).logits[:, -1]


@torch.inference_mode()
def read_prompt(model: PreTrainedModel, prompt_BT: Tensor) -> Tensor:
    """Logits [B, V] behind a prompt that is read into a new cache."""
    return model(prompt_BT, past_key_values=_cache(model, prompt_BT.shape[1]), use_cache=True, **_keep(model)).logits[
        :, -1
    ]


@torch.inference_mode()
def scored_logits(model: PreTrainedModel, window_BT: Tensor, count: int = 1) -> Tensor:
    """Logits [B, count, V] of a window's last tokens, without a cache: how perplexities are scored."""
    return model(window_BT, use_cache=False, **_keep(model, count)).logits[:, -count:]


def decode_gap(model: PreTrainedModel, windows_NT: Tensor) -> float:
    """How far the perplexity of windows [N, T], decoded token by token by the runner that is timed, lies from the one
    that is scored, as a fraction of it. The first two tokens of a window are its prompt."""
    decoded, scored = [], []
    for window_1T in windows_NT.split(1):
        targets_P = window_1T[0, 2:]
        scored.append(_losses(scored_logits(model, window_1T[:, :-1], len(targets_P))[0], targets_P))
        runner = Runner(model, window_1T[:, :2], steps=len(targets_P))
        losses = []
        for place in range(1, window_1T.shape[1] - 1):
            runner.ids_B1.copy_(window_1T[:, place : place + 1])
            runner.step()
            assert runner.logits_BV is not None
            losses.append(_losses(runner.logits_BV, window_1T[0, place + 1 : place + 2]))
        decoded.append(torch.cat(losses))
    return math.expm1((torch.cat(decoded).mean() - torch.cat(scored).mean()).item())


def _losses(logits_PV: Tensor, targets_P: Tensor) -> Tensor:
    return nn.functional.cross_entropy(logits_PV.float(), targets_P, reduction="none").double()


def prompt(model: PreTrainedModel, batch: int, length: int) -> Tensor:
    """Random tokens [batch, length], the same every time; shorter where the model knows fewer positions."""
    length = min(length, _positions(model) - _room(model))
    generator = torch.Generator().manual_seed(0)
    return torch.randint(model.config.get_text_config().vocab_size, (batch, length), generator=generator).to(
        model.device
    )


def _positions(model: PreTrainedModel) -> int:
    return known_positions(model.config) or 1 << 30


def _room(model: PreTrainedModel) -> int:
    return min(STEPS, _positions(model) // 2)


def _cache(model: PreTrainedModel, length: int) -> StaticCache:
    return StaticCache(config=model.config, max_cache_len=length)


def _keep(model: PreTrainedModel, count: int = 1) -> dict[str, Any]:
    """The head is asked for the last tokens alone, where the model can be."""
    return {"logits_to_keep": count} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}


def bytes_per_token(loaded: CompressedModel) -> int:
    """Read from memory for one token of one sequence, at least: the stored bytes of packed layers and tables (of layers
    that were decoded when loaded, the weights), of a pair the base's weights, and everything else once, but of an
    embedding that is not also the head one row. The cache is left out: it is the same for all, and short."""
    model = loaded.model
    weights = sum(
        layer.in_features * layer.out_features * model.dtype.itemsize
        if layer.decode_on_load
        else (layer.stored_bits().total + layer.beside_bits) // 8
        for layer in loaded.packed.values()
    ) + sum(table.stored_bits().total // 8 for table in loaded.tables.values())
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings()
    packed = {
        tensor.data_ptr()
        for module in model.modules()
        if isinstance(module, StoredModule)
        for tensor in module.buffers()
    }
    rest = {t.data_ptr(): t.nbytes for t in (*model.parameters(), *model.buffers()) if t.data_ptr() not in packed}
    if head is None or head.weight.data_ptr() != embedding.data_ptr():
        rest.pop(embedding.data_ptr(), None)
    return weights + sum(rest.values())


def resident_bytes(model: nn.Module) -> int:
    """Everything the model holds to run: parameters, buffers, and what formats and kernels keep besides."""
    found: dict[int, int] = {}
    for module in model.modules():
        kept = [value for value in vars(module).values() if isinstance(value, Tensor)]
        views = [value.view.tensors.values() for value in vars(module).values() if isinstance(value, Kept)]
        for tensor in (
            *module.parameters(recurse=False),
            *module.buffers(recurse=False),
            *kept,
            *(t for view in views for t in view),
        ):
            storage = tensor.untyped_storage()
            found[storage.data_ptr()] = storage.nbytes()
    return sum(found.values())
