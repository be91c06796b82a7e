"""Cutting texts into windows of token ids, each text by the rule of the papers that report it.

wiki-mini, c4-mini   documents joined by a blank line, tokenised as one text, cut into consecutive windows, spread over
                     the text
wikitext2            the same over the whole test set, rows joined by a blank line (GPTQ's datautils)
wikitext2-words      article by article, cleaned up and cut by lm-eval's own functions (task `wikitext`, version 2):
                     every token is predicted once, the first of an article from a prefix token, the last window
                     reaches back for a full context
c4                   for every window a document drawn at random among those of at least L tokens, and a random place in
                     it; the draws are those of Python's generator seeded with 0 (GPTQ's datautils; a document of
                     exactly L tokens, where that code fails, is taken whole)
c4-new               the first 1,100 documents joined by a space, cut into consecutive windows
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from harness.data.files import digest
from harness.data.protocols import PINNED_STREAMS, Calibration, Protocol
from harness.data.texts import c4_documents, mini_documents, wikitext2_pages, wikitext2_test
from harness.progress import Say, say_nothing

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


C4_NEW_DOCUMENTS = 1100
C4_SEED = 0
MAX_DRAWS = 10_000  # documents in a row that are all too short: there is none


@dataclass(frozen=True)
class Articles:
    """Windows of unequal use. `scored_NP` [N, L - 1] marks the predictions that count, `article_N` says whose they are,
    `words_A` how many words each article has."""

    scored_NP: Tensor
    article_N: Tensor
    words_A: Tensor


@dataclass(frozen=True)
class Windows:
    """Token ids [N, L] to score, and the sha256 of their little-endian int32 bytes."""

    tokens_NT: Tensor
    sha256: str
    articles: Articles | None = None  # None: every window scores all it can, and windows weigh the same


def evaluation_windows(
    protocol: Protocol, tokenizer: PreTrainedTokenizerBase, data: str | None = None, say: Say = say_nothing
) -> Windows:
    """Tokenise and cut. Raises ValueError when the text is too short or the stream is not the pinned one."""
    if protocol.source == "wikitext2-words":
        pages = wikitext2_pages(data)
        if len(pages) < (protocol.windows or 1):
            raise ValueError(f"{protocol.name}: the text has only {len(pages)} articles")
        return _articles(protocol, tokenizer, pages[: protocol.windows])
    cutter = _Cutter(tokenizer, protocol.context, protocol.bos)
    wanted = protocol.windows
    if protocol.source == "c4":
        assert wanted is not None
        windows_NT = cutter.crops(c4_documents("validation", data), wanted, random.Random(C4_SEED), protocol.name)
    elif protocol.source == "c4-new":
        windows_NT = cutter.consecutive(" ".join(c4_documents("validation", data)[:C4_NEW_DOCUMENTS]))[:wanted]
    elif protocol.source == "wikitext2":
        windows_NT = _every(cutter.consecutive(wikitext2_test(data)), wanted)
    else:
        windows_NT = _spread(
            cutter.consecutive("\n\n".join(mini_documents(protocol.source, protocol.part, say))), wanted
        )
    if len(windows_NT) < (wanted or 1):
        raise ValueError(f"{protocol.name}: the text has only {len(windows_NT)} windows of {protocol.context} tokens")
    sha256 = stream_sha256(windows_NT)
    pinned = PINNED_STREAMS.get((protocol.name, vocabulary_sha256(tokenizer)))
    if pinned not in (None, sha256):
        raise ValueError(
            f"{protocol.name}: token stream {sha256[:16]} is not the pinned {pinned[:16]}; "
            "the text or the tokenizer changed"
        )
    return Windows(windows_NT, sha256)


def calibration_windows(
    calibration: Calibration,
    tokenizer: PreTrainedTokenizerBase,
    seed: int,
    bos: str = "text",
    data: str | None = None,
    say: Say = say_nothing,
    apart: bool = False,
) -> Windows:
    """c4: random places in random documents of the first training shard, drawn by the seed (GPTQ's calibration). A mini
    text: documents in an order drawn by the seed, joined and cut; the first `sequences` windows. With `apart` those of
    another draw, or the last ones, which are others as long as the text is long enough for both."""
    cutter = _Cutter(tokenizer, calibration.context, bos)
    if calibration.source == "c4":
        windows_NT = cutter.crops(
            c4_documents("train", data),
            calibration.sequences,
            random.Random(f"{seed}, apart" if apart else seed),
            calibration.name,
        )
    else:
        documents = mini_documents(calibration.source, "calibration", say)
        order = torch.randperm(len(documents), generator=torch.Generator().manual_seed(seed)).tolist()
        windows_NT = cutter.consecutive("\n\n".join(documents[i] for i in order))
    if len(windows_NT) < calibration.sequences:
        raise ValueError(
            f"{calibration.name}: the calibration part holds {len(windows_NT)} windows "
            f"of {calibration.context} tokens; ask for at most that many: "
            f"{calibration.source}@{calibration.context}x{len(windows_NT)}"
        )
    windows_NT = windows_NT[-calibration.sequences :] if apart else windows_NT[: calibration.sequences]
    return Windows(windows_NT, stream_sha256(windows_NT))


def _articles(protocol: Protocol, tokenizer: PreTrainedTokenizerBase, pages: Sequence[str]) -> Windows:
    try:
        from lm_eval.tasks.wikitext.preprocess_wikitext import process_results, wikitext_detokenizer
        from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
    except ImportError as error:
        raise ValueError(f"{protocol.name} needs lm-eval ({error}): pip install 'lm-eval>=0.4.9'") from error
    prefix = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    rows, scored, owner, words = [], [], [], []
    for index, page in enumerate(pages):
        ids = _tokenise(tokenizer, wikitext_detokenizer({"page": page}), add_special_tokens=True).tolist()
        for pair in get_rolling_token_windows(ids, prefix, max_seq_len=protocol.context, context_len=1):
            context, continuation = make_disjoint_window(pair)
            width = len(context) + len(continuation)
            # Causal: what follows changes nothing.
            rows.append(context + continuation + [prefix] * (protocol.context + 1 - width))
            scored.append([len(context) <= position < width for position in range(1, protocol.context + 1)])
            owner.append(index)
        words.append(process_results({"page": page}, (0.0,))["word_perplexity"][1])
    tokens_NT, articles = torch.tensor(rows), Articles(torch.tensor(scored), torch.tensor(owner), torch.tensor(words))
    return Windows(tokens_NT, stream_sha256(tokens_NT), articles)


class _Cutter:
    """Windows of `length` tokens; with bos "window" the first of them is the BOS token."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, length: int, bos: str) -> None:
        self.tokenizer, self.reserved = tokenizer, bos == "window"
        if self.reserved and tokenizer.bos_token_id is None:
            raise ValueError("this model needs a BOS token in every window, and its tokenizer has none")
        self.length = length - self.reserved

    def consecutive(self, text: str) -> Tensor:
        """Non-overlapping windows, the remainder dropped."""
        ids_N = _tokenise(self.tokenizer, text, not self.reserved)
        return self._finish(ids_N[: len(ids_N) // self.length * self.length].view(-1, self.length))

    def crops(self, documents: Sequence[str], count: int, source: random.Random, name: str) -> Tensor:
        return self._finish(torch.stack([self._draw(documents, source, name) for _ in range(count)]))

    def _draw(self, documents: Sequence[str], source: random.Random, name: str) -> Tensor:
        """A random place in a random document that is long enough."""
        for _ in range(MAX_DRAWS):
            ids_N = _tokenise(self.tokenizer, documents[source.randint(0, len(documents) - 1)], not self.reserved)
            if len(ids_N) >= self.length:
                start = source.randint(0, len(ids_N) - self.length - 1) if len(ids_N) > self.length else 0
                return ids_N[start : start + self.length]
        raise ValueError(
            f"{name}: {MAX_DRAWS} documents in a row hold fewer than {self.length} tokens; choose a shorter context"
        )

    def _finish(self, windows_NT: Tensor) -> Tensor:
        return (
            torch.nn.functional.pad(windows_NT, (1, 0), value=self.tokenizer.bos_token_id)
            if self.reserved
            else windows_NT
        )


def _tokenise(tokenizer: PreTrainedTokenizerBase, text: str, add_special_tokens: bool) -> Tensor:
    # No warning: the text is cut into windows here.
    limit, tokenizer.model_max_length = (tokenizer.model_max_length, 1 << 62)
    try:
        return torch.tensor(tokenizer(text, add_special_tokens=add_special_tokens).input_ids, dtype=torch.long)
    finally:
        tokenizer.model_max_length = limit


def _every(windows_NT: Tensor, count: int | None) -> Tensor:
    """Every (n // count)-th of n windows."""
    return windows_NT if count is None else windows_NT[:: max(1, len(windows_NT) // count)][:count]


def _spread(windows_NT: Tensor, count: int | None) -> Tensor:
    """From the first to the last, evenly spaced."""
    if count is None or count > len(windows_NT):
        return windows_NT
    return windows_NT[torch.linspace(0, len(windows_NT) - 1, count).round().long()]


def stream_sha256(windows_NT: Tensor) -> str:
    return hashlib.sha256(windows_NT.to(torch.int32).contiguous().numpy().tobytes()).hexdigest()


def vocabulary_sha256(tokenizer: PreTrainedTokenizerBase) -> str:
    return digest(sorted(tokenizer.get_vocab().items()))
