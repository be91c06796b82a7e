from __future__ import annotations

import io
import subprocess
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pytest

from harness.cli import main
from harness.data.assets import DEFAULT_MODEL, TEXTS, fetch, resolve_model
from harness.measure import machine
from harness.store.files import CACHE_VARIABLE, cache_dir


@pytest.fixture(scope="session")
def assets_cache() -> Path:
    """The user's own cache, filled: what tests share and never write results to."""
    resolve_model(DEFAULT_MODEL)
    for file in TEXTS.values():
        fetch(file)
    return cache_dir().resolve()


def linked_cache(assets: Path, folder: Path) -> Path:
    """A cache with the same assets and no results."""
    folder.mkdir(parents=True)
    (assets / "tasks").mkdir(exist_ok=True)
    for name in ("files", "models", "sha256", "tasks"):
        (folder / name).symlink_to(assets / name)
    return folder


@pytest.fixture
def cache(assets_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = linked_cache(assets_cache, tmp_path / "cache")
    monkeypatch.setenv(CACHE_VARIABLE, str(folder))
    return folder


@pytest.fixture(autouse=True)
def _own_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test asserts on a time: those that measure need not wait for those that work."""
    monkeypatch.setattr(machine, "lock_path", lambda: tmp_path / "machine.lock")


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
