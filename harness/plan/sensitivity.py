"""How much an error in each weight costs: the predicted KL divergence from the uncompressed model, measured once for
all methods.

For a small change E of a layer's weights the divergence per token is 1/2 mean_t (g_t . E x_t)^2, with x_t the layer's
input and g_t the gradient, with respect to its output, of the log-likelihood of tokens drawn from the model's own
predictions (the Fisher information is the Hessian of the divergence). With input and gradient taken as independent,
outputs as uncorrelated, and each column's error counted after error feedback, two vectors per layer are left (KFAC,
Martens & Grosse, arXiv 1503.05671, cut down):

    divergence ~ 1/2 sum_o row_o sum_i column_i E_oi^2
    row_o = mean g_o^2,   column_i = 1 / [H^-1]_ii given later columns (harness.plan.pivots: from few tokens)

The forward pass collects H; on the way back each block is run once more with gradients, from the states kept in front
of it. Measured on the original model, so that an allocation does not depend on itself.

A data-free method may not look at text. Its layers are measured on token ids drawn uniformly (as Malinovskii et al.,
arXiv 2411.17525, do), without error feedback (column_i = mean x_i^2), and only the mean of either vector is kept: such
tokens tell how much a layer matters, but not which of its columns.

LQ-LoRA (Guo et al., arXiv 2311.12023, sec. 3.3) weighs errors with the Fisher information of the text itself: every
weight's squared gradient of a sequence's loss, summed over sequences, of which the means per row and per column are
kept. `measure_fisher` reduces them in hooks on the way back: no gradient of the size of a matrix outlives its window.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from harness.compress.forward import BlockInputs, stubbed_blocks
from harness.compress.states import States
from harness.compress.statistics import add_gram, complete
from harness.data.files import cache_dir, digest, locked
from harness.data.sealed import believed, load_tensors, save_tensors
from harness.data.windows import stream_sha256
from harness.model import BlockSpec, Inventory, inventory
from harness.model.families import known_positions
from harness.model.paging import pages_of, resident
from harness.plan.pivots import measure_version, pivots
from harness.plan.unfinished import Asked, Unfinished, joined, part
from harness.progress import Progress, silent
from methods.base import Sensitivity
from methods.codecs.error_feedback import Indefinite, NotFinite, all_finite

if TYPE_CHECKING:
    from transformers import PreTrainedModel


# Of the calibration's, in whole windows, as far as it has them; more for pivots of wide layers.
HESSIAN_TOKENS, GRADIENT_TOKENS = (4096, 1024)
TOKENS_PER_INPUT = 4
RANDOM_CONTEXT = 512
HEAD_TOKENS = 256  # through the head at once: a handful of copies of their logits are held
DAMP = 0.01  # share of mean diag(H), as in compression

FISHER_TOKENS = 4096  # whose states are kept in front of every block at once
NOTHING = -100  # a target that is none
MEASURES = ("feedback", "plain", "fisher")
PHASE = "measure layers"
NOWHERE = Unfinished()

Watch = Callable[[str, Tensor, Tensor], None]  # name, input and output of a layer that has run


def hessian_tokens(stock: Inventory) -> int:
    """How many tokens pivots are measured on."""
    return max(HESSIAN_TOKENS, *(TOKENS_PER_INPUT * layer.in_features for layer in stock.layers))


def measured_windows(stock: Inventory, context: int, feedback: bool) -> tuple[int, int]:
    """(windows that are looked at, windows that are followed back), as far as there are so many."""
    return -(-(hessian_tokens(stock) if feedback else HESSIAN_TOKENS) // context), -(-GRADIENT_TOKENS // context)


def measure_sensitivities(
    model: PreTrainedModel,
    tokens_NT: Tensor,
    seed: int,
    feedback: bool = True,
    progress: Progress = silent,
    unfinished: Unfinished = NOWHERE,
) -> dict[str, Sensitivity]:
    """One `Sensitivity` for every linear layer the windows [N, T] reach; `seed` draws the predicted tokens. `feedback`:
    errors will be passed on between columns. Goes on from what is `unfinished`."""
    stock = inventory(model)
    blocks = stock.blocks
    windows, followed_back = measured_windows(stock, tokens_NT.shape[1], feedback)
    tokens_NT = tokens_NT[:windows]
    device = next(model.parameters()).device
    _, kept = unfinished.state()
    column_I, square_O = (
        {name: tensor.to(device) for name, tensor in part(of, kept).items()} for of in ("column", "square")
    )
    with _frozen(model):
        walk = _Walk(model, tokens_NT, followed_back)
        walk.go_on(kept)

        def found() -> Mapping[str, Tensor]:
            return joined(column=column_I, square=square_O, **walk.state())

        grams = [_Grams(feedback) for _ in blocks]
        for index in walk.forward(grams):
            column_I |= grams[index].columns()
            unfinished.keep(index + 1, found)
            progress(PHASE, index + 1, 2 * len(blocks))
        squares = [_Squares() for _ in blocks]
        for index in walk.backward(squares, seed=seed):
            square_O |= squares[index].square_O
            unfinished.keep(2 * len(blocks) - index, found)
            progress(PHASE, 2 * len(blocks) - index, 2 * len(blocks))
    row_O = {name: total_O / walk.tokens for name, total_O in square_O.items()}
    return {name: Sensitivity(row, column_I[name]) for name, row in row_O.items() if row.any() and column_I[name].any()}


def measure_fisher(
    model: PreTrainedModel, tokens_NT: Tensor, progress: Progress = silent, unfinished: Unfinished = NOWHERE
) -> dict[str, Sensitivity]:
    """The Fisher information of every linear layer as a product of rows and columns, per token; of rows that no loss
    reaches it is zero. A window is a sequence; its loss is that of predicting its own tokens."""
    blocks = inventory(model).blocks
    squares = [_Gradients() for _ in blocks]
    device = next(model.parameters()).device
    done, kept = unfinished.state()
    of_layer = {layer.name: squares[index].means for index, block in enumerate(blocks) for layer in block.layers}
    for name, row_O in part("row", kept).items():
        of_layer[name][name] = (row_O.to(device), kept[f"column/{name}"].to(device))
    at_once = max(1, FISHER_TOKENS // tokens_NT.shape[1])
    with _frozen(model):
        for start in range(done, len(tokens_NT), at_once):
            walk = _Walk(model, tokens_NT[start : start + at_once], at_once)
            for _ in walk.forward([_ignore] * len(blocks)):
                pass
            for index in walk.backward(squares, targets_NT=walk.tokens_NT.roll(-1, dims=1)):
                back = start * len(blocks) + len(walk.tokens_NT) * (len(blocks) - index)
                progress(PHASE, back, len(tokens_NT) * len(blocks))
            unfinished.keep(start + at_once, partial(_means, squares))
    found = {}
    for name, (row_O, column_I) in ((name, means) for block in squares for name, means in block.means.items()):
        mean = row_O.mean().clamp_min(torch.finfo(torch.float32).tiny)
        found[name] = Sensitivity(row_O / tokens_NT.numel(), column_I / mean)
    return found


def _means(blocks: Sequence[_Gradients]) -> Mapping[str, Tensor]:
    found = {name: means for block in blocks for name, means in block.means.items()}
    rows, columns = ({name: means[side] for name, means in found.items()} for side in (0, 1))
    return joined(row=rows, column=columns)


class _Walk:
    """A pass through the model block by block, and back: each block is run again with gradients, from the states kept
    in front of it. Of a model that is not in memory the states are not either."""

    def __init__(self, model: PreTrainedModel, tokens_NT: Tensor, followed_back: int) -> None:
        """Only the first `followed_back` windows are gone back through."""
        self.model, self.back = model, min(followed_back, len(tokens_NT))
        self.blocks = inventory(model).blocks
        spill = cache_dir("sensitivities") if pages_of(model) else None
        self.inputs = BlockInputs(model, tokens_NT, spill)
        self.hidden = self.inputs.hidden  # in front of the next block
        self.tokens_NT = tokens_NT[: self.back]  # those followed back, and their states in front of every block so far
        _, tokens, width = self.hidden.shape
        shape = (len(self.blocks) * self.back, tokens, width)
        self.kept, self.reached = States(shape, self.hidden.dtype, self.hidden.device, spill), 0
        self.gradient_NTH: Tensor | None = None  # with respect to what the last block gone back through was given

    @property
    def tokens(self) -> int:
        """How many tokens are followed back."""
        return self.tokens_NT.numel()

    def state(self) -> dict[str, Mapping[str, Tensor]]:
        """What `go_on` needs to continue from here."""
        kept = {str(n): partial(self.kept.read, n, n + 1) for n in range(self.reached * self.back)}
        if self.gradient_NTH is not None:
            return {"kept": Asked(kept), "gradient": {"": self.gradient_NTH}}
        return {
            "kept": Asked(kept),
            "hidden": Asked({str(n): partial(self.hidden.read, n, n + 1) for n in range(len(self.hidden))}),
        }

    def go_on(self, state: Mapping[str, Tensor]) -> None:
        """Take up a walk where it was left; from nothing at its beginning."""
        for name, states in (("kept", self.kept), ("hidden", self.hidden)):
            for number, state_NTH in part(name, state).items():
                states.write(int(number), state_NTH)
        self.reached = len(part("kept", state)) // self.back
        for gradient_NTH in part("gradient", state).values():
            self.gradient_NTH = gradient_NTH.to(self.hidden.device)

    def forward(self, watches: Sequence[Watch]) -> Iterator[int]:
        """Yields the index of every block when it has run."""
        if self.gradient_NTH is not None:
            return
        for index in range(self.reached, len(self.blocks)):
            self.kept.write(index * self.back, self.hidden.read(0, self.back))
            with _hooked(self.model, self.blocks[index], watches[index]):
                self.inputs.advance(index)
            self.reached = index + 1
            yield index

    def backward(self, watches: Sequence[Watch], *, seed: int = 0, targets_NT: Tensor | None = None) -> Iterator[int]:
        """From the loss of predicting `targets_NT` (of the last place of a window nothing), or tokens drawn by `seed`;
        yields the index of every block when it has been gone back through."""
        if self.gradient_NTH is None:
            last_NTH = self.hidden.read(0, self.back)
            self.gradient_NTH = _head_gradient(self.model, last_NTH, seed, targets_NT, self.inputs.returns_tuple)
        for index in reversed(range(self.reached)):
            with resident(self.model, index), _hooked(self.model, self.blocks[index], watches[index]):
                for n in range(self.back):
                    given_NTH = self.kept.read(index * self.back + n, index * self.back + n + 1).detach()
                    given_NTH.requires_grad_()
                    self.inputs.block(index)(given_NTH).backward(self.gradient_NTH[n : n + 1])
                    assert given_NTH.grad is not None
                    self.gradient_NTH[n] = given_NTH.grad[0]
            self.reached = index
            yield index


def _head_gradient(
    model: PreTrainedModel, hidden_NTH: Tensor, seed: int, targets_NT: Tensor | None, returns_tuple: bool
) -> Tensor:
    """Gradient of each window's summed -log p(token) with respect to the state behind the last block, [N, T, H]; the
    tokens are `targets_NT`, none for the last place of a window, or drawn."""
    generator = torch.Generator().manual_seed(seed)
    gradient_NTH = torch.empty_like(hidden_NTH)
    width = hidden_NTH.shape[-1]
    at_once = min(HEAD_TOKENS, known_positions(model.config) or HEAD_TOKENS)
    if targets_NT is not None:
        targets_NT = targets_NT.clone()
        targets_NT[:, -1] = NOTHING
    targets = iter(()) if targets_NT is None else iter(targets_NT.flatten().to(hidden_NTH.device).split(at_once))
    with stubbed_blocks(model, returns_tuple) as stubs:
        # Final norm and head look at one position at a time, so any slice of positions will do, and the token ids are
        # not looked at.
        parts = (x_NTH.view(-1, width).split(at_once) for x_NTH in (hidden_NTH, gradient_NTH))
        for part_TH, out_TH in zip(*parts, strict=True):
            given_NTH = stubs[-1].replay = part_TH[None].detach().requires_grad_()
            tokens_BT = torch.zeros(1, len(part_TH), dtype=torch.long, device=part_TH.device)
            log_p_TV = model(input_ids=tokens_BT, use_cache=False).logits[0].float().log_softmax(dim=-1)
            target_T = _drawn(log_p_TV.detach(), generator) if targets_NT is None else next(targets)
            torch.nn.functional.nll_loss(log_p_TV, target_T, ignore_index=NOTHING, reduction="sum").backward()
            assert given_NTH.grad is not None
            out_TH.copy_(given_NTH.grad[0])
    return gradient_NTH


def _drawn(log_p_TV: Tensor, generator: torch.Generator) -> Tensor:
    """One token of each distribution. Drawn on the CPU: the same tokens on every device. Inverse of the cumulative
    distribution at one uniform number each."""
    level_T = torch.rand(len(log_p_TV), 1, generator=generator).to(log_p_TV.device)
    return torch.searchsorted(log_p_TV.exp().cumsum(dim=-1), level_T).clamp_max_(log_p_TV.shape[1] - 1)[:, 0]


def _ignore(name: str, x: Tensor, out: Tensor) -> None:
    """Watches nothing."""


class _Grams:
    """Sums x x^T of every layer's input (its diagonal alone when there is no feedback), once for layers called in a row
    with the same tensor."""

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
        """Every layer's costs by column [I]; the sums are let go."""
        column_I = {
            name: self._column(name, self.sum.pop(name).div_(max(1, self.tokens[name]))) for name in [*self.sum]
        }
        self._last = None  # which is as large as a block's widest activation
        return {name: column_I[owner] for name, owner in self.owner.items()}

    def _column(self, name: str, mean: Tensor) -> Tensor:
        if not all_finite(mean):
            raise NotFinite(
                f"the inputs of {name} are not finite: the model overflows on this text; try --dtype float32"
            )
        if not self.feedback:
            return mean
        if not mean.any():  # an expert no token was sent to
            return mean.diagonal()
        try:
            return pivots(complete(mean), self.tokens[name], DAMP)
        except Indefinite:  # as when it is packed: no feedback
            return mean.diagonal().clamp_min(0.0)


class _Squares:
    """Sums g^2 of the gradient of every layer's output."""

    def __init__(self) -> None:
        self.square_O: dict[str, Tensor] = {}

    def __call__(self, name: str, x: Tensor, out: Tensor) -> None:
        # Stays zero if no loss depends on it.
        self.square_O.setdefault(name, torch.zeros(out.shape[-1], device=out.device))
        out.register_hook(partial(self._backward, name))

    def _backward(self, name: str, gradient: Tensor) -> None:
        self.square_O[name] += gradient.reshape(-1, gradient.shape[-1]).float().square().sum(dim=0)


class _Gradients:
    """Sums, over windows, the means per row and per column of the squared gradient of every weight. A layer must run
    once a window."""

    def __init__(self) -> None:
        self.means: dict[str, tuple[Tensor, Tensor]] = {}

    def __call__(self, name: str, x: Tensor, out: Tensor) -> None:
        zeros = (torch.zeros(out.shape[-1], device=out.device), torch.zeros(x.shape[-1], device=x.device))
        self.means.setdefault(name, zeros)
        out.register_hook(partial(self._backward, name, x.detach()))

    def _backward(self, name: str, x: Tensor, gradient: Tensor) -> None:
        g_TO, x_TI = (t.reshape(-1, t.shape[-1]).float() for t in (gradient, x))
        square_OI = (g_TO.t() @ x_TI).square_()
        row_O, column_I = self.means[name]
        row_O += square_OI.mean(dim=1)
        column_I += square_OI.mean(dim=0)


@contextmanager
def _hooked(model: PreTrainedModel, block: BlockSpec, watch: Watch) -> Iterator[None]:
    """Calls watch(name, input, output) whenever a linear layer of the block has run."""

    def hook(name: str, module: nn.Module, args: tuple[Tensor], out: Tensor) -> None:
        watch(name, args[0], out)

    handles = [
        model.get_submodule(layer.name).register_forward_hook(partial(hook, layer.name)) for layer in block.layers
    ]
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
    key: Sequence[Any],
    model: PreTrainedModel,
    tokens_NT: Tensor,
    seed: int,
    measure: str,
    progress: Progress = silent,
) -> dict[str, Sensitivity]:
    """Measured by the first process that asks, read by all others; `key` and `tokens_NT` are everything the numbers
    depend on. `measure` is one of MEASURES: the divergence of errors passed on between columns, of errors that are not,
    or the Fisher information of the text."""
    assert measure in MEASURES
    origin = [*key, stream_sha256(tokens_NT), seed, measure, *measure_version(measure).values()]
    path = cache_dir("sensitivities", digest(origin)[:24] + ".safetensors")
    with locked(path, "the sensitivities of this model's layers"):
        kept = believed(path, load_tensors)
        if kept is None:
            unfinished = Unfinished(path.with_name(f"{path.stem}.unfinished.safetensors"))
            if measure == "fisher":
                found = measure_fisher(model, tokens_NT, progress, unfinished)
            else:
                found = measure_sensitivities(model, tokens_NT, seed, measure == "feedback", progress, unfinished)
            for name, s in found.items():
                if not all(bool(torch.isfinite(vector).all()) for vector in (s.row_O, s.column_I)):
                    raise NotFinite(
                        f"gradients of {name} are not finite: the model overflows on this text; try --dtype float32"
                    )
            vectors = {f"{name}.row": s.row_O for name, s in found.items()}
            save_tensors(path, vectors | {f"{name}.column": s.column_I.clone() for name, s in found.items()})
            unfinished.forget()
            kept = load_tensors(path)
    device = next(model.parameters()).device
    tensors = {name: tensor.to(device) for name, tensor in kept[0].items()}
    names = {name.rpartition(".")[0] for name in tensors}
    return {name: Sensitivity(tensors[f"{name}.row"], tensors[f"{name}.column"]) for name in names}


def random_tokens(vocabulary: int, positions: int | None = None) -> Tensor:
    """What the layers of a data-free method are measured on [N, T], T being at most `positions`. The same for every
    seed: a method that no seed can change keeps one allocation."""
    context = min(RANDOM_CONTEXT, positions or RANDOM_CONTEXT)
    return torch.randint(vocabulary, (HESSIAN_TOKENS // context, context), generator=torch.Generator().manual_seed(0))
