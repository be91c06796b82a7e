"""Fixtures on the real model and the real texts. Everything heavy is made once a session, for all its workers.

Imports that take seconds are inside the fixtures: the process that hands tests to the workers reads this file too, and
needs none of them."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

    from harness.data.assets import ResolvedModel

FIRST_TOKENS = 8192  # of the default model's, for models of few blocks: its head is as large as eight blocks

# Files that take longest, and keep processes of their own busy: begun last, they would run while a worker idles.
LONGEST = (
    "test_regression.py",
    "test_paging.py",
    "test_api.py",
    "test_training.py",
    "test_shell_lines.py",
    "test_tables.py",
    "test_local.py",
    "test_measurement.py",
    "test_loop.py",
    "test_endings.py",
    "test_ray.py",
    "test_architectures.py",
    "test_texts.py",
    "test_damage.py",
    "test_pair.py",
    "test_zero_shot.py",
    "test_slurm.py",
    "test_python_blocks.py",
    "test_sensitivity.py",
    "test_formats.py",
    "test_browser.py",
    "test_triton.py",
    "test_run.py",
    "test_wheel.py",
    "test_example_method.py",
    "test_act_bits.py",
    "test_qllm.py",
    "test_hf.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    rank = {name: position for position, name in enumerate(LONGEST)}
    items.sort(key=lambda item: rank.get(item.path.name, len(rank)))


@pytest.fixture(scope="session", autouse=True)
def _threads() -> None:
    """One thread: there is a worker for every core, and threads that wait for each other cost more than they save."""
    import torch

    torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def _small_cache() -> None:
    """What is timed here is timed to see that it is: pushing weights out of a cache of hundreds of megabytes would be
    most of it."""
    os.environ.setdefault("HARNESS_LAST_CACHE", "4")


@pytest.fixture(scope="session")
def session_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One folder for all workers of this session. Who fills a part of it holds a lock, so that others wait and read."""
    own = tmp_path_factory.getbasetemp()
    folder = (own.parent if "PYTEST_XDIST_WORKER" in os.environ else own) / "session"
    folder.mkdir(exist_ok=True)
    return folder


@pytest.fixture(scope="session")
def model() -> ResolvedModel:
    """The default model: a real trained one."""
    from harness.data.assets import DEFAULT_MODEL, resolve_model

    return resolve_model(DEFAULT_MODEL)


@pytest.fixture(scope="session")
def weights(model: ResolvedModel) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(model.path / "model.safetensors")


@pytest.fixture(scope="session")
def tokenizer(model: ResolvedModel) -> PreTrainedTokenizerBase:
    from harness.data.checkpoint import load_tokenizer

    return load_tokenizer(model.path)


@pytest.fixture(scope="session")
def truncated(model: ResolvedModel, session_folder: Path) -> ResolvedModel:
    """The first three blocks of the default model and the sixth of its vocabulary that was merged first, as a local
    folder: real weights at a twentieth of the time."""
    return _first_blocks(model, 3, session_folder / "smollm2-3-blocks")


@pytest.fixture(scope="session")
def short_tokenizer(truncated: ResolvedModel) -> PreTrainedTokenizerBase:
    """That of the first blocks, however many."""
    from harness.data.checkpoint import load_tokenizer

    return load_tokenizer(truncated.path)


@pytest.fixture(scope="session")
def two_blocks(model: ResolvedModel, session_folder: Path) -> ResolvedModel:
    """The first two blocks: for what needs a block behind a packed one, and no more."""
    return _first_blocks(model, 2, session_folder / "smollm2-2-blocks")


@pytest.fixture(scope="session")
def four_blocks(model: ResolvedModel, session_folder: Path) -> ResolvedModel:
    """The first four: for what is asked of blocks none of which is the last."""
    return _first_blocks(model, 4, session_folder / "smollm2-4-blocks")


@pytest.fixture(scope="session")
def six_blocks(model: ResolvedModel, session_folder: Path) -> ResolvedModel:
    """The first six: for what adds up from block to block."""
    return _first_blocks(model, 6, session_folder / "smollm2-6-blocks")


def _first_blocks(model: ResolvedModel, blocks: int, folder: Path) -> ResolvedModel:
    import torch
    from safetensors.torch import load_file
    from transformers import AutoConfig, AutoModelForCausalLM

    from harness.data.assets import resolve_model
    from harness.data.files import locked
    from tests.helpers import copy_tokenizer

    with locked(folder, folder.name):
        if not (folder / "model.safetensors").exists():
            config = AutoConfig.from_pretrained(model.path)
            config.num_hidden_layers, config.vocab_size = blocks, FIRST_TOKENS
            small = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
            tensors = load_file(model.path / "model.safetensors")
            tensors["model.embed_tokens.weight"] = tensors["model.embed_tokens.weight"][:FIRST_TOKENS]
            missing, _ = small.load_state_dict(tensors, strict=False)
            assert missing == ["lm_head.weight"], missing  # tied to the embedding
            copy_tokenizer(model.path, folder, FIRST_TOKENS)
            small.save_pretrained(folder)
        return resolve_model(str(folder))


@pytest.fixture(scope="session")
def tiny(model: ResolvedModel, session_folder: Path) -> Path:
    """A folder with a random model of two narrow blocks that reads bytes: for what is the same on any model."""
    return _random_blocks(model, session_folder / "tiny", width=64)


@pytest.fixture(scope="session")
def narrow(model: ResolvedModel, session_folder: Path) -> Path:
    """The same of blocks that are wide enough for every method and format."""
    return _random_blocks(model, session_folder / "narrow", width=128)


def _random_blocks(model: ResolvedModel, folder: Path, width: int) -> Path:
    import torch
    from transformers import AutoModelForCausalLM

    from harness.data.files import locked
    from harness.model import read_config
    from tests.helpers import byte_tokenizer

    with locked(folder, folder.name):
        if not (folder / "model.safetensors").exists():
            tokenizer = byte_tokenizer()
            tokenizer.save_pretrained(folder)
            config = read_config(model.path)
            sizes = {"num_hidden_layers": 2, "hidden_size": width, "intermediate_size": 2 * width, "head_dim": 32}
            config.update({**sizes, "num_attention_heads": width // 32, "num_key_value_heads": width // 64})
            config.update({"vocab_size": len(tokenizer), "bos_token_id": 256, "eos_token_id": 256, "pad_token_id": 256})
            torch.manual_seed(0)
            AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    return folder
