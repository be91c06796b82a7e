"""How cells end: told by type, whatever ended them; the others go on, and the same command goes on from there."""

from __future__ import annotations

import logging
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import replace

import psutil
import pytest
import torch

from harness.compress.loop import FALLBACK, _compressed
from harness.data.files import CACHE_VARIABLE
from harness.data.streams import calibration_stream
from harness.engine.process import ended
from harness.evaluate.score import first_nonfinite
from harness.measure import machine
from harness.model import load_reference
from harness.report.baseline import read_rows
from harness.store import lease as leases
from harness.store.cells import CellStore
from harness.store.lease import Holder, lease
from harness.store.records import Ending
from kernels.formats.layer import LayerConfig, LayerSpec
from methods import parse_method
from methods.base import LayerData
from methods.codecs.error_feedback import NotFinite
from tests.helpers import run_harness, steady

SHORT = ("--calibration", "c4-mini@64x4", "--protocols", "wiki-mini@64/4", "--no-bench")


def _raised(error: BaseException) -> BaseException:
    try:
        raise error
    except BaseException as caught:
        return caught


@pytest.mark.parametrize(
    "error, ending, words",
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried"), Ending.OUT_OF_MEMORY, "on the device"),
        (MemoryError(), Ending.OUT_OF_MEMORY, "on the host"),
        (
            RuntimeError("[enforce fail at alloc_cpu.cpp:116] . DefaultCPUAllocator: can't allocate memory"),
            Ending.OUT_OF_MEMORY,
            "on the host",
        ),
        (OSError(12, "Cannot allocate memory", "/x/y"), Ending.OUT_OF_MEMORY, "on the host"),
        (NotFinite("the inputs of layer 3 are not finite"), Ending.NON_FINITE, "layer 3"),
        (OSError(28, "No space left on device", "/x/y"), Ending.FAILED, "/x/y"),
        (KeyError("weight_map"), Ending.CRASHED, r"test_endings\.py:\d+"),
        (RuntimeError("Weights only load failed. Set weights_only=False\nto"), Ending.CRASHED, "RuntimeError"),
    ],
)
def test_what_was_raised_is_told_by_type(error, ending, words):
    said = ended(_raised(error))
    assert said.ending == ending and len(said.error.splitlines()) == 1
    assert re.search(words, said.error)


def test_an_error_for_the_user_is_passed_on_as_it_is(cache, tiny):
    with pytest.raises(ValueError) as caught:
        parse_method("gtpq")
    assert ended(caught.value).ending == Ending.FAILED and "did you mean" in ended(caught.value).error


def test_a_cell_that_takes_too_long_is_one_row(tiny, cache, tmp_path):
    arguments = ("run", "--model", str(tiny), "--methods", "rtn", *SHORT, "--out", str(tmp_path))
    done = run_harness(*arguments, "--timeout", "0.05")
    assert done.returncode == 1 and "--timeout" in done.stderr
    assert {row["status"] for row in read_rows(tmp_path).values()} == {"timeout"}
    assert run_harness(*arguments).returncode == 0


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_told_to_end_a_run_keeps_what_is_finished_and_says_how_to_go_on(number, code, two_blocks, cache, tmp_path):
    typed = [sys.executable, "-m", "harness", "run", "--model", str(two_blocks.path), "--methods", "gptq,gptvq", *SHORT]
    process = subprocess.Popen([*typed, "--out", str(tmp_path / "my out")], stderr=subprocess.PIPE, text=True)
    deadline = time.time() + 120
    while not list(cache.glob("cells/*/artifact.json")) and time.time() < deadline:
        time.sleep(0.02)  # the reference is stored, the others are at work
    family = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == code
    assert "the same command goes on from here" in errors and "Traceback" not in errors
    assert re.search(r"stopped; \d of 3 cells are finished and kept", errors)
    assert errors.splitlines()[-1].strip() == shlex.join(["python", *typed[1:], "--out", str(tmp_path / "my out")])
    assert "SIGKILL" not in errors and "interrupted" in errors
    rows = {row["status"] for row in read_rows(tmp_path / "my out").values()}
    assert "interrupted" in rows and rows <= {"ok", "interrupted"}
    assert not [p for p in family if p.is_running() and p.status() != psutil.STATUS_ZOMBIE and _is_cell(p)]
    assert list(cache.glob("cells/*/artifact.json"))


def _is_cell(process: psutil.Process) -> bool:
    try:
        return "multiprocessing" in " ".join(process.cmdline()) and "resource_tracker" not in " ".join(
            process.cmdline()
        )
    except psutil.Error:
        return False


def test_two_runs_share_a_cell_and_the_second_says_for_whom_it_waits(tiny, cache, tmp_path):
    typed = [sys.executable, "-m", "harness", "run", "--model", str(tiny), "--methods", "rtn", *SHORT]
    environment = os.environ | {CACHE_VARIABLE: str(cache)}
    both = [
        subprocess.Popen([*typed, "--out", str(tmp_path / out)], stderr=subprocess.PIPE, text=True, env=environment)
        for out in ("a", "b")
    ]
    errors = [process.communicate(timeout=300)[1] for process in both]
    assert [process.returncode for process in both] == [0, 0], errors
    assert steady(read_rows(tmp_path / "a")) == steady(read_rows(tmp_path / "b"))
    said = "".join(errors)
    once = all(said.splitlines().count(f"{cell}: compress") == 1 for cell in ("fp16", "rtn 3.25"))
    # Where one comes to a cell that the other has just finished, there is nobody to wait for.
    assert "waiting for process" in said or "found, not repeated" in said or once, said
    assert not list(cache.glob("cells/*.lease"))


@pytest.fixture
def held(tmp_path):
    """(folder, the lease that another process has on it)."""
    me = Holder("elsewhere", "another boot", 1, "0", "theirs")
    me.write(tmp_path / "cell.lease")
    return tmp_path / "cell", me


def test_a_lease_of_a_dead_process_is_free(held, caplog):
    folder, holder = held
    replace(holder, place=leases._place(), pid=2**22 + 1).write(folder.with_name("cell.lease"))
    with lease(folder):
        assert Holder.read(folder.with_name("cell.lease")).pid == os.getpid()
    assert not folder.with_name("cell.lease").exists() and not caplog.text


def test_a_silent_lease_is_taken_over_and_a_beating_one_is_waited_for(held, caplog, monkeypatch):
    folder, _ = held
    monkeypatch.setattr(leases, "STALE_S", 1.0)
    monkeypatch.setattr(leases, "POLL_S", 0.05)
    begin = time.monotonic()
    with caplog.at_level(logging.INFO), lease(folder):
        assert time.monotonic() - begin > 0.5
    assert "waiting for process 1 on elsewhere" in caplog.text and "taken over" in caplog.text


def test_who_lost_a_lease_ends(held, monkeypatch):
    folder, _ = held
    path, ends = folder.with_name("cell.lease"), []
    monkeypatch.setattr(leases, "BEAT_S", 0.01)
    released = leases.threading.Event()

    def end(code: int) -> None:
        ends.append(code)
        released.set()

    leases._beat(path, Holder("here", "", 2, "", "mine"), released, end)
    assert ends == [leases.TAKEN]


def test_the_lock_in_the_temporary_folder_is_never_somebody_else_s_file(tmp_path, monkeypatch):
    victim = tmp_path / "victim"
    victim.write_text("kept")
    link = tmp_path / "ptq-harness.lock"
    link.symlink_to(victim)
    monkeypatch.setattr(machine, "lock_path", lambda: link)
    with pytest.raises(ValueError, match="no lock of ours"), machine.working():
        pass
    link.unlink()
    link.write_text("kept, too")
    with machine.quiet():
        pass
    assert victim.read_text() == "kept" and link.read_text() == "kept, too"


def test_a_hessian_of_no_use_is_a_counted_fallback():
    """Indefinite whatever is added to its diagonal within reason: the layer is packed, and the row says so."""
    method, layer = parse_method("gptq"), LayerSpec("model.layers.0.x", "x", 8, 64, bias=False)
    weight_OI = torch.randn(8, 64, generator=torch.Generator().manual_seed(0))
    hessian_II = torch.full((64, 64), 1e9)
    hessian_II.fill_diagonal_(1.0)
    config = LayerConfig.of("uniform", bits=3, group=64, offset="symmetric", permuted=False)
    found = _compressed(method, LayerData(weight_OI, hessian_II=hessian_II), layer, config)
    plain = method.compress(LayerData(weight_OI, hessian_II=torch.eye(64)), layer, config)
    assert found.report[FALLBACK] == 1 and torch.equal(found.packed.decode(), plain.packed.decode())
    with pytest.raises(NotFinite, match=r"model\.layers\.0\.x"):
        _compressed(method, LayerData(weight_OI, hessian_II=hessian_II * torch.inf), layer, config)


def test_strict_makes_a_fallback_a_failure(tiny, finished_cells, tmp_path):
    arguments = ("run", "--model", str(tiny), "--methods", "rtn", *SHORT)
    store = CellStore(finished_cells)
    artifact = store.artifact()
    store.put_artifact(replace(artifact, fallback_layers=2))
    assert run_harness(*arguments, "--out", str(tmp_path / "a")).returncode == 0
    assert read_rows(tmp_path / "a")["rtn 3.25"]["fallback_layers"] == "2"
    assert run_harness(*arguments, "--out", str(tmp_path / "b"), "--strict").returncode == 1
    row = read_rows(tmp_path / "b")["rtn 3.25"]
    assert row["status"] == "failed" and "--strict" in row["reason"]


@pytest.fixture
def finished_cells(tiny, cache, tmp_path):
    """The key of a finished rtn cell in a cache of the test's own."""
    done = run_harness("run", "--model", str(tiny), "--methods", "rtn", *SHORT, "--out", str(tmp_path / "before"))
    assert done.returncode == 0, done.stderr
    return read_rows(tmp_path / "before")["rtn 3.25"]["cell"]


def test_clean_removes_what_is_asked_for_alone(tiny, finished_cells, cache, tmp_path):
    board = tmp_path / "before"
    (cache / "cells" / "0123456789abcdef").mkdir()
    (cache / "cells" / "0123456789abcdef" / "log.txt").write_text("of a board that is gone")
    assert "0 of 3 cells" in run_harness("clean", "--older-than", "1", "--yes").stdout
    assert "0 of 3 cells" in run_harness("clean", "--larger-than", "1T", "--yes").stdout
    assert "1 of 3 cells" in run_harness("clean", "--keep", str(board)).stdout
    assert run_harness("clean", "--keep", str(board), "--yes").returncode == 0
    assert (cache / "cells" / finished_cells).is_dir() and not (cache / "cells" / "0123456789abcdef").exists()
    assert run_harness("clean", "--larger-than", "0", "--yes").returncode == 0
    assert not [path for path in (cache / "cells").iterdir() if path.is_dir()]


def test_streams_are_of_the_model_that_was_asked_for(truncated, cache):
    """Cut again when the folder's tokenizer is no longer the one the plan saw."""
    from harness.data.protocols import Calibration

    stale = replace(truncated, fingerprint="0" * 64)
    with pytest.raises(ValueError, match="changed while it was read"):
        calibration_stream(Calibration("c4-mini", 64, 2), stale, 0, "text")


def test_losses_that_are_not_finite_name_the_layer(two_blocks):
    model = load_reference(two_blocks.path, "cpu", torch.float32)
    tokens_T = torch.arange(8)
    assert first_nonfinite(model, tokens_T) == ""
    with torch.no_grad():
        model.get_parameter("model.layers.1.mlp.up_proj.weight").fill_(3e38)
    assert first_nonfinite(model, tokens_T) == "model.layers.1.mlp.up_proj"


def test_a_process_of_this_machine_keeps_its_lease_through_a_sleep(tmp_path):
    """Old beats of a living process mean that the machine slept; of a stopped one, that it was stopped."""
    sleeper = subprocess.Popen(["sleep", "60"])
    try:
        holder = Holder("here", leases._place(), sleeper.pid, leases._started(sleeper.pid), "theirs")
        assert not holder.is_gone and not holder.is_silent(1e6)
        sleeper.send_signal(signal.SIGSTOP)
        deadline = time.time() + 10
        while leases._state(sleeper.pid) not in leases.STOPPED and time.time() < deadline:
            time.sleep(0.01)
        assert holder.is_silent(1e6) and not holder.is_silent(1.0)
    finally:
        sleeper.kill()
        sleeper.wait()
    assert holder.is_gone


def test_nothing_new_is_found_out_about_a_cell_without_checksums(tiny, finished_cells, tmp_path):
    store = CellStore(finished_cells)
    artifact = store.artifact()
    store.put_artifact(replace(artifact, files={}))
    arguments = ("run", "--model", str(tiny), "--methods", "rtn", *SHORT)
    assert "rtn 3.25: found" in run_harness(*arguments, "--out", str(tmp_path / "a")).stderr
    for score in store.folder.glob("score_*"):
        score.unlink()
    done = run_harness(*arguments, "--out", str(tmp_path / "b"))
    assert done.returncode == 0 and "before checksums were kept; the cell is made again" in done.stderr
    assert store.artifact().files == artifact.files
    assert steady(read_rows(tmp_path / "a")) == steady(read_rows(tmp_path / "b"))
