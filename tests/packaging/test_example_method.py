"""A method of another package: listed, planned and run like ours, for no more than an entry point."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
from pathlib import Path

from harness.data.files import CACHE_VARIABLE, cache_dir
from tests.helpers import linked_cache

TINY = ("--calibration", "c4-mini@128x2", "--protocols", "wiki-mini@128/2", "--no-bench")

ALL_VERBS = """
import sys
from harness.cli import main
model, out, *tiny = sys.argv[1:]
plan = ["--model", model, "--methods", "clipped:clip=0.9", "--bits", "3.25", "--allocate", "uniform"]
sys.exit(main(["ls", "methods"]) or main(["plan", *plan]) or main(["run", *plan, "--out", out, *tiny]))
"""


def test_a_method_of_another_package(example: Path, narrow: Path, tmp_path: Path) -> None:
    cache = linked_cache(cache_dir().resolve(), tmp_path / "cache")
    added = {"PYTHONPATH": str(example), CACHE_VARIABLE: str(cache), "TMPDIR": str(tmp_path)}  # a lock of its own
    command = [sys.executable, "-c", ALL_VERBS, narrow, tmp_path / "out", *TINY]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=os.environ | added)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "\nclipped  Round to nearest on a symmetric grid" in done.stdout  # ls methods
    assert "clip=0.8" in done.stdout
    assert "\nclipped:clip=0.9 under 3.25" in done.stdout  # plan
    with open(tmp_path / "out" / "leaderboard.csv") as file:
        rows = {row["method"]: row["status"] for row in csv.DictReader(file)}
    assert rows == {"fp16": "ok", "clipped": "ok"}
