"""Fixtures of the harness's tests: caches with the assets of the user's own, and a lock per test."""

from __future__ import annotations

from pathlib import Path

import pytest

from harness.data.assets import DEFAULT_MODEL, TEXTS, fetch, resolve_model
from harness.measure import machine
from harness.store.files import CACHE_VARIABLE, cache_dir
from tests.helpers import linked_cache


@pytest.fixture(scope="session")
def assets_cache() -> Path:
    """The user's own cache, filled: what tests share and never write results to."""
    resolve_model(DEFAULT_MODEL)
    for file in TEXTS.values():
        fetch(file)
    return cache_dir().resolve()


@pytest.fixture
def cache(assets_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = linked_cache(assets_cache, tmp_path / "cache")
    monkeypatch.setenv(CACHE_VARIABLE, str(folder))
    return folder


@pytest.fixture(autouse=True)
def _own_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test asserts on a time: those that measure need not wait for those that work."""
    monkeypatch.setattr(machine, "lock_path", lambda: tmp_path / "machine.lock")
