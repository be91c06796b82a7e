"""Cells of two blocks of the default model that leave in one format or another, made once a session; how they leave,
and how checkpoints come in."""

from __future__ import annotations

import multiprocessing
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from harness.api import _options
from harness.cli.options import build_plan, read_request
from harness.compressed import CompressedModel
from harness.data.files import CACHE_VARIABLE, locked
from harness.engine.cell import run_cell
from harness.engine.process import Speaker
from harness.plan.cells import Plan
from harness.portal import EXPORTS
from harness.portal.cells import StoredCell
from harness.portal.files import resolve
from harness.portal.folder import Request
from harness.portal.incoming import bring_in
from harness.progress import say_nothing, silent
from harness.store.cells import CellStore
from kernels.dispatch import reference_only
from tests.helpers import linked_cache

METHODS = (
    "gptq:bits=3,group=64,offset=zero,static_groups=false",
    "rtn:bits=4,group=32,offset=symmetric",
    "rtn:bits=8,group=32,offset=symmetric",
    "nf:bits=4,block=64",
    "qlora:bits=4,block=64,rank=4",
)
PLANNED = {"calibration": "c4-mini@128x4", "training": "c4-mini@128x4/4", "protocols": "wiki-mini@128/2"}


class _Silent(Speaker):
    """To a parent that is not there."""

    def say(self, message) -> None:
        pass


def run_here(model, methods, **options) -> Plan:
    """Every cell of a run, in this process."""
    given = _options(model.path, methods, 9, {"allocate": "uniform", **PLANNED, **options})
    plan, _, _ = build_plan(given, read_request(given), say_nothing)
    for cell in plan.cells:
        assert not cell.refusal
        speak = _Silent(multiprocessing.Pipe()[0])
        run_cell(cell.spec(plan.protocols, None, plan.reference.key), CellStore(cell.key), Path("nowhere"), speak)
    return plan


def keys_of(plan: Plan) -> dict[str, str]:
    """The key of every cell by its method's text."""
    return {cell.method_text: cell.key for cell in plan.cells}


@pytest.fixture(scope="session")
def outgoing(two_blocks, assets_cache, estimates, session_folder) -> tuple[Path, dict[str, str]]:
    """The cache these cells are in, and their keys."""
    folder = session_folder / "outgoing"
    with locked(folder, folder.name), pytest.MonkeyPatch.context() as patch:
        if not folder.exists():
            linked_cache(assets_cache, folder, estimates)
        patch.setenv(CACHE_VARIABLE, str(folder))
        return folder, keys_of(run_here(two_blocks, METHODS))  # what another worker finished is found


@pytest.fixture
def cell(outgoing, monkeypatch):
    """A cell by its method's text, in a cache that may be written to."""
    folder, keys = outgoing
    monkeypatch.setenv(CACHE_VARIABLE, str(folder))

    def named(method: str) -> StoredCell:
        store = CellStore(keys[method])
        return StoredCell(store, store.artifact())

    return named


def load(cell):
    return CompressedModel.load(cell.store.folder, "cpu", torch.float32)


def logits(model):
    with torch.inference_mode(), reference_only():
        return model(torch.arange(5, 29)[None]).logits


def exported(cell, format, folder, variant="") -> Path:
    EXPORTS.get(format).write(Request(cell, folder, variant or next(iter(EXPORTS.get(format).options), "")))
    return next(folder.glob("*.gguf"), folder)


def imported(path, base):
    found = bring_in(resolve(str(path)), base.path, "float16", silent)
    return found.compressed, found.ledger


def block_bytes(path: Path) -> int:
    """Bytes of all tensors of layers in a file."""
    tensors = load_file(path / "model.safetensors")
    return sum(t.nbytes for name, t in tensors.items() if "_proj." in name)
