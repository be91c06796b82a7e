"""Evaluation and calibration protocols: named, versioned, hashed.

`wiki-mini@512`, `c4-mini@512`, `wikitext2@2048`, `wikitext2@2048/20`: text @ context length / number of windows. Without a number
all windows are scored; the mini texts have a number of their own. A number takes every (n // N)-th of a published text's n
windows, and spreads over the whole of a mini text.

Tokens are cut into consecutive windows, the remainder dropped; a window of L tokens scores its last L - 1; perplexity is exp of
the mean over windows of the mean negative log-likelihood (GPTQ's protocol). Two rows may share a column only if they share the
protocol *and* the tokens.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import asdict, dataclass
from typing import Any, Self

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from harness.assets import Say
from harness.files import digest
from harness.texts import PARTS, mini_documents, wikitext2_test

PROTOCOL_VERSION = 1  # part of every result key
SOURCES = (*PARTS, "wikitext2")
MAX_CONTEXT = 1 << 20
MINI_TOKENS = 8000  # the mini texts score at least this many tokens

# sha256 of the windows' token ids, for vocabularies (sha256 of their sorted entries) whose streams were once checked.
_SMOLLM2 = "d59adeae1bb1c383e51bcf30fd8ad05a2b82f7e752f72106f0f94c324cdb44b6"
PINNED_STREAMS: dict[tuple[str, str], str] = {
    ("wiki-mini@512", _SMOLLM2): "cd0ad9ab107a023896d5c3c405a436eb2f28dc4b7413893143a7b61a4ecf3174",
    ("c4-mini@512", _SMOLLM2): "000ea1ccb52c62ffc43d3773ccbff38194754376acc45195080c13f8153e7f40",
    ("wikitext2@2048/20", _SMOLLM2): "23a80a388d04205b30bd33d2426c6b15a906f0dcffa4c4434b209932f1753ea5",
    ("wikitext2@2048", _SMOLLM2): "0d9fcd3556b69838121dcddbe585e60b89fa58f6135893be48159ee95111f92f",
}


class _Named:
    """A frozen dataclass with a name, as JSON: the version and the name go out with the fields and are ignored on the way in."""

    def to_json(self) -> dict[str, Any]:
        return {"version": PROTOCOL_VERSION, "name": self.name, **asdict(self)}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Self:
        return cls(**{key: value for key, value in data.items() if key not in ("version", "name")})


@dataclass(frozen=True)
class Protocol(_Named):
    """`bos` says where a beginning-of-sequence token stands: "text", wherever the tokenizer puts it when it reads the whole
    text once (usually nowhere, or once at the very start), or "window", in front of every window (Gemma needs it)."""

    source: str
    context: int
    windows: int | None  # None: all there are
    bos: str = "text"
    part: str = "evaluation"

    @property
    def name(self) -> str:
        count = f"/{self.windows}" if self.windows and self.windows != _default_windows(self.source, self.context) else ""
        part = "" if self.part == "evaluation" else f":{self.part}"
        return f"{self.source}{part}@{self.context}{count}" + ("+bos" if self.bos == "window" else "")


@dataclass(frozen=True)
class Windows:
    """Token ids [N, L] to score, and the sha256 of their little-endian int32 bytes."""

    tokens_NL: Tensor
    sha256: str

    @property
    def scored_tokens(self) -> int:
        count, length = self.tokens_NL.shape
        return count * (length - 1)


@dataclass(frozen=True)
class Calibration(_Named):
    """What calibrated methods look at: `sequences` windows of `context` tokens from a text's calibration part, chosen by seed."""

    source: str
    context: int
    sequences: int

    @property
    def name(self) -> str:
        return f"{self.source}:calibration@{self.context}x{self.sequences}"


@dataclass(frozen=True)
class Profile:
    protocols: tuple[str, ...]
    calibration: Calibration


PROFILES = {
    "quick": Profile(("wiki-mini@512", "c4-mini@512"), Calibration("c4-mini", 512, 24)),
}


def parse_protocol(text: str, bos: str = "text") -> Protocol:
    match = re.fullmatch(r"([\w-]+)(?::(\w+))?@(\d+)(?:/(\d+))?", text.strip())
    if not match or match[1] not in SOURCES:
        raise ValueError(f"unknown protocol '{text}': write TEXT@CONTEXT or TEXT@CONTEXT/WINDOWS, TEXT one of {', '.join(SOURCES)}")
    source, part, context = match[1], match[2] or "evaluation", int(match[3])
    if part != "evaluation" and part not in PARTS.get(source, ()):
        raise ValueError(f"unknown part '{part}' of {source}")
    if not 2 <= context <= MAX_CONTEXT:
        raise ValueError(f"protocol '{text}': a window holds 2 to {MAX_CONTEXT} tokens")
    windows = int(match[4]) if match[4] else _default_windows(source, context)
    if windows is not None and windows < 1:
        raise ValueError(f"protocol '{text}': at least one window")
    return Protocol(source, context, windows, bos, part)


def _default_windows(source: str, context: int) -> int | None:
    return -(-MINI_TOKENS // (context - 1)) if source in PARTS else None


def evaluation_windows(
    protocol: Protocol, tokenizer: PreTrainedTokenizerBase, data: str | None = None, say: Say = lambda _: None
) -> Windows:
    """Tokenise and cut. Raises ValueError when the text is too short or the stream is not the pinned one."""
    wikitext2 = protocol.source == "wikitext2"
    text = wikitext2_test(data) if wikitext2 else "\n\n".join(mini_documents(protocol.source, protocol.part, say))
    reserved = protocol.bos == "window"
    windows_NL = _cut(_tokenise(text, tokenizer, bos=not reserved), protocol.context - reserved)
    if reserved:
        windows_NL = _prepend_bos(windows_NL, tokenizer)
    if protocol.windows is not None:
        if protocol.windows > len(windows_NL):
            raise ValueError(f"{protocol.name}: the text has only {len(windows_NL)} windows of {protocol.context} tokens")
        stride = len(windows_NL) // protocol.windows
        last = len(windows_NL) - 1 if protocol.source in PARTS else stride * (protocol.windows - 1)
        windows_NL = windows_NL[torch.linspace(0, last, protocol.windows).round().long()]
    if not len(windows_NL):
        raise ValueError(f"{protocol.name}: the text is shorter than one window")
    sha256 = stream_sha256(windows_NL)
    pinned = PINNED_STREAMS.get((protocol.name, vocabulary_sha256(tokenizer)))
    if pinned not in (None, sha256):
        raise ValueError(f"{protocol.name}: token stream {sha256[:16]} is not the pinned {pinned[:16]}; the text or the tokenizer changed")
    return Windows(windows_NL, sha256)


def calibration_windows(
    calibration: Calibration, tokenizer: PreTrainedTokenizerBase, seed: int, bos: str = "text", say: Say = lambda _: None
) -> Windows:
    """Documents in an order drawn by the seed, joined and cut; the first `sequences` windows."""
    documents = mini_documents(calibration.source, "calibration", say)
    order = torch.randperm(len(documents), generator=torch.Generator().manual_seed(seed)).tolist()
    reserved = bos == "window"
    text = "\n\n".join(documents[i] for i in order)
    windows_NL = _cut(_tokenise(text, tokenizer, bos=not reserved), calibration.context - reserved)
    if len(windows_NL) < calibration.sequences:
        raise ValueError(
            f"{calibration.name}: the calibration part holds {len(windows_NL)} windows of {calibration.context} tokens; "
            f"ask for at most that many with --calibration {calibration.source}@{calibration.context}x{len(windows_NL)}"
        )
    windows_NL = windows_NL[: calibration.sequences]
    if reserved:
        windows_NL = _prepend_bos(windows_NL, tokenizer)
    return Windows(windows_NL, stream_sha256(windows_NL))


def parse_calibration(text: str) -> Calibration:
    match = re.fullmatch(r"([\w-]+)@(\d+)x(\d+)", text.strip())
    sources = [name for name, parts in PARTS.items() if "calibration" in parts]
    if not match or match[1] not in sources or not 2 <= int(match[2]) <= MAX_CONTEXT or int(match[3]) < 1:
        raise ValueError(f"unknown calibration '{text}': write TEXT@CONTEXTxSEQUENCES, TEXT one of {', '.join(sources)}")
    return Calibration(match[1], int(match[2]), int(match[3]))


def bos_policy(model_type: str) -> str:
    """Gemma's perplexity is meaningless without a BOS token in every window; everyone else follows the tokenizer."""
    return "window" if model_type.startswith("gemma") else "text"


def _tokenise(text: str, tokenizer: PreTrainedTokenizerBase, bos: bool) -> Tensor:
    limit, tokenizer.model_max_length = tokenizer.model_max_length, 1 << 62  # no warning: the text is cut into windows below
    try:
        return torch.tensor(tokenizer(text, add_special_tokens=bos).input_ids, dtype=torch.long)
    finally:
        tokenizer.model_max_length = limit


def _cut(ids_N: Tensor, length: int) -> Tensor:
    return ids_N[: len(ids_N) // length * length].view(-1, length)


def _prepend_bos(windows_NL: Tensor, tokenizer: PreTrainedTokenizerBase) -> Tensor:
    if tokenizer.bos_token_id is None:
        raise ValueError("this model needs a BOS token in every window, and its tokenizer has none")
    return torch.nn.functional.pad(windows_NL, (1, 0), value=tokenizer.bos_token_id)


def stream_sha256(windows_NL: Tensor) -> str:
    return hashlib.sha256(windows_NL.to(torch.int32).contiguous().numpy().tobytes()).hexdigest()


def vocabulary_sha256(tokenizer: PreTrainedTokenizerBase) -> str:
    return digest(sorted(tokenizer.get_vocab().items()))


def protocol_key(protocol: Protocol) -> str:
    return digest(protocol.to_json())[:16]
