"""A checkpoint: which files of its folder are the model, and the identity that results are kept under.

A model is its configuration, its weights in safetensors and its tokenizer: the files listed here, and no others, are
hashed, and a model is loaded through a view that holds these alone. What else lies in the folder (a `.bin`, an adapter,
code) can then neither be loaded nor change a number."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from harness.data.files import cache_dir, digest, file_sha256
from harness.data.sealed import believed, read_sealed, write_sealed

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CONFIG = "config.json"
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
TOKENIZER: tuple[str, ...] = ("tokenizer.*", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
TOKENIZER += ("*.model", "*.tiktoken", "vocab.*", "merges.txt")
RACY_SECONDS = 2.0  # a file this young may change again without a later time


def checkpoint_files(path: Path) -> list[Path]:
    """The files that are the model, by name. Raises ValueError in one line when weights are missing, or elsewhere."""
    if not (path / CONFIG).is_file():
        raise ValueError(f"{path} holds no {CONFIG}: save a model there with save_pretrained()")
    tokenizer = {p for pattern in TOKENIZER for p in path.glob(pattern) if p.is_file() and p.suffix != ".safetensors"}
    return sorted({path / CONFIG, *tokenizer, *weight_files(path)})


def weight_files(path: Path) -> list[Path]:
    """`model.safetensors`, else the index of shards and what it names."""
    if (path / WEIGHTS).is_file():
        return [path / WEIGHTS]
    index = path / INDEX
    if not index.is_file():
        raise ValueError(
            f"{path} holds no {WEIGHTS} and no {INDEX}: convert the weights with save_pretrained() first "
            "(no other file is loaded)"
        )
    try:
        shards = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        raise ValueError(f"{index} is no index of shards: save the model again with save_pretrained()") from None
    for shard in shards:
        if not isinstance(shard, str) or Path(shard).name != shard or not shard.endswith(".safetensors"):
            raise ValueError(f"{index} names {shard!r}, which is no *.safetensors of its own folder: refused")
        if not (path / shard).is_file():
            raise ValueError(f"{path} lacks {shard}, which its {INDEX} names: the weights are incomplete")
    return [index, *(path / shard for shard in shards)]


def fingerprint(path: Path) -> str:
    """sha256 over the names and the content of the model's files. Raises ValueError as checkpoint_files does."""
    return digest([[p.name, remembered_sha256(p)] for p in checkpoint_files(path)])


@contextmanager
def view(path: Path, expected: str = "") -> Iterator[Path]:
    """A folder with the model's files alone. Raises ValueError when one of them changed while it was used, or when they
    are not those of the fingerprint that is `expected`: one that is right before and after says nothing of between."""
    files = checkpoint_files(path)
    before = [_signature(p) for p in files]
    require_unchanged(path, not expected or fingerprint(path) == expected)
    with tempfile.TemporaryDirectory(prefix="ptq-harness-") as folder:
        for file in files:
            (Path(folder) / file.name).symlink_to(file.resolve())
        yield Path(folder)
    require_unchanged(path, files == checkpoint_files(path) and before == [_signature(p) for p in files])


def load_tokenizer(path: Path, expected: str = "") -> PreTrainedTokenizerBase:
    """Raises ValueError where there is none, and as `view` does."""
    from transformers import AutoTokenizer

    with view(path, expected) as files:
        try:
            return AutoTokenizer.from_pretrained(files, local_files_only=True, trust_remote_code=False)
        except Exception as error:  # tokenizer loading raises whatever its backend raises
            raise ValueError(f"{path} holds no tokenizer: save it there with tokenizer.save_pretrained()") from error


def require_unchanged(path: Path, unchanged: bool) -> None:
    if not unchanged:
        raise ValueError(f"{path} changed while it was read: nothing of it is kept; run again once it is complete")


def remembered_sha256(path: Path) -> str:
    """Of a file's content; hashed once as long as its size, its times (that of its last change of any kind, which no
    program can set, among them) and its place on the disk stay."""
    target = path.resolve()
    signature = _signature(target)
    memo = cache_dir("sha256", digest([str(target), *signature])[:32] + ".json")
    if kept := believed(memo, _kept_sha256):
        return kept
    value = file_sha256(target)
    if time.time_ns() - max(signature[-2:]) > RACY_SECONDS * 1e9 and _signature(target) == signature:
        write_sealed(memo, {"path": str(path), "content": value})
    return value


def _kept_sha256(path: Path) -> str:
    return str(read_sealed(path)["content"])


def _signature(path: Path) -> tuple[int, ...]:
    stat = path.stat()
    return stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns
