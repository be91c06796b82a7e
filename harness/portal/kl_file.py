"""llama.cpp's file of a model's log-probabilities: what its `llama-perplexity --kl-divergence-base` writes and reads.

With it a model that llama.cpp runs and a cell are compared on the same tokens, whoever of the two is the reference.

    "_logits_"                         8 bytes
    n_ctx, n_vocab, n_chunk            int32 each
    tokens                             int32 [n_chunk, n_ctx]
    for every chunk, every position from n_ctx // 2 to n_ctx - 2:
        scale, lowest                  fp32: a log-probability is scale * number + lowest
        numbers                        uint16 [n_vocab], one more where that is odd

A position's numbers predict the token behind it: the second half of a chunk, less what would predict the next one.
Models whose tokenizer puts a token in front of every text are run with it in the place of each chunk's first one, which
the file keeps as it was in the text. Log-probabilities more than 16 nats below the largest are rounded up to it, and in
a divergence those below -16 count as nothing; all else is rounded to 2**-16 of the range. (From the source of
llama.cpp's tools/perplexity.)"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from harness.data.files import atomic_path
from harness.model.head import head_of, hidden_states
from harness.progress import Progress, silent

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

MAGIC = b"_logits_"
RANGE = 16.0  # nats below the most likely token that are kept
LEVELS = 65535.0
HEAD_TOKENS = 256  # whose logits are held at once


@dataclass(frozen=True)
class Agreement:
    """KL(base || model) over the predictions of a file, in nats, with the perplexities of both."""

    kld: float
    stderr: float
    ppl: float
    base_ppl: float
    top1: float  # share of predictions whose most likely token is the base's
    predictions: int


def first_scored(context: int) -> int:
    return context // 2


@torch.inference_mode()
def write(
    model: PreTrainedModel, tokens_NT: Tensor, path: Path, bos: int | None = None, progress: Progress = silent
) -> None:
    """The log-probabilities of windows of T tokens, whole or not at all; `bos` takes the place of every first token."""
    count, context = tokens_NT.shape
    vocabulary = model.config.get_text_config().vocab_size
    with atomic_path(path) as temporary, open(temporary, "wb") as out:
        out.write(MAGIC + struct.pack("<iii", context, vocabulary, count))
        out.write(tokens_NT.to(torch.int32).contiguous().numpy().tobytes())
        for index in range(count):
            for logits_NV in _logits(model, tokens_NT[index], bos):
                out.write(rounded(logits_NV).tobytes())
            progress("write", index + 1, count)


def beginning(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The token that every text begins with, where there is one."""
    tokens = tokenizer("a").input_ids
    return tokens[0] if tokens and tokens[0] == tokenizer.bos_token_id else None


def _logits(model: PreTrainedModel, tokens_T: Tensor, bos: int | None) -> Iterator[Tensor]:
    """Logits of the scored positions of a window, fp32, a few at a time."""
    context = len(tokens_T)
    if bos is not None:
        tokens_T = torch.cat([torch.tensor([bos]), tokens_T[1:]])
    device = next(model.parameters()).device
    hidden_NH = hidden_states(model, tokens_T[None].to(device), context)[first_scored(context) :]
    head = head_of(model)
    for part_NH in hidden_NH.split(HEAD_TOKENS):
        yield head(part_NH).cpu()


def rounded(logits_NV: Tensor) -> np.ndarray:
    """What the file holds of logits: uint16 [N, 4 + V], V made even."""
    highest_N1 = logits_NV.amax(dim=1, keepdim=True)
    lowest_N1 = torch.maximum(logits_NV.amin(dim=1, keepdim=True), highest_N1 - RANGE)
    lse_N1 = (logits_NV - highest_N1).double().exp().sum(dim=1, keepdim=True).log().float()
    scale_N1 = (highest_N1 - lowest_N1) / LEVELS
    inverse_N1 = torch.where(scale_N1 > 0, 1 / scale_N1, 0.0)
    number_NV = ((logits_NV - lowest_N1).clamp_min_(0) * inverse_N1).round_().clamp_max_(LEVELS)
    rows, vocabulary = logits_NV.shape
    found = np.zeros((rows, 4 + vocabulary + vocabulary % 2), dtype=np.uint16)
    head_N2 = torch.cat([scale_N1, lowest_N1 - highest_N1 - lse_N1], dim=1)
    found[:, :4] = head_N2.contiguous().numpy().view(np.uint16)
    found[:, 4 : 4 + vocabulary] = number_NV.numpy().astype(np.uint16)
    return found


@dataclass(frozen=True)
class Base:
    """A file of log-probabilities."""

    path: Path
    context: int
    vocabulary: int
    tokens_NT: Tensor  # int64

    @classmethod
    def open(cls, path: Path) -> Base:
        """Raises ValueError for what is no such file, or is cut off."""
        with open(path, "rb") as file:
            head = file.read(20)
            if head[:8] != MAGIC or len(head) < 20:
                raise ValueError(f"{path} is no file of llama-perplexity --kl-divergence-base")
            context, vocabulary, count = struct.unpack("<iii", head[8:])
            tokens = np.frombuffer(file.read(4 * context * count), dtype="<i4")
        found = cls(path, context, vocabulary, torch.empty(0))
        size = 20 + 4 * context * count + 2 * count * found.predictions * found.row
        if min(context, vocabulary, count) < 1 or path.stat().st_size != size:
            raise ValueError(f"{path} has {path.stat().st_size} bytes where {size} belong: it is cut off")
        return cls(path, context, vocabulary, torch.from_numpy(tokens.astype(np.int64)).view(count, context))

    @property
    def predictions(self) -> int:
        """Of a window."""
        return self.context - 1 - first_scored(self.context)

    @property
    def row(self) -> int:
        """uint16 of a prediction."""
        return 4 + self.vocabulary + self.vocabulary % 2

    def log_probabilities(self, window: int) -> Tensor:
        """Of the predictions of a window, fp32 [P, V]."""
        tokens = self.tokens_NT
        offset = 20 + 4 * tokens.numel() + 2 * window * self.predictions * self.row
        rows = np.fromfile(self.path, dtype="<u2", count=self.predictions * self.row, offset=offset)
        rows = rows.reshape(self.predictions, self.row)
        head = torch.from_numpy(np.ascontiguousarray(rows[:, :4]).view(np.float32).copy())
        number_PV = torch.from_numpy(rows[:, 4 : 4 + self.vocabulary].astype(np.float32))
        return number_PV.mul_(head[:, :1]).add_(head[:, 1:])


@torch.inference_mode()
def compare(model: PreTrainedModel, base: Base, bos: int | None = None, progress: Progress = silent) -> Agreement:
    """The divergence of a model from the one that a file is of, as llama.cpp sums it; `bos` takes the place of every
    window's first token. Raises ValueError for a file of another vocabulary."""
    vocabulary = model.config.get_text_config().vocab_size
    if vocabulary != base.vocabulary:
        raise ValueError(
            f"{base.path} has a vocabulary of {base.vocabulary}, the model of {vocabulary}: not the same model"
        )
    kld, nll, base_nll, same = [], [], [], []
    for index, tokens_T in enumerate(base.tokens_NT):
        base_PV = base.log_probabilities(index)
        logits_PV = torch.cat(list(_logits(model, tokens_T, bos)))
        own_PV = logits_PV - logits_PV.logsumexp(dim=1, keepdim=True)
        term_PV = base_PV.exp() * (base_PV - own_PV)
        kld.append(torch.where(base_PV > -RANGE, term_PV, 0.0).double().sum(dim=1))
        target_P1 = tokens_T[first_scored(base.context) + 1 :, None]
        nll.append(-own_PV.gather(1, target_P1).double())
        base_nll.append(-base_PV.gather(1, target_P1).double())
        same.append(own_PV.argmax(dim=1) == base_PV.argmax(dim=1))
        progress("compare", index + 1, len(base.tokens_NT))
    kld_N = torch.cat(kld)
    return Agreement(
        kld=kld_N.mean().item(),
        stderr=kld_N.std().item() / math.sqrt(len(kld_N)),
        ppl=math.exp(torch.cat(nll).mean().item()),
        base_ppl=math.exp(torch.cat(base_nll).mean().item()),
        top1=torch.cat(same).double().mean().item(),
        predictions=len(kld_N),
    )
