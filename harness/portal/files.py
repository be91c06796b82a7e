"""Which files of a folder are a checkpoint of another program, and what it says of itself: what needs no torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from harness.data.assets import ResolvedModel
from harness.data.checkpoint import CONFIG, INDEX, remembered_sha256
from harness.data.files import digest
from harness.progress import first_line

OLDER_CONFIG = "quantize_config.json"  # where AutoGPTQ keeps what is `quantization_config` now


def files_of(path: Path) -> list[Path]:
    """The files that are the checkpoint. Raises ValueError where there are none that may be opened."""
    if path.suffix == ".gguf" and path.is_file():
        return [path]
    if not path.is_dir():
        raise ValueError(f"no checkpoint {path}: give a folder with safetensors, or a .gguf file")
    weights = sorted(path.glob("*.safetensors"))
    if not weights:
        found = next((file for pattern in ("*.gguf", "*.bin", "*.pt", "*.pth") for file in path.glob(pattern)), None)
        if found is not None and found.suffix == ".gguf":
            raise ValueError(f"{path} is a folder: write --model-cell {found}")
        if found is not None:
            convert = f"AutoModelForCausalLM.from_pretrained('{path}').save_pretrained('{path}-safetensors')"
            raise ValueError(
                f"{found} is a pickle, which runs code when it is opened: convert it where you trust it, with "
                f'python -c "from transformers import AutoModelForCausalLM; {convert}"'
            )
        raise ValueError(f"{path} holds no *.safetensors: give a folder that save_pretrained() wrote")
    beside = [path / name for name in (CONFIG, OLDER_CONFIG, INDEX) if (path / name).is_file()]
    if path / CONFIG not in beside:
        raise ValueError(f"{path} holds no {CONFIG}: copy that of the model it was made of there")
    return [*beside, *weights]


def resolve(text: str) -> ResolvedModel:
    """A checkpoint and the identity its row is kept under. Raises ValueError as `files_of` does."""
    path = Path(text).expanduser()
    files = files_of(path)
    return ResolvedModel(path.resolve().name, path, digest([[f.name, remembered_sha256(f)] for f in files]))


def quantization_of(path: Path) -> dict[str, Any]:
    """What the checkpoint says of its own quantisation; empty where it says nothing."""
    try:
        config = json.loads((path / CONFIG).read_text(encoding="utf-8"))
        found = config.get("quantization_config")
        if found is None and (path / OLDER_CONFIG).is_file():
            found = {"quant_method": "gptq", **json.loads((path / OLDER_CONFIG).read_text(encoding="utf-8"))}
    except (ValueError, AttributeError, TypeError) as error:
        raise ValueError(f"{path / CONFIG} is no configuration ({first_line(error)}): copy it again") from None
    return dict(found or {})
