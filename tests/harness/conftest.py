"""Fixtures of the harness's tests: caches with the assets of the user's own, cells that many tests read, a lock of
their own."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from harness.data.assets import DEFAULT_MODEL, TEXTS, ResolvedModel, fetch, resolve_model
from harness.data.files import CACHE_VARIABLE, cache_dir, locked
from harness.measure import machine
from kernels.cpu import build
from tests.helpers import SMALL, linked_cache, linked_cells, run_harness


@pytest.fixture(scope="session", autouse=True)
def _own_lock(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """No test asserts on a time: those that measure need not wait for those that work."""
    lock = tmp_path_factory.mktemp("lock") / "machine.lock"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(machine, "lock_path", lambda: lock)
        yield


@pytest.fixture(scope="session")
def assets_cache(session_folder: Path) -> Path:
    """The user's own cache, filled: what tests share and never write results to."""
    resolve_model(DEFAULT_MODEL)
    for file in TEXTS.values():
        fetch(file)
    with locked(session_folder / "kernels", "the kernels"):  # two workers would compile the same library
        build.library()
    return cache_dir().resolve()


@pytest.fixture(scope="session")
def estimates(session_folder: Path) -> Path:
    """What cells measure of a model before they compress it, and the texts they cut: made once a session."""
    return session_folder / "estimates"


@pytest.fixture
def cache(assets_cache: Path, estimates: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache without results."""
    folder = linked_cache(assets_cache, tmp_path / "cache", estimates)
    monkeypatch.setenv(CACHE_VARIABLE, str(folder))
    return folder


@pytest.fixture(scope="session")
def finished(truncated: ResolvedModel, assets_cache: Path, estimates: Path, session_folder: Path) -> Path:
    """A folder with the leaderboard (out) of four small cells and their reference, and the cache they are in (cache):
    run once a session, to be read."""
    folder = session_folder / "finished"
    with locked(folder, folder.name):
        if not (folder / "out" / "leaderboard.csv").exists():
            cache = linked_cache(assets_cache, folder / "cache", estimates)
            arguments = ("--model", str(truncated.path), "--methods", "rtn,gptq", "--bits", "2.25,3.25", *SMALL)
            done = run_harness("run", *arguments, "--out", str(folder / "out"), HARNESS_CACHE=str(cache))
            assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture
def finished_cache(finished: Path, cache: Path) -> Path:
    """A cache of a test's own that holds the finished cells."""
    return linked_cells(finished / "cache", cache)
