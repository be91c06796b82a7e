"""Cells of two blocks of the default model that leave in one format or another: run once a session."""

from __future__ import annotations

from pathlib import Path

import pytest

from harness.data.files import CACHE_VARIABLE, locked
from harness.portal.cells import StoredCell, stored_cell
from tests.helpers import linked_cache, run_harness

METHODS = (
    "gptq:bits=3,group=64,offset=zero,static_groups=false,rtn:bits=4,group=32,offset=symmetric,"
    "rtn:bits=8,group=32,offset=symmetric,nf:bits=4,block=64,qlora:bits=4,block=64,rank=4"
)
PLANNED = ("--calibration", "c4-mini@128x4", "--training", "c4-mini@128x4/4", "--protocols", "wiki-mini@128/2")


@pytest.fixture(scope="session")
def outgoing(two_blocks, assets_cache, estimates, session_folder) -> Path:
    """A folder with the table (out) of these cells, and the cache they are in (cache)."""
    folder = session_folder / "outgoing"
    with locked(folder, folder.name):
        if not (folder / "out" / "leaderboard.csv").exists():
            cache = linked_cache(assets_cache, folder / "cache", estimates)
            arguments = ("--model", str(two_blocks.path), "--methods", METHODS, "--bits", "9", "--allocate", "uniform")
            out = ("--no-bench", "--out", str(folder / "out"))
            done = run_harness("run", *arguments, *PLANNED, *out, HARNESS_CACHE=str(cache))
            assert done.returncode == 0, done.stderr + done.stdout
    return folder


@pytest.fixture
def cell(outgoing, monkeypatch):
    """A cell by what its method's text begins with."""
    monkeypatch.setenv(CACHE_VARIABLE, str(outgoing / "cache"))

    def named(method: str) -> StoredCell:
        return stored_cell(str(outgoing / "out"), method)

    return named
