"""A model is the bytes that are loaded: what changes them changes its identity, what does not is not looked at."""

from __future__ import annotations

import argparse
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from harness.cli.options import add_plan_options, build_plan, read_request
from harness.cli.request import Options
from harness.data import checkpoint
from harness.data.assets import resolve_model
from harness.engine import cell
from harness.model import load_reference
from harness.progress import say_nothing
from harness.store.cells import CellStore
from tests.helpers import SMALL

WEIGHTS = checkpoint.WEIGHTS
ROW = "model.layers.0.mlp.up_proj.weight"


@pytest.fixture
def folder(tiny, tmp_path):
    return shutil.copytree(tiny, tmp_path / "model")


def _changed(path: Path) -> None:
    """Other weights of the same size, with the times of before."""
    before = path.stat()
    tensors = load_file(path)
    tensors[ROW] = tensors[ROW] + 1
    save_file(tensors, path, metadata={"format": "pt"})
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert path.stat().st_size == before.st_size and path.stat().st_mtime_ns == before.st_mtime_ns


def test_other_weights_of_the_same_size_and_time_are_another_model(folder, cache):
    before = checkpoint.fingerprint(folder)
    _changed(folder / WEIGHTS)
    assert checkpoint.fingerprint(folder) != before


def test_what_is_not_loaded_is_not_the_model(folder, cache):
    """A pickle, an adapter that peft would merge, code, other safetensors."""
    before, weight = checkpoint.fingerprint(folder), load_reference(folder, "cpu", torch.float32).state_dict()[ROW]
    torch.save({ROW: weight + 1}, folder / "pytorch_model.bin")
    (folder / "adapter_config.json").write_text(
        json.dumps({"base_model_name_or_path": "/nowhere", "peft_type": "LORA"})
    )
    (folder / "modeling_llama.py").write_text("raise SystemExit('executed')")
    save_file({ROW: weight + 1}, folder / "model-00001-of-00002.safetensors")
    assert checkpoint.fingerprint(folder) == before
    assert torch.equal(load_reference(folder, "cpu", torch.float32).state_dict()[ROW], weight)


def test_an_index_is_part_of_the_model(folder, cache):
    tensors = load_file(folder / WEIGHTS)
    save_file(tensors, folder / "one.safetensors", metadata={"format": "pt"})
    save_file(tensors | {ROW: tensors[ROW] + 1}, folder / "two.safetensors", metadata={"format": "pt"})
    (folder / WEIGHTS).unlink()
    found = {}
    for shard in ("one", "two"):
        index = {"metadata": {}, "weight_map": dict.fromkeys(tensors, f"{shard}.safetensors")}
        (folder / checkpoint.INDEX).write_text(json.dumps(index))
        weight = load_reference(folder, "cpu", torch.float32).state_dict()[ROW]
        found[checkpoint.fingerprint(folder)] = weight
    one, two = found.values()
    assert torch.equal(one + 1, two)


def test_a_folder_that_changes_while_it_is_read_is_refused(folder, cache):
    with pytest.raises(ValueError, match="changed while it was read"):
        with checkpoint.view(folder) as files:
            assert sorted(p.name for p in files.iterdir()) == [p.name for p in checkpoint.checkpoint_files(folder)]
            _changed(folder / WEIGHTS)


def test_a_checkpoint_that_is_replaced_during_a_cell_is_not_stored(folder, cache, monkeypatch):
    parser = argparse.ArgumentParser()
    add_plan_options(parser)
    planned = [argument for argument in SMALL if argument != "--no-bench"]
    asked_for = ["--model", str(folder), "--methods", "fp16", "--device", "cpu", *planned]
    arguments = Options.of(parser.parse_args(asked_for))
    plan, _, model = build_plan(arguments, read_request(arguments), say_nothing)
    spec = plan.reference.spec(plan.protocols, None, plan.reference.key)
    compress = cell.compress_model

    def replaced(*given, **named):
        _changed(folder / WEIGHTS)
        return compress(*given, **named)

    monkeypatch.setattr(cell, "compress_model", replaced)
    store = CellStore(spec.key)
    store.folder.mkdir(parents=True)
    with pytest.raises(ValueError, match="changed while it was read"):
        cell.run_cell(spec, store, folder, lambda *_: None)
    assert store.artifact() is None
    assert resolve_model(str(folder)).fingerprint != model.fingerprint
