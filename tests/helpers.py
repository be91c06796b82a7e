"""What several test files call: a run of the command line in this process, a cache without results, layers alone."""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from harness.cli import main
from harness.plan.budgets import Budget
from harness.plan.cells import Cell, Compute
from harness.report.baseline import Rows
from harness.report.rows import TIME_COLUMNS
from kernels.formats.layer import LayerConfig, LayerSpec
from methods import parse_method
from methods.base import LayerData

# What tests of `run` score on: eight windows of 128 tokens, enough for an interval.
PLANNED = ("--calibration", "c4-mini@128x4", "--protocols", "wiki-mini@128/4,c4-mini@128/4")
SMALL = (*PLANNED, "--no-bench")


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A word for every byte, and one that texts begin and end with: a real vocabulary would be most of a tiny model."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: place for place, letter in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    ends = "<|endoftext|>"
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=ends, eos_token=ends, pad_token=ends)


def copy_tokenizer(source: Path, folder: Path, size: int) -> None:
    """The first tokens of a byte-level BPE: its merges are in the order of their frequency, so they are a tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    described = json.loads((source / "tokenizer.json").read_text())
    bpe = described["model"]
    bpe["vocab"] = {token: place for token, place in bpe["vocab"].items() if place < size}
    bpe["merges"] = [pair for pair in bpe["merges"] if "".join(pair) in bpe["vocab"]]
    (folder / "tokenizer.json").write_text(json.dumps(described))
    for name in ("tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(source / name, folder / name)


def linked_cache(assets: Path, folder: Path, estimates: Path | None = None) -> Path:
    """A cache with the same assets and no results; with `estimates`, a folder that caches share, what cells measure
    before they compress is made once for all of them."""
    folder.mkdir(parents=True)
    links = dict.fromkeys(("files", "models", "sha256", "tasks", "kernels", "scripts"), assets)
    if estimates is not None:
        links |= dict.fromkeys(("streams", "sensitivities", "costs"), estimates)
    for name, source in links.items():
        (source / name).mkdir(parents=True, exist_ok=True)
        (folder / name).symlink_to(source / name)
    return folder


def linked_cells(source: Path, cache: Path) -> Path:
    """`cache` with the cells of another one, as links: files are only ever replaced, never written to."""
    shutil.copytree(source / "cells", cache / "cells", copy_function=os.link)
    return cache


def steady(rows: Rows) -> Rows:
    """A leaderboard's rows less what is measured with a clock."""
    return {label: {k: v for k, v in row.items() if k not in TIME_COLUMNS} for label, row in rows.items()}


def run_harness(*arguments: str, cwd: Path | None = None, **environment: str) -> subprocess.CompletedProcess[str]:
    """`python -m harness ...`, in this process: the cells have processes of their own, and importing torch takes as
    long as a cell."""
    out, errors = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(errors):
        for name, value in environment.items():
            patch.setenv(name, value)
        if cwd is not None:
            patch.chdir(cwd)
        code = main(arguments)
    return subprocess.CompletedProcess(arguments, code, out.getvalue(), errors.getvalue())


def planned_cell(method: str, budget: str, device: str = "cpu", **changes: Any) -> Cell:
    """A cell of no model in particular, for what is predicted of it."""
    given: dict[str, Any] = {"model": None, "calibration": None, "training": None, "seed": 0, "bos": "never"}
    compute = Compute(device, "float32" if device == "cpu" else "float16", 1)
    return Cell(parse_method(method), method, budget=Budget.parse(budget), compute=compute, **given | changes)


def decode_uniform(method: str, weight: torch.Tensor, hessian: torch.Tensor | None, **hyper: object) -> torch.Tensor:
    """What a method that stores uniform grids makes of one matrix, [O, I]: 3 bits in groups of 64 by default."""
    layer = LayerSpec("layer", "layer", *weight.shape, bias=False)
    parsed = parse_method(method)
    values = {"bits": 3, "group": 64, "offset": "symmetric", "permuted": parsed.permuted} | hyper
    return parsed.compress(
        LayerData(weight, hessian_II=hessian), layer, LayerConfig.of("uniform", **values)
    ).packed.decode()


def hessian_of(size: int, tokens: int = 400, seed: int = 0) -> torch.Tensor:
    """Sum of x x^T, [I, I], of correlated inputs with a few loud channels, as in a language model."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(size, size, generator=generator) / size**0.5
    x = (
        torch.randn(tokens, size, generator=generator)
        @ (mix + torch.eye(size))
        * torch.randn(size, generator=generator).exp()
    )
    return x.T @ x
