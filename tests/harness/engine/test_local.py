"""Processes of a run: killed, crashed, forked and spawned, on the first blocks of the real model."""

import os
import random
import signal
import subprocess
import sys
import time

import psutil

from harness.data.files import CACHE_VARIABLE
from harness.report.baseline import read_rows
from tests.helpers import SMALL, linked_cache, run_harness, steady


def test_killed_at_three_random_moments_the_same_command_goes_on(two_blocks, assets_cache, tmp_path):
    arguments = [sys.executable, "-m", "harness", "run", "--model", str(two_blocks.path), "--methods", "gptq", *SMALL]
    caches = {name: linked_cache(assets_cache, tmp_path / name) for name in ("whole", "killed")}

    def start(name, out):
        environment = os.environ | {CACHE_VARIABLE: str(caches[name])}
        return subprocess.Popen(
            [*arguments, "--out", str(tmp_path / out)],
            env=environment,
            start_new_session=True,
            stderr=subprocess.PIPE,
            text=True,
        )

    def finish(process):
        _, errors = process.communicate(timeout=600)
        assert process.returncode == 0, errors

    begin = time.monotonic()
    finish(start("whole", "a"))
    duration = time.monotonic() - begin

    moments = sorted(random.SystemRandom().uniform(0.1, 0.75) * duration for _ in range(3))
    # Shown when the test fails.
    print("killed after", [round(moment, 2) for moment in moments], "s of", round(duration, 2))
    seen = set()
    for moment in moments:
        process = start("killed", "b")
        time.sleep(moment)
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        found = {path for path in caches["killed"].glob("cells/*/**/*") if path.suffix in (".json", ".safetensors")}
        done = {path for path in found if ".tmp" not in path.name and path.parent.name != "blocks"}
        assert seen <= found  # nothing finished is ever lost
        seen = done
    finish(start("killed", "b"))
    assert steady(read_rows(tmp_path / "b")) == steady(read_rows(tmp_path / "a"))


def test_one_crash_is_one_failed_row(two_blocks, cache, tmp_path):
    out = str(tmp_path / "out")
    arguments = ["run", "--model", str(two_blocks.path), "--methods", "rtn,gptq", *SMALL, "--out", out]
    process = subprocess.Popen([sys.executable, "-m", "harness", *arguments], stderr=subprocess.PIPE, text=True)
    victim = None
    deadline = time.time() + 300
    while victim is None and time.time() < deadline:
        time.sleep(0.02)
        if list(cache.glob("cells/*/blocks/block_0000.safetensors")):
            # Of all processes below it, the cells: they are children of the server they were forked from.
            family = psutil.Process(process.pid).children(recursive=True)
            victim = next((p for p in family if p.parent().pid != process.pid), None)
    assert victim is not None, process.stderr.read()
    victim.kill()
    _, errors = process.communicate()
    assert process.returncode == 1, errors
    rows = read_rows(tmp_path / "out")
    assert sorted(row["status"] for row in rows.values()) == ["killed", "ok", "ok"]
    assert "killed by SIGKILL" in next(row["reason"] for row in rows.values() if row["status"] == "killed")
    assert run_harness(*arguments).returncode == 0  # the same command mends it


def test_spawned_cells_do_the_same_work(truncated, finished_cache, tmp_path, monkeypatch):
    """As they start beside an accelerator: a fresh interpreter, which must store the same bytes as a forked one."""
    arguments = ("run", "--model", str(truncated.path), "--methods", "rtn", *SMALL)
    forked = run_harness(*arguments, "--out", str(tmp_path / "forked"))
    assert forked.stderr.count("found, not repeated") == 2
    monkeypatch.setattr("harness.engine.local.START", {})
    assert run_harness(*arguments, "--out", str(tmp_path / "spawned"), "--fresh").returncode == 0
    assert steady(read_rows(tmp_path / "spawned")) == steady(read_rows(tmp_path / "forked"))
