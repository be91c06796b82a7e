"""What several test files call: a run of the command line in this process, a cache without results, layers alone."""

from __future__ import annotations

import io
import subprocess
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pytest
import torch

from harness.cli import main
from kernels.formats.layer import LayerConfig, LayerSpec
from methods import parse_method


def linked_cache(assets: Path, folder: Path) -> Path:
    """A cache with the same assets and no results."""
    folder.mkdir(parents=True)
    (assets / "tasks").mkdir(exist_ok=True)
    for name in ("files", "models", "sha256", "tasks"):
        (folder / name).symlink_to(assets / name)
    return folder


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


def decode_uniform(method: str, weight: torch.Tensor, hessian: torch.Tensor | None, **hyper: object) -> torch.Tensor:
    """What a method that stores uniform grids makes of one matrix, [O, I]: 3 bits in groups of 64 by default."""
    layer = LayerSpec("layer", "layer", *weight.shape, bias=False)
    parsed = parse_method(method)
    values = {"bits": 3, "group": 64, "offset": "symmetric", "permuted": parsed.permuted} | hyper
    return parsed.compress(weight, hessian, layer, LayerConfig.of("uniform", **values), seed=0).packed.decode()


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
