"""A model so small that a run on it takes seconds: faults are the same on it as on a real one."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from harness.data.assets import ResolvedModel


@pytest.fixture(scope="session")
def tiny(model: ResolvedModel, session_folder: Path) -> Path:
    """A folder with a random model of two narrow blocks, and the real tokenizer."""
    import torch
    from transformers import AutoModelForCausalLM

    from harness.data.checkpoint import load_tokenizer
    from harness.data.files import locked
    from harness.model import read_config

    folder = session_folder / "tiny"
    with locked(folder, "the tiny model"):
        if not (folder / "model.safetensors").exists():
            config = read_config(model.path)
            sizes = {"num_hidden_layers": 2, "hidden_size": 64, "intermediate_size": 128, "head_dim": 32}
            config.update({**sizes, "num_attention_heads": 2, "num_key_value_heads": 1})
            torch.manual_seed(0)
            load_tokenizer(model.path).save_pretrained(folder)
            AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    return folder
