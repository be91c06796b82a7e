"""What an unlucky or hostile user found on a reading of the mechanisms against faults."""

from __future__ import annotations

import errno
import multiprocessing
import os
import shutil
import signal
import threading
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch

from harness.cli import _told_to_end, clean, main
from harness.cli.leaderboard import keeps_what_is_there
from harness.compress.loop import _compressed
from harness.data import checkpoint
from harness.data.assets import resolve_model
from harness.data.files import CACHE_VARIABLE, atomic_path
from harness.data.tensor_file import write_tensors
from harness.engine.local import INTERRUPTED, LONGEST_POLL_S, Interrupted, _Processes, measure_cells
from harness.engine.process import Ended, Speaker, ended
from harness.measure import machine
from harness.measure.measurement import Conditions
from harness.model import load_reference
from harness.report.leaderboard import escaped
from harness.store import lease as leases
from harness.store.cells import CellStore
from harness.store.lease import Holder
from harness.store.records import Ending
from kernels.cpu import build
from kernels.formats.layer import LayerConfig, LayerSpec
from methods import parse_method
from methods.base import LayerData


def _caught(raise_it) -> Ended:
    try:
        raise_it()
    except BaseException as error:
        return ended(error)
    raise AssertionError("nothing was raised")


def _serialise() -> None:
    """The writer of tensor files says which one."""
    opened = mock.mock_open()
    opened.return_value.write.side_effect = _full
    with mock.patch("harness.data.tensor_file.open", opened, create=True):
        write_tensors(Path("/x/y"), {"a": torch.zeros(9)})


def _full(*_: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))  # of a write(), which names no file


def _ctrl_c() -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize(
    "raise_it, ending, words",
    [
        (_ctrl_c, Ending.INTERRUPTED, "goes on from here"),
        (_full, Ending.FAILED, "No space left on device"),
        (_serialise, Ending.FAILED, "No space left on device: /x/y"),
    ],
)
def test_how_work_ended(raise_it, ending, words):
    said = _caught(raise_it)
    assert said.ending == ending and words in said.error


def test_a_name_from_outside_moves_no_cursor_in_a_reason():
    def raise_it() -> None:
        raise OSError(errno.ENOENT, "No such file or directory", "/x/\x1b[31m\r\n")

    assert "\x1b" not in _caught(raise_it).error and _caught(raise_it).error.isprintable()
    assert escaped("<x>[a](b)|`") == "&lt;x>[a]&#40;b)\\|&#96;"


def test_a_timeout_of_years_is_none():
    receiver, sender = multiprocessing.Pipe(duplex=False)
    sender.send(Ended())
    sender.close()
    assert _Processes(lambda *_: None, 1e12)._listen(receiver, multiprocessing.Process(), "a") == Ended()
    assert LONGEST_POLL_S < 2**31 / 1000  # milliseconds, as the system counts them


def _killed_with_the_group(speak: Speaker) -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def test_a_signal_to_all_processes_is_an_interruption_whoever_is_first(cache, monkeypatch):
    """The child is gone before the run has looked at its own signal."""
    processes = _Processes(lambda *_: None, None)
    monkeypatch.setattr(processes._stopped, "wait", lambda seconds: seconds > 0.0)
    said = processes.run(_killed_with_the_group, "a", multiprocessing.get_context("fork"))
    assert (said.error, said.ending) == (INTERRUPTED.error, Ending.INTERRUPTED)


def test_told_to_end_while_it_waits_to_measure_a_run_writes_its_table(tmp_path, monkeypatch):
    def stop() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(machine, "lock_path", lambda: tmp_path / "lock")
    with machine.working(), pytest.raises(Interrupted):
        measure_cells([], Conditions("x", 1.0, 1), lambda *_: None, stop)


def test_nohup_stays_nohup():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with _told_to_end():
            assert (
                signal.getsignal(signal.SIGHUP) == signal.SIG_IGN and signal.getsignal(signal.SIGTERM) != signal.SIG_DFL
            )
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_group_s_umask_does_not_cost_the_kernels(tmp_path, monkeypatch):
    source = tmp_path / "source" / "fused.cpp"
    source.parent.mkdir()
    source.write_text('extern "C" int one() { return 1; }')
    monkeypatch.setattr(build, "SOURCE", source)
    monkeypatch.setenv("HARNESS_CACHE", str(tmp_path / "cache"))
    before = os.umask(0o002)
    try:
        assert build._built(build.SOURCE, build._instructions(), build._compiler()).exists()
    finally:
        os.umask(before)


def test_two_machines_with_the_same_process_number_write_two_files(tmp_path):
    with atomic_path(tmp_path / "x") as one, atomic_path(tmp_path / "x") as other:
        assert one != other
        one.write_text("one")
        other.write_text("other")


def test_a_beat_that_fails_once_is_not_the_last(tmp_path, monkeypatch):
    path, beats, released = tmp_path / "cell.lease", [], threading.Event()
    mine = Holder("here", "", 2, "", "mine")
    mine.write(path)
    monkeypatch.setattr(leases, "BEAT_S", 0.01)

    def utime(touched: Path) -> None:
        beats.append(touched)
        if len(beats) == 3:
            released.set()
        raise OSError(errno.ESTALE, "Stale file handle")

    monkeypatch.setattr(leases.os, "utime", utime)
    leases._beat(path, mine, released, lambda code: pytest.fail("ended"))
    assert beats == [path] * 3


def test_a_decomposition_that_fails_without_a_hessian_is_what_it_is(monkeypatch):
    method, layer = parse_method("rtn"), LayerSpec("x", "x", 8, 64, bias=False)

    def compress(*_):
        raise torch.linalg.LinAlgError("svd did not converge")

    monkeypatch.setattr(type(method), "compress", compress)
    with pytest.raises(torch.linalg.LinAlgError, match="svd"):
        _compressed(method, LayerData(weight_OI=torch.ones(8, 64), seed=0), layer, LayerConfig("uniform", {}))


def test_a_folder_that_was_another_model_in_between_is_refused(tiny, cache, tmp_path):
    """A, then B, then A again: right before and after, and B was loaded."""
    folder = shutil.copytree(tiny, tmp_path / "model")
    first = checkpoint.fingerprint(folder)
    (folder / "config.json").write_text((folder / "config.json").read_text() + " ")
    for load in (
        lambda: load_reference(folder, "cpu", torch.float32, first),
        lambda: checkpoint.load_tokenizer(folder, first),
    ):
        with pytest.raises(ValueError, match="changed while it was read"):
            load()


def test_verify_looks_behind_links_and_at_all_that_is_pinned(tmp_path, monkeypatch, capsys):
    disk, cache = tmp_path / "disk", tmp_path / "cache"
    damaged = [disk / "abc" / "score_x.json", cache / "files" / ("0" * 16) / "a.txt", cache / "kernels" / "k-123.so"]
    for path in damaged:
        path.parent.mkdir(parents=True)
        path.write_text("{}")
    (cache / "cells").symlink_to(disk)
    (cache / "kernels" / "earlier.so").write_text("without a checksum in its name")
    (cache / "sha256").mkdir()
    (cache / "sha256" / "earlier.json").write_text('{"path": "/x", "sha256": "abc"}')
    (disk / "round").symlink_to(cache)
    monkeypatch.setenv(CACHE_VARIABLE, str(cache))
    assert main(["verify"]) == 1
    shown = capsys.readouterr().out
    assert all(path.name in shown for path in damaged) and "3 damaged" in shown


def test_clean_goes_by_what_was_asked_for_and_removes_what_it_says(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "cache"))
    old, found, linked = (CellStore(name) for name in ("old", "found", "linked"))
    (tmp_path / "disk").mkdir(parents=True)
    for store in (old, found, linked):
        if store is linked:
            store.folder.symlink_to(tmp_path / "disk")
        else:
            store.folder.mkdir(parents=True)
        for name in ("spec.json", "artifact.json"):
            (store.folder / name).write_text("{}")
            os.utime(store.folder / name, (1e9, 1e9))
    found.asked_for()
    assert main(["clean", "--older-than", "30", "--yes"]) == 0
    assert "2 of 3 cells" in capsys.readouterr().out
    assert found.folder.exists() and not old.folder.exists() and not linked.folder.is_symlink()
    assert not (tmp_path / "disk" / "artifact.json").exists()


def test_a_cell_that_is_asked_for_while_clean_waits_is_kept(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path))
    store = CellStore("cell")
    store.folder.mkdir(parents=True)
    (store.folder / "spec.json").write_text("{}")
    os.utime(store.folder / "spec.json", (1e9, 1e9))
    monkeypatch.setattr(clean.CellStore, "lease", lambda self: nullcontext(self.asked_for()))
    assert main(["clean", "--older-than", "30", "--yes"]) == 0
    assert store.folder.exists() and "kept" in capsys.readouterr().out


def test_a_table_with_tasks_is_not_overwritten_by_one_without(tmp_path):
    (tmp_path / "leaderboard.csv").write_text(
        "method,variant,budget_bpw,seed,stored_bpw,ppl_p,acc_piqa,cell\nrtn,,3,0,3,9.5,0.5,abc\n"
    )
    plan = SimpleNamespace(cells=[SimpleNamespace(key="abc")], protocols=[SimpleNamespace(name="p")], tasks=())
    with pytest.raises(ValueError, match="acc_piqa"):
        keeps_what_is_there(tmp_path, plan)


def test_time_that_a_cell_waits_for_another_run_is_said_to_the_parent(tmp_path, monkeypatch):
    monkeypatch.setattr(leases, "POLL_S", 0.01)
    monkeypatch.setattr(leases, "STALE_S", 0.1)
    Holder("elsewhere", "another boot", 1, "0", "theirs").write(tmp_path / "cell.lease")
    waited = []
    with leases.lease(tmp_path / "cell", lambda: waited.append(1)):
        assert waited


def test_a_folder_whose_name_is_no_text_and_an_index_too_deep_are_one_line(tmp_path, cache):
    folder = tmp_path / os.fsdecode(b"\xff")
    folder.mkdir()
    with pytest.raises(ValueError, match="rename it"):
        resolve_model(str(folder))
    folder = tmp_path / "deep"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / checkpoint.INDEX).write_text('{"weight_map": ' + "[" * 100_000)
    with pytest.raises(ValueError, match="no index of shards"):
        resolve_model(str(folder))
