"""Token streams, cut once per text and model and kept in the cache: the plan checks them, every cell reads them."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeVar

from harness.data.assets import TEXTS, ResolvedModel
from harness.data.checkpoint import load_tokenizer, remembered_sha256
from harness.data.files import cache_dir, digest
from harness.data.protocols import Calibration, Protocol, Training
from harness.data.sealed import believed, load_tensors, save_tensors
from harness.data.texts import WIKITEXT2_SHA256, c4_file
from harness.data.windows import Articles, Windows, calibration_windows, evaluation_windows, stream_sha256
from harness.progress import Say, say_nothing

# Bump when what is in a file changes; a stream is then cut again.
#   1, 2  tensors under the names of variables
#   3     November 2026: under names of their own
#   4     with a checksum
FILE_VERSION = 4
Named = TypeVar("Named", Protocol, Calibration)

TEXT_SHA256 = {f"{name}-mini": file.sha256 for name, file in TEXTS.items()} | dict.fromkeys(
    ("wikitext2", "wikitext2-words"), WIKITEXT2_SHA256
)


def with_text(named: Named, data: str | None, download: bool = True) -> Named:
    """The same protocol with the checksum of its text, where no checksum is pinned. Raises ValueError when it cannot be
    had."""
    if named.source in TEXT_SHA256:
        return named
    split = "train" if isinstance(named, Calibration) else "validation"
    return replace(named, text_sha256=remembered_sha256(c4_file(split, data, download)))


def evaluation_stream(protocol: Protocol, model: ResolvedModel, data: str | None, say: Say = say_nothing) -> Windows:
    """The windows a protocol scores. Raises ValueError as harness.data.windows.evaluation_windows does."""
    # Another lm-eval may cut its articles differently.
    cutter = (
        importlib.metadata.version("lm_eval") if protocol.source == "wikitext2-words" and find_spec("lm_eval") else None
    )
    key = [protocol.to_json(), TEXT_SHA256.get(protocol.source), model.fingerprint, cutter]
    return _remembered(
        key, model, lambda: evaluation_windows(protocol, load_tokenizer(model.path, model.fingerprint), data, say)
    )


def calibration_stream(
    calibration: Calibration,
    model: ResolvedModel,
    seed: int,
    bos: str,
    data: str | None = None,
    say: Say = say_nothing,
) -> Windows:
    """The windows a calibrated method looks at. Raises ValueError as harness.data.windows.calibration_windows does."""
    return _drawn(calibration, model, seed, bos, data, say, apart=False)


def training_stream(
    training: Training, model: ResolvedModel, seed: int, bos: str, data: str | None = None, say: Say = say_nothing
) -> Windows:
    """The windows that a fine-tuned method is trained on. Raises as `calibration_stream` does."""
    return _drawn(training.windows, model, seed, bos, data, say, training.apart)


def _drawn(
    calibration: Calibration, model: ResolvedModel, seed: int, bos: str, data: str | None, say: Say, apart: bool
) -> Windows:
    key = [calibration.to_json(), TEXT_SHA256.get(calibration.source), model.fingerprint, seed, bos]

    def cut() -> Windows:
        tokenizer = load_tokenizer(model.path, model.fingerprint)
        return calibration_windows(calibration, tokenizer, seed, bos, data, say, apart)

    return _remembered([*key, "apart"] if apart else key, model, cut)


def _remembered(key: Any, model: ResolvedModel, make: Callable[[], Windows]) -> Windows:
    path = cache_dir("streams", digest([FILE_VERSION, key])[:24] + ".safetensors")
    if (kept := believed(path, _read)) is not None:
        return kept
    windows = make()
    model.check()
    tensors = {"tokens": windows.tokens_NT}
    if articles := windows.articles:
        tensors |= {"scored": articles.scored_NP, "article": articles.article_N, "words": articles.words_A}
    save_tensors(path, tensors)
    return windows


def _read(path: Path) -> Windows:
    tensors, _ = load_tensors(path)
    has_articles = "words" in tensors
    articles = Articles(tensors["scored"], tensors["article"], tensors["words"]) if has_articles else None
    return Windows(tensors["tokens"], stream_sha256(tensors["tokens"]), articles)
