"""Log-likelihoods of texts that begin alike: what they share goes through the model once.

The answers to one question form a tree: a trunk of tokens they all begin with, and a branch for each. A tree is one row
of the batch; the attention mask lets a branch see the trunk and itself, and its positions go on from the trunk's, so
every token is computed as if its text stood alone. (Tree attention; Miao et al., SpecInfer, 2023, section 4.2, verify
drafted tokens this way.)

A model that does not follow such a mask is scored text by text (`follows_branches`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from harness.evaluate.score import head_tokens
from harness.model import decoder
from harness.model.head import head_of
from harness.progress import Progress, silent

if TYPE_CHECKING:
    from transformers import PreTrainedModel


BATCH_TOKENS = 4096  # through the decoder at once, padding included
FULL_TOKENS = 512  # a batch of as many may end early, where the next row would be padding for more than an eighth
Scored = tuple[float, bool]  # log-likelihood in nats, and whether every token is the model's first choice


@dataclass(frozen=True)
class Text:
    """Token ids of which the last `count` are scored, given all in front of them; 0 < count < len(tokens)."""

    tokens: tuple[int, ...]
    count: int


@dataclass(frozen=True)
class Tree:
    """Texts laid out in one row: `branch` 0 is the trunk; `rows[i]` are the places whose states predict the scored
    tokens of text i."""

    tokens: list[int]
    positions: list[int]
    branch: list[int]
    rows: list[list[int]]
    targets: list[list[int]]

    @property
    def forked(self) -> bool:
        return self.branch[-1] > 1


def plant(texts: Sequence[Text]) -> Tree:
    """The tree of some texts, at least one."""
    inputs = [text.tokens[:-1] for text in texts]  # the last token predicts none
    trunk = _common(inputs)
    tokens, positions, branch = list(inputs[0][:trunk]), list(range(trunk)), [0] * trunk
    rows = []
    for number, ids in enumerate(inputs, start=1):
        shift = len(tokens) - trunk
        rows.append(
            [place if place < trunk else place + shift for place in range(len(ids) - texts[number - 1].count, len(ids))]
        )
        tokens += ids[trunk:]
        positions += range(trunk, len(ids))
        branch += [number] * (len(ids) - trunk)
    return Tree(tokens, positions, branch, rows, [list(text.tokens[-text.count :]) for text in texts])


def _common(sequences: Sequence[tuple[int, ...]]) -> int:
    """Length of what all begin with."""
    first, last = min(sequences), max(sequences)  # in lexicographic order: what these two share, all do
    return next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), min(len(first), len(last)))


@torch.inference_mode()
def log_likelihoods(
    model: PreTrainedModel, trees: Sequence[Tree], progress: Progress = silent, phase: str = "score"
) -> list[list[Scored]]:
    """The log-likelihood of every text of every tree, in their order. Batches hold trees of about one length, the
    longest first; `progress` counts the tokens of a `phase`."""
    results: list[list[Scored]] = [[] for _ in trees]
    order = sorted(range(len(trees)), key=lambda i: -len(trees[i].tokens))
    done, total = 0, sum(len(tree.tokens) for tree in trees)
    while order:
        longest = len(trees[order[0]].tokens)
        count = max(1, BATCH_TOKENS // longest)
        full = -(-FULL_TOKENS // longest)
        count = next(
            (n for n in range(full, min(count, len(order))) if len(trees[order[n]].tokens) < longest * 7 / 8), count
        )
        batch, order = order[:count], order[count:]
        for i, scored in zip(batch, _batch(model, [trees[i] for i in batch]), strict=True):
            results[i] = scored
        done += sum(len(trees[i].tokens) for i in batch)
        progress(phase, done, total)
    return results


def _batch(model: PreTrainedModel, trees: Sequence[Tree]) -> list[list[Scored]]:
    parameter = next(model.parameters())
    device, length = parameter.device, len(trees[0].tokens)

    def pad(values: list[int], value: int) -> list[int]:
        return values + [value] * (length - len(values))

    tokens_BT = torch.tensor([pad(tree.tokens, 0) for tree in trees], device=device)
    positions_BT = torch.tensor([pad(tree.positions, 0) for tree in trees], device=device)
    mask = None  # padding comes last, where a causal model never looks
    if any(tree.forked for tree in trees):
        mask = _mask(torch.tensor([pad(tree.branch, -1) for tree in trees], device=device), _float_dtype(model))
    hidden_BTH = decoder(model)(
        input_ids=tokens_BT, attention_mask=mask, position_ids=positions_BT, use_cache=False
    ).last_hidden_state
    flat_NH = hidden_BTH.flatten(0, 1)
    places = [index * length + row for index, tree in enumerate(trees) for rows in tree.rows for row in rows]
    targets = [token for tree in trees for tokens in tree.targets for token in tokens]
    counts = [len(rows) for tree in trees for rows in tree.rows]
    nll_P, first_P = _predictions(
        model, flat_NH, torch.tensor(places, device=device), torch.tensor(targets, device=device)
    )
    scored = iter(
        [
            (-nll.sum().item(), bool(first.all()))
            for nll, first in zip(nll_P.split(counts), first_P.split(counts), strict=True)
        ]
    )
    return [[next(scored) for _ in tree.rows] for tree in trees]


def _mask(branch_BT: Tensor, dtype: torch.dtype) -> Tensor:
    """[B, 1, L, L], added to attention scores: 0 where a query (third) sees a key, else the least number. Padding sees
    the trunk."""
    length = branch_BT.shape[1]
    seen_BTT = (branch_BT[:, None, :] == 0) | (branch_BT[:, None, :] == branch_BT[:, :, None])
    seen_BTT &= torch.ones(length, length, dtype=torch.bool, device=branch_BT.device).tril()
    return torch.zeros(seen_BTT.shape, dtype=dtype, device=branch_BT.device).masked_fill_(
        ~seen_BTT, torch.finfo(dtype).min
    )[:, None]


def _predictions(model: PreTrainedModel, flat_NH: Tensor, place_P: Tensor, target_P: Tensor) -> tuple[Tensor, Tensor]:
    """(negative log-likelihood in nats [P], whether it is the first choice [P]) of a target at every place; the head
    runs once for every place that is asked for, a slice of logits at a time."""
    place_N, which_P = place_P.unique(return_inverse=True)
    nll_P = torch.empty(len(place_P), dtype=torch.float64)
    first_P = torch.empty(len(place_P), dtype=torch.bool)
    chunk = head_tokens(model)
    head = head_of(model)
    for start in range(0, len(place_N), chunk):
        logits_NV = head(flat_NH[place_N[start : start + chunk]])
        here_P = (which_P >= start) & (which_P < start + chunk)
        row_N = which_P[here_P] - start
        of_target_N = logits_NV[row_N, target_P[here_P]]
        nll_P[here_P.cpu()] = (logits_NV.logsumexp(dim=-1)[row_N] - of_target_N).double().cpu()
        first_P[here_P.cpu()] = (of_target_N == logits_NV.amax(dim=-1)[row_N]).cpu()
    return nll_P, first_P


def _float_dtype(model: PreTrainedModel) -> torch.dtype:
    return model.get_input_embeddings().weight.dtype


@torch.inference_mode()
def follows_branches(model: PreTrainedModel) -> bool:
    """Whether three texts with one trunk get the log-likelihoods they have alone. Not so where a mask or positions are
    ignored (recurrent layers, relative biases made elsewhere)."""
    vocabulary = model.config.get_text_config().vocab_size
    ids = torch.randint(vocabulary, (32,), generator=torch.Generator().manual_seed(0)).tolist()
    texts = [Text((*ids[:8], *ids[i : i + 8]), 8) for i in (8, 16, 24)]
    # Without a mask: a model that fails here fails, and says why.
    alone = [_batch(model, [plant([text])])[0][0] for text in texts]
    forked = plant(texts)
    try:
        together = _batch(model, [forked])[0]
    # The mask alone is new: one of this form is refused.
    except (RuntimeError, ValueError, TypeError, NotImplementedError):
        return False
    tolerance = 0.01 if _float_dtype(model) == torch.float32 else 1.0  # nats over 8 tokens; a wrong mask is off by many
    return all(abs(a - b) < tolerance for (a, _), (b, _) in zip(together, alone, strict=True))


def longest_tree(model: PreTrainedModel) -> int | None:
    """Positions a mask of branches may span: attention that ends somewhere (a sliding window) would need a mask of its
    own there."""
    config = model.config.get_text_config()
    if getattr(config, "use_sliding_window", True) is False:
        return None
    ends = [getattr(config, name, None) for name in ("sliding_window", "attention_chunk_size")]
    return min((end for end in ends if isinstance(end, int)), default=None)
