"""One pass over a protocol's windows: loss of every window, and the divergence from the uncompressed reference.

The reference's *hidden states* in front of the head are kept (tokens x width), never its logits (tokens x vocabulary):
the head is the same 16-bit tensor for every method, so the scored model's own head turns both into logits, a few
hundred tokens at a time.

KL(reference || model) per token in nats. What it can resolve is bounded by arithmetic: the reference's row carries a
*noise floor*, its divergence from itself when every block output is multiplied by 1 + u, |u| <= 2**-11, one rounding
unit of fp16."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from harness.data.sealed import save_tensors
from harness.data.windows import Articles
from harness.evaluate.logits import Compared, compare
from harness.model import decoder_blocks, in_place_of_states, states_of
from harness.model.head import head_of, hidden_states
from harness.model.paging import pages_of
from harness.progress import Progress, silent
from harness.store.results import KLD_EDGES, POSITIONS, Divergence, Losses

if TYPE_CHECKING:
    from transformers import PreTrainedModel


BODY_TOKENS = 8192  # tokens through the decoder at once
# The same on a CPU, of a model whose blocks are not read for every batch: what a layer gives is a few MiB, which stays
# in the last cache, and whose memory is used again (beyond 32 MiB the system gives new pages, zeroed, every time).
CACHED_TOKENS = 2048
HEAD_LOGITS = 1 << 23  # logits held at once (32 MiB in fp32), for the model and once more for the reference
NOISE_UNIT = 2.0**-11
NOISE_WINDOWS = 4


class _Diverging:
    """Collects KL(reference || model) of every token, KL(model || reference), and whether the model ranks the
    reference's first token first."""

    def __init__(self) -> None:
        self.kld_N: list[Tensor] = []
        self.reverse_N: list[Tensor] = []
        self.same_top_N: list[Tensor] = []

    def add(self, found: Compared, reference_top_N: Tensor, model_NV: Tensor) -> None:
        self.kld_N.append(found.kld_N)
        self.reverse_N.append(found.reverse_N)
        first_N = model_NV.gather(1, reference_top_N[:, None]).squeeze(1).cpu()
        self.same_top_N.append(first_N == found.highest_N)

    def summary(self, scored_NP: Tensor) -> Divergence:
        """`scored_NP`: which predictions of each window count."""
        kld_NP, reverse_NP, same_top_NP = (
            torch.cat(parts).view(scored_NP.shape) for parts in (self.kld_N, self.reverse_N, self.same_top_N)
        )
        kld_N = kld_NP[scored_NP]
        finite_N = kld_N[kld_N.isfinite()]
        window_kld_N = torch.where(scored_NP, kld_NP, 0.0).sum(dim=1) / scored_NP.sum(dim=1)
        return Divergence(
            kld=kld_N.mean().item(),
            kld_median=_quantile(finite_N, 0.5),
            kld_p90=_quantile(finite_N, 0.9),
            kld_p99=_quantile(finite_N, 0.99),
            kld_max=_quantile(finite_N, 1.0),
            top1=same_top_NP[scored_NP].double().mean().item(),
            nonfinite_tokens=len(kld_N) - len(finite_N),
            window_kld=tuple(window_kld_N.tolist()),
            kld_p999=_quantile(finite_N, 0.999),
            reverse_kld=reverse_NP[scored_NP].mean().item(),
            histogram=_histogram(finite_N),
            position_kld=_over_positions(kld_NP, scored_NP),
        )


def _histogram(values_N: Tensor) -> tuple[int, ...]:
    """How many values lie in front of, between and behind KLD_EDGES."""
    edges = torch.tensor(KLD_EDGES, dtype=values_N.dtype)
    return tuple(torch.bincount(torch.bucketize(values_N, edges), minlength=len(edges) + 1).tolist())


def _over_positions(values_NP: Tensor, scored_NP: Tensor) -> tuple[float, ...]:
    """Means of the scored values of POSITIONS stretches of the windows, as equal as can be (fewer, where a window has
    no more predictions); not a number for one without."""
    count = min(POSITIONS, values_NP.shape[1])
    stretches = zip(values_NP.tensor_split(count, dim=1), scored_NP.tensor_split(count, dim=1), strict=True)
    return tuple(values[scored].mean().item() for values, scored in stretches)


def _quantile(values_N: Tensor, q: float) -> float:
    return values_N.quantile(q).item() if len(values_N) else math.nan


def body_tokens(device_type: str, *, by_blocks: bool) -> int:
    """How many go through the decoder at once, unless a window is longer."""
    return CACHED_TOKENS if device_type == "cpu" and not by_blocks else BODY_TOKENS


def head_tokens(model: PreTrainedModel) -> int:
    """Whose logits are held at once: as many as HEAD_LOGITS has room for, in whole blocks of products."""
    tokens = HEAD_LOGITS // model.config.get_text_config().vocab_size
    return max(1, tokens if tokens < 32 else tokens // 32 * 32)


@torch.inference_mode()
def score(
    model: PreTrainedModel,
    tokens_NT: Tensor,
    reference: Path | None = None,
    keep: Path | None = None,
    progress: Progress = silent,
    articles: Articles | None = None,
    name: str = "score",
) -> Losses:
    """Score windows [N, L]. `reference` is a file of the reference's states to diverge from, `keep` one to write them
    to. With `articles` (one entry per window) losses are summed by article and divided by its words. `progress` counts
    windows, and hears the protocol's `name`."""
    device = next(model.parameters()).device
    count, length = tokens_NT.shape
    losses_NP: list[Tensor] = []
    done = 0
    divergence = _Diverging() if reference else None
    kept: dict[str, list[Tensor]] = {"states": [], "top": []}
    chunk = head_tokens(model)
    at_once = body_tokens(device.type, by_blocks=pages_of(model) is not None)
    head = head_of(model)
    for batch_BT in tokens_NT.to(device).split(max(1, at_once // length)):
        hidden_NH = hidden_states(model, batch_BT[:, :-1] if articles else batch_BT, length)
        target_N = batch_BT[:, 1:].reshape(-1)
        known = _read_states(reference, done * (length - 1), len(target_N), hidden_NH) if reference else None
        nll_N = []
        for start in range(0, len(target_N), chunk):
            part = slice(start, start + chunk)
            logits_NV = head(hidden_NH[part])
            found = compare(logits_NV, head(known[0][part]) if known else None)
            nll_N.append(found.lse_N - logits_NV.gather(1, target_N[part, None]).squeeze(1).double().cpu())
            if divergence is not None and known is not None:
                divergence.add(found, known[1][part], logits_NV)
            if keep is not None:
                kept["top"].append(found.first_N)
        losses_NP.append(torch.cat(nll_N).view(len(batch_BT), length - 1))
        done += len(batch_BT)
        if keep is not None:
            kept["states"].append(hidden_NH.cpu())
        progress(name, done, count)
    if keep is not None:
        save_tensors(keep, {name: torch.cat(parts) for name, parts in kept.items()})
    nll_NP = torch.cat(losses_NP)
    scored_NP = articles.scored_NP if articles else torch.ones_like(nll_NP, dtype=torch.bool)
    diverged = divergence.summary(scored_NP) if divergence else None
    if articles is None:
        return Losses(tuple(nll_NP.mean(dim=1).tolist()), nll_NP.numel(), diverged)
    sums_N = torch.where(scored_NP, nll_NP, 0.0).sum(dim=1)
    words_A = articles.words_A.double()
    per_word_A = torch.zeros_like(words_A).index_add_(0, articles.article_N, sums_N) / words_A
    return Losses(tuple(per_word_A.tolist()), int(scored_NP.sum()), diverged, tuple(words_A.tolist()))


@torch.inference_mode()
def noise_floor(
    model: PreTrainedModel, tokens_NT: Tensor, reference: Path, articles: Articles | None = None
) -> Divergence:
    """Divergence of the reference from itself under one rounding unit of noise, on the first NOISE_WINDOWS windows."""
    generator = torch.Generator().manual_seed(0)

    def disturb(module: nn.Module, args: Any, out: Any) -> Any:
        states = states_of(out)
        noise = torch.rand(states.shape, generator=generator).mul_(2 * NOISE_UNIT).sub_(NOISE_UNIT)
        return in_place_of_states(out, states * (1 + noise.to(states)))

    hooks = [block.register_forward_hook(disturb) for block in decoder_blocks(model)[1]]
    try:
        first = articles and replace(
            articles, scored_NP=articles.scored_NP[:NOISE_WINDOWS], article_N=articles.article_N[:NOISE_WINDOWS]
        )
        floor = score(model, tokens_NT[:NOISE_WINDOWS], reference, articles=first).divergence
        assert floor is not None
        return floor
    finally:
        for hook in hooks:
            hook.remove()


@torch.no_grad()
def first_nonfinite(model: PreTrainedModel, tokens_T: Tensor) -> str:
    """The first module, in the order they end, of whose output on a window a number is not finite; "" for none."""
    found: list[str] = []

    def look(name: str, module: nn.Module, args: Any, out: Any) -> None:
        tensors = out if isinstance(out, tuple | list) else (out,)
        if not found and any(isinstance(t, Tensor) and not bool(torch.isfinite(t).all()) for t in tensors):
            found.append(name)

    hooks = [module.register_forward_hook(partial(look, name)) for name, module in model.named_modules() if name]
    try:
        model(input_ids=tokens_T[None].to(next(model.parameters()).device), use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return found[0] if found else ""


def _read_states(file: Path, first: int, count: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """(states [count, H], first-ranked token of each [count]) on the device and in the dtype of `like`."""
    with safe_open(file, framework="pt") as handle:
        states, top = (handle.get_slice(name)[first : first + count] for name in ("states", "top"))
    return states.to(like), top.to(like.device)
