"""Fixtures on the real model and the real texts. Everything heavy is made once a session."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerBase

from harness.data.assets import DEFAULT_MODEL, ResolvedModel, resolve_model
from harness.model import load_tokenizer


@pytest.fixture(scope="session", autouse=True)
def _threads() -> None:
    torch.set_num_threads(
        1
    )  # pytest runs two workers on two cores; threads that wait for each other would cost far more than they save


@pytest.fixture(scope="session")
def model() -> ResolvedModel:
    """The default model: a real trained one."""
    return resolve_model(DEFAULT_MODEL)


@pytest.fixture(scope="session")
def weights(model: ResolvedModel) -> dict[str, torch.Tensor]:
    return load_file(model.path / "model.safetensors")


@pytest.fixture(scope="session")
def tokenizer(model: ResolvedModel) -> PreTrainedTokenizerBase:
    return load_tokenizer(model.path)


@pytest.fixture(scope="session")
def truncated(
    model: ResolvedModel, weights: dict[str, torch.Tensor], tmp_path_factory: pytest.TempPathFactory
) -> ResolvedModel:
    """The first four blocks of the default model, as a local folder: real weights at a seventh of the time."""
    config = AutoConfig.from_pretrained(model.path)
    config.num_hidden_layers = 4
    small = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    missing, _ = small.load_state_dict(weights, strict=False)
    assert missing == ["lm_head.weight"], missing  # tied to the embedding
    folder: Path = tmp_path_factory.mktemp("model") / "smollm2-4-blocks"
    small.save_pretrained(folder)
    load_tokenizer(model.path).save_pretrained(folder)
    return resolve_model(str(folder))
