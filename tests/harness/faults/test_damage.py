"""A truncated or flipped byte in any file of the cache: the piece is named and made again, and no number changes."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
import torch

from harness.cli import main
from harness.data import assets
from harness.data.assets import DEFAULT_MODEL, resolve_model
from harness.data.sealed import Damaged, load_tensors, read_sealed, save_tensors, write_sealed
from harness.report.baseline import read_rows
from kernels.cpu import build
from tests.helpers import linked_cache, run_harness, steady

METHODS = "rtn,gptvq"
SHORT = ("--calibration", "c4-mini@64x4", "--protocols", "wiki-mini@64/4", "--no-bench")
# Groups of files of which each is looked at by the next run, whatever else of the group is damaged. Estimates are
# looked at by cells that have to be compressed.
ROUNDS = {
    "estimates": ("streams/*", "sensitivities/*.safetensors", "costs/*.json"),
    "tensors": ("cells/{rtn}/packed.safetensors", "cells/{gptvq}/artifact.json", "cells/{fp16}/score_*"),
    "rest": ("cells/{rtn}/rest.safetensors", "cells/{gptvq}/packed.json", "cells/{fp16}/config.json"),
    "scores": ("cells/{rtn}/score_*", "cells/{gptvq}/score_*", "cells/{fp16}/states_*"),
}


def _truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size * 2 // 3)


def _flip(path: Path) -> None:
    """One bit in the middle, with the times of before."""
    before = path.stat()
    content = bytearray(path.read_bytes())
    content[len(content) * 2 // 3] ^= 4
    path.write_bytes(content)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


@pytest.fixture(scope="session")
def undisturbed(tiny, assets_cache, session_folder):
    """(cache, rows) of a run of which nothing is lost. Nothing in it is linked to another cache but the assets."""
    folder = session_folder / f"undisturbed-{os.getpid()}"
    cache = linked_cache(assets_cache, folder / "cache")
    done = _run(tiny, cache, folder / "out")
    assert done.returncode == 0, done.stderr
    return cache, steady(read_rows(folder / "out"))


def _run(tiny: Path, cache: Path, out: Path):
    arguments = ("--model", str(tiny), "--methods", METHODS, *SHORT, "--out", str(out))
    return run_harness("run", *arguments, HARNESS_CACHE=str(cache))


@pytest.mark.parametrize("damage", [_truncate, _flip])
@pytest.mark.parametrize("group", ROUNDS)
def test_what_is_damaged_is_named_and_made_again(group, damage, undisturbed, tiny, tmp_path):
    source, rows = undisturbed
    cache = tmp_path / "cache"
    shutil.copytree(source, cache, symlinks=True)
    keys = {row["method"]: row["cell"] for row in rows.values()}
    if group == "estimates":
        for name in ("rtn", "gptvq"):
            shutil.rmtree(cache / "cells" / keys[name])
    files = [path for pattern in ROUNDS[group] for path in cache.glob(pattern.format(**keys))]
    files = [path for path in files if path.suffix != ".lock"]
    assert len(files) >= 3
    for path in files:
        damage(path)
    found = run_harness("verify", HARNESS_CACHE=str(cache))
    assert found.returncode == 1
    done = _run(tiny, cache, tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert steady(read_rows(tmp_path / "out")) == rows
    for path in files:
        assert str(path) in found.stdout and path.name in done.stderr, (path, found.stdout, done.stderr)
    again = run_harness("verify", HARNESS_CACHE=str(cache))
    assert again.returncode == 0, again.stdout


def test_finished_blocks_are_checked_too(tiny, cache, tmp_path, capsys):
    """Killed in the middle of a compression, and the block that was finished damaged."""
    arguments = ["run", "--methods", "reallm", "--model", str(tiny), *SHORT, "--out", str(tmp_path / "out")]
    assert main([*arguments, "--timeout", "600"]) == 0
    whole = steady(read_rows(tmp_path / "out"))
    cell = cache / "cells" / next(row["cell"] for row in whole.values() if row["method"] == "reallm")
    blocks = cell / "blocks"
    for name in ("artifact.json", "packed.json", "packed.safetensors"):
        (cell / name).unlink()
    blocks.mkdir()
    (blocks / "block_0000.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0{}      ")
    capsys.readouterr()
    assert main(arguments) == 0
    errors = capsys.readouterr().err
    assert "block_0000.safetensors has no checksum; it is made again" in errors
    assert steady(read_rows(tmp_path / "out")) == whole


def test_the_copy_of_the_default_model_is_checked(assets_cache, tmp_path, monkeypatch, caplog):
    cache = linked_cache(assets_cache, tmp_path / "cache")
    (cache / "models").unlink()
    shutil.copytree(assets_cache / "models", cache / "models")
    monkeypatch.setenv("HARNESS_CACHE", str(cache))
    before = resolve_model(DEFAULT_MODEL)
    weights = before.path / "model.safetensors"
    weights.chmod(0o600)
    _flip(weights)
    made = []
    monkeypatch.setattr(assets, "_convert", lambda model, target, say: made.append(target))
    resolve_model(DEFAULT_MODEL)
    assert made == [before.path] and f"{before.path} is damaged" in caplog.text


def test_a_truncated_library_is_compiled_again(tmp_path, monkeypatch, caplog):
    source = tmp_path / "source" / "fused.cpp"  # a short one
    source.parent.mkdir()
    source.write_text('extern "C" int one() { return 1; }')
    monkeypatch.setattr(build, "SOURCE", source)
    monkeypatch.setenv("HARNESS_CACHE", str(tmp_path))
    command = (build.SOURCE, build._instructions(), build._compiler())
    path = build._built(*command)
    whole = path.read_bytes()
    _truncate(path)
    assert build._built(*command) == path and path.read_bytes() == whole
    path.chmod(0o777)
    assert build._built(*command) == path and not path.stat().st_mode & 0o022
    path.parent.chmod(0o777)
    with pytest.raises(RuntimeError, match="yours alone"):
        build._built(*command)
    assert "compiled again" in caplog.text


def test_sealed_files_come_back_as_they_were(tmp_path):
    tensors = {"a": torch.arange(6.0).view(2, 3), "b": torch.zeros(0), "c": torch.tensor(True)}
    save_tensors(tmp_path / "t.safetensors", tensors, {"note": "x"})
    found, metadata = load_tensors(tmp_path / "t.safetensors")
    assert metadata == {"note": "x"} and all(torch.equal(found[name], tensor) for name, tensor in tensors.items())
    write_sealed(tmp_path / "t.json", {"x": [1, 2.5, None, float("inf")], "é": "ü"})
    assert read_sealed(tmp_path / "t.json") == {"x": [1, 2.5, None, float("inf")], "é": "ü"}


@pytest.mark.parametrize("name", ["t.safetensors", "t.json"])
def test_every_flipped_byte_is_noticed_or_changes_nothing(name, tmp_path):
    save_tensors(tmp_path / "t.safetensors", {"a": torch.arange(6.0)}, {"note": "x"})
    write_sealed(tmp_path / "t.json", {"x": [1, 2.5], "y": {"z": "text"}})
    path = tmp_path / name

    def read() -> str:
        return str(read_sealed(path) if name == "t.json" else load_tensors(path))

    whole, before = path.read_bytes(), read()
    for position in range(len(whole)):
        for bit in (1, 16, 128):
            content = bytearray(whole)
            content[position] ^= bit
            path.write_bytes(content)
            try:
                assert read() == before
            except Damaged:
                continue
    for length in range(len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(Damaged):
            read()
