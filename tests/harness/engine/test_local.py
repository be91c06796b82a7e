"""Processes of a run: killed, crashed, forked and spawned."""

import contextlib
import os
import random
import signal
import subprocess
import sys
import threading
import time

import psutil

from harness.data.files import CACHE_VARIABLE
from harness.report.baseline import read_rows
from harness.store.cells import CellStore
from tests.helpers import SMALL, linked_cache, run_harness, steady


def test_killed_at_three_random_moments_the_same_command_goes_on(narrow, assets_cache, tmp_path):
    arguments = [sys.executable, "-m", "harness", "run", "--model", str(narrow), "--methods", "gptq", *SMALL]
    caches = {name: linked_cache(assets_cache, tmp_path / name) for name in ("whole", "killed")}

    def finish(name, out):
        done = run_harness(*arguments[3:], "--out", str(tmp_path / out), HARNESS_CACHE=str(caches[name]))
        assert done.returncode == 0, done.stderr

    begin = time.monotonic()
    finish("whole", "a")
    duration = time.monotonic() - begin

    moments = sorted(random.SystemRandom().uniform(0.0, 0.75) * duration for _ in range(3))
    # Shown when the test fails.
    print("killed", [round(moment, 2) for moment in moments], "s after its first cell began, of", round(duration, 2))
    seen = set()
    for moment in moments:
        process = subprocess.Popen(
            [*arguments, "--out", str(tmp_path / "b")],
            env=os.environ | {CACHE_VARIABLE: str(caches["killed"])},
            start_new_session=True,
            stderr=subprocess.DEVNULL,
        )
        before = time.time()
        while process.poll() is None and not _began(caches["killed"], before):
            time.sleep(0.02)
        time.sleep(moment)
        with contextlib.suppress(ProcessLookupError):  # it was done by then
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        found = {path for path in caches["killed"].glob("cells/*/**/*") if path.suffix in (".json", ".safetensors")}
        done = {path for path in found if ".tmp" not in path.name and path.parent.name != "blocks"}
        assert seen <= found  # nothing finished is ever lost
        seen = done
    finish("killed", "b")
    assert steady(read_rows(tmp_path / "b")) == steady(read_rows(tmp_path / "a"))


def _began(cache, moment):
    """Whether a cell's process has taken its cell since then."""
    return any(path.exists() and path.stat().st_mtime > moment for path in (cache / "cells").glob("*.lease"))


def test_one_crash_is_one_failed_row(narrow, cache, tmp_path):
    out = str(tmp_path / "out")
    arguments = ["run", "--model", str(narrow), "--methods", "rtn,gptq", *SMALL, "--out", out]
    over = threading.Event()

    def kill() -> None:
        """Of all processes below this one, a cell: those are children of the server they were forked from."""
        while not over.wait(0.02):
            if list(cache.glob("cells/*/blocks/block_0000.safetensors")):
                family = psutil.Process().children(recursive=True)
                victim = next((p for p in family if p.parent().pid != os.getpid()), None)
                if victim is not None:
                    victim.kill()
                    return

    killer = threading.Thread(target=kill)
    killer.start()
    done = run_harness(*arguments)
    over.set()
    killer.join()
    assert done.returncode == 1, done.stderr
    rows = read_rows(tmp_path / "out")
    assert sorted(row["status"] for row in rows.values()) == ["killed", "ok", "ok"]
    assert "killed by SIGKILL" in next(row["reason"] for row in rows.values() if row["status"] == "killed")
    assert run_harness(*arguments).returncode == 0  # the same command mends it


def test_spawned_cells_do_the_same_work(truncated, finished_cache, tmp_path, monkeypatch):
    """As they start beside accelerators, for which two names of this CPU stand in: a fresh interpreter on a device of
    its own, which must store the same bytes as a forked one."""
    arguments = ("run", "--model", str(truncated.path), "--methods", "rtn", *SMALL)
    forked = run_harness(*arguments, "--out", str(tmp_path / "forked"))
    assert forked.stderr.count("found, not repeated") == 2
    monkeypatch.setattr("harness.engine.local.START", {})
    monkeypatch.setattr("harness.engine.places.devices_of", lambda device: ["cpu:0", "cpu:1"])
    assert run_harness(*arguments, "--out", str(tmp_path / "spawned"), "--fresh").returncode == 0
    keys = [file.stem for file in (tmp_path / "spawned" / "cells").iterdir()]
    assert sorted(CellStore(key).artifact().spec.device for key in keys) == ["cpu:0", "cpu:1"]
    assert steady(read_rows(tmp_path / "spawned")) == steady(read_rows(tmp_path / "forked"))
