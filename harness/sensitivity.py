"""How much an error in each weight costs: the predicted KL divergence from the uncompressed model, measured once for all methods.

For a small change E of a layer's weights the divergence per token is 1/2 mean_t (g_t . E x_t)^2, with x_t the layer's input and g_t
the gradient, with respect to its output, of the log-likelihood of tokens drawn from the model's own predictions (the Fisher
information is the Hessian of the divergence). With input and gradient taken as independent, outputs as uncorrelated, and each
column's error counted after error feedback, two vectors per layer are left (KFAC, Martens & Grosse, arXiv 1503.05671, cut down):

    divergence ~ 1/2 sum_o row_o sum_i column_i E_oi^2       row_o = mean g_o^2,   column_i = 1 / [H^-1]_ii given later columns

The forward pass collects H; on the way back each block is run once more with gradients, from the states kept in front of it.
Measured on the original model, so that a plan does not depend on itself.

A data-free method may not look at text. Its layers are measured on token ids drawn uniformly (as Malinovskii et al., arXiv
2411.17525, do), without error feedback (column_i = mean x_i^2), and only the mean of either vector is kept: such tokens tell how
much a layer matters, but not which of its columns.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from harness.calibration import BlockInputs, add_gram, completed, run_block, stubbed_blocks
from harness.files import atomic_path, cache_dir, digest, locked
from harness.model import BlockSpec, decoder_blocks, inventory
from harness.windows import stream_sha256
from methods.base import Sensitivity
from methods.codecs.error_feedback import prepare

HESSIAN_TOKENS, GRADIENT_TOKENS = 4096, 1024  # of the calibration's, in whole windows; twice as many move a layer's cost by a tenth
RANDOM_CONTEXT = 512
HEAD_TOKENS = 256  # through the head at once: a handful of copies of their logits are held
DAMP = 0.01  # share of mean diag(H), as in compression

Progress = Callable[[int, int], None]


def measure_sensitivities(
    model: PreTrainedModel, tokens_NT: Tensor, seed: int, feedback: bool = True, progress: Progress = lambda *_: None
) -> dict[str, Sensitivity]:
    """One `Sensitivity` for every linear layer the windows [N, T] reach; `seed` draws the predicted tokens. `feedback`: errors will
    be passed on between columns."""
    _, modules = decoder_blocks(model)
    blocks = inventory(model).blocks
    column_I: dict[str, Tensor] = {}
    row_O: dict[str, Tensor] = {}
    tokens_NT = tokens_NT[: -(-HESSIAN_TOKENS // tokens_NT.shape[1])]
    few = -(-GRADIENT_TOKENS // tokens_NT.shape[1])
    with _frozen(model):
        inputs = BlockInputs(model, tokens_NT)
        hidden_NTH, kept_NTH = inputs.hidden_NTH, []
        for index, (module, kwargs) in enumerate(zip(modules, inputs.kwargs, strict=True)):
            kept_NTH.append(hidden_NTH[:few].clone())
            inputs_of = _Grams(feedback)
            with torch.no_grad(), _hooked(model, blocks[index], inputs_of):
                hidden_NTH = torch.cat([run_block(module, window_TH[None], kwargs) for window_TH in hidden_NTH])
            column_I |= inputs_of.columns()
            progress(index + 1, 2 * len(modules))
        with torch.no_grad():
            returns_tuple = not isinstance(modules[0](inputs.hidden_NTH[:1], **inputs.kwargs[0]), Tensor)
        gradient_NTH = _head_gradient(model, hidden_NTH[:few], seed, returns_tuple)
        for index in reversed(range(len(modules))):
            squares = _Squares()
            hidden_NTH = kept_NTH.pop()
            with _hooked(model, blocks[index], squares):
                for n, window_TH in enumerate(hidden_NTH):
                    given_NTH = window_TH[None].detach().requires_grad_()
                    run_block(modules[index], given_NTH, inputs.kwargs[index]).backward(gradient_NTH[n : n + 1])
                    gradient_NTH[n] = given_NTH.grad[0]
            row_O |= {name: square_O / hidden_NTH[..., 0].numel() for name, square_O in squares.square_O.items()}
            progress(2 * len(modules) - index, 2 * len(modules))
    return {name: Sensitivity(row, column_I[name]) for name, row in row_O.items() if row.any() and column_I[name].any()}


def _head_gradient(model: PreTrainedModel, hidden_NTH: Tensor, seed: int, returns_tuple: bool) -> Tensor:
    """Gradient of each window's summed -log p(drawn token) with respect to the state behind the last block, [N, T, H]."""
    generator = torch.Generator().manual_seed(seed)
    gradient_NTH = torch.empty_like(hidden_NTH)
    width = hidden_NTH.shape[-1]
    with stubbed_blocks(model, returns_tuple) as stubs:
        # Final norm and head look at one position at a time, so any slice of positions will do, and the token ids are not looked at.
        for part_TH, out_TH in zip(*(x.view(-1, width).split(HEAD_TOKENS) for x in (hidden_NTH, gradient_NTH)), strict=True):
            stubs[-1].replay = part_TH[None].detach().requires_grad_()
            tokens_BT = torch.zeros(1, len(part_TH), dtype=torch.long, device=part_TH.device)
            log_p_TV = model(input_ids=tokens_BT, use_cache=False).logits[0].float().log_softmax(dim=-1)
            # Drawn on the CPU: the same tokens on every device. Inverse of the cumulative distribution at one uniform number each.
            level_T = torch.rand(len(log_p_TV), 1, generator=generator).to(log_p_TV.device)
            drawn_T = torch.searchsorted(log_p_TV.detach().exp().cumsum(dim=-1), level_T).clamp_max_(log_p_TV.shape[1] - 1)
            (-log_p_TV.gather(1, drawn_T).sum()).backward()
            out_TH.copy_(stubs[-1].replay.grad[0])
    return gradient_NTH


class _Grams:
    """Sums x x^T of every layer's input (its diagonal alone when there is no feedback), once for layers called in a row with the same
    tensor."""

    def __init__(self, feedback: bool) -> None:
        self.feedback = feedback
        self.owner: dict[str, str] = {}
        self.sum: dict[str, Tensor] = {}  # [I, I] or [I]
        self.tokens: dict[str, int] = {}
        self._last: tuple[Tensor, str] | None = None

    def __call__(self, name: str, x: Tensor, out: Tensor) -> None:
        owner = self._last[1] if self._last and self._last[0] is x else name
        self.owner[name], self._last = owner, (x, owner)
        if owner != name:
            return
        x_NI = x.reshape(-1, x.shape[-1]).float()
        size = x_NI.shape[1]
        if name not in self.sum:
            self.sum[name], self.tokens[name] = x_NI.new_zeros((size, size) if self.feedback else size), 0
        if self.feedback:
            add_gram(self.sum[name], x_NI)
        else:
            self.sum[name] += x_NI.square().sum(dim=0)
        self.tokens[name] += len(x_NI)

    def columns(self) -> dict[str, Tensor]:
        column_I = {name: self._column(total / self.tokens[name]) for name, total in self.sum.items()}
        return {name: column_I[owner] for name, owner in self.owner.items()}

    def _column(self, mean: Tensor) -> Tensor:
        if not self.feedback:
            return mean
        factored = prepare(completed(mean), act_order=True, damp=DAMP)
        pivot_I = factored.upper_II.diagonal().square().reciprocal()
        return torch.empty_like(pivot_I).index_copy_(0, factored.order_I, pivot_I)


class _Squares:
    """Sums g^2 of the gradient of every layer's output."""

    def __init__(self) -> None:
        self.square_O: dict[str, Tensor] = {}

    def __call__(self, name: str, x: Tensor, out: Tensor) -> None:
        self.square_O.setdefault(name, torch.zeros(out.shape[-1], device=out.device))  # stays zero if no loss depends on it
        out.register_hook(partial(self._backward, name))

    def _backward(self, name: str, gradient: Tensor) -> None:
        self.square_O[name] += gradient.reshape(-1, gradient.shape[-1]).float().square().sum(dim=0)


@contextmanager
def _hooked(model: PreTrainedModel, block: BlockSpec, watch: Callable[[str, Tensor, Tensor], None]) -> Iterator[None]:
    """Calls watch(name, input, output) whenever a linear layer of the block has run."""

    def hook(name: str, module: nn.Module, args: tuple[Tensor], out: Tensor) -> None:
        watch(name, args[0], out)

    handles = [model.get_submodule(layer.name).register_forward_hook(partial(hook, layer.name)) for layer in block.layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _frozen(model: PreTrainedModel) -> Iterator[None]:
    """No gradients of weights inside: only activations are followed back."""
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        for parameter in trainable:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in trainable:
            parameter.requires_grad_(True)


def remembered_sensitivities(
    key: Sequence[Any], model: PreTrainedModel, tokens_NT: Tensor, seed: int, feedback: bool, progress: Progress = lambda *_: None
) -> dict[str, Sensitivity]:
    """Measured by the first process that asks, read by all others; `key` and `tokens_NT` are everything the numbers depend on."""
    path = cache_dir("sensitivities", digest([*key, stream_sha256(tokens_NT), seed, feedback])[:24] + ".safetensors")
    with locked(path):
        if not path.exists():
            found = measure_sensitivities(model, tokens_NT, seed, feedback, progress)
            tensors = {f"{name}.{leaf}": value for name, s in found.items() for leaf, value in (("row", s.row_O), ("column", s.column_I))}
            with atomic_path(path) as temporary:
                save_file({name: tensor.cpu().clone() for name, tensor in tensors.items()}, temporary)
    tensors = load_file(path, device=str(next(model.parameters()).device))
    names = {name.rpartition(".")[0] for name in tensors}
    return {name: Sensitivity(tensors[f"{name}.row"], tensors[f"{name}.column"]) for name in names}


def random_tokens(vocabulary: int) -> Tensor:
    """What the layers of a data-free method are measured on [N, T]. The same for every seed: a method that no seed can change keeps
    one plan."""
    return torch.randint(vocabulary, (HESSIAN_TOKENS // RANDOM_CONTEXT, RANDOM_CONTEXT), generator=torch.Generator().manual_seed(0))
