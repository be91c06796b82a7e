"""SLURM's engine through submitit's executor of local processes."""

import pytest

from harness.report.baseline import read_rows
from tests.helpers import SMALL, run_harness, steady

pytest.importorskip("submitit")
SLURM = ("--engine", "slurm", "--slurm", "cluster=local,minutes=10")


def test_jobs_make_the_leaderboard_of_one_machine(truncated, finished, cache, tmp_path):
    run = ("run", "--model", str(truncated.path), "--methods", "rtn", "--bits", "3.25", *SMALL)
    done = run_harness(*run, *SLURM, "--out", str(tmp_path / "out"))
    assert done.returncode == 0, done.stderr
    assert "on " in done.stderr  # which machine
    wanted = {label: row for label, row in read_rows(finished / "out").items() if label in ("fp16", "rtn 3.25")}
    found = steady(read_rows(tmp_path / "out"))
    ranks = {name for row in found.values() for name in row if name.startswith(("rank_", "tie_"))}
    for label, row in steady(wanted).items():
        assert {k: v for k, v in found[label].items() if k not in ranks} == {
            k: v for k, v in row.items() if k not in ranks
        }
    again = run_harness(*run, *SLURM, "--out", str(tmp_path / "out"))
    assert again.stderr.count("found, not repeated") == 2  # nothing is asked of the cluster


def test_what_slurm_cannot_be_is_one_line(truncated, cache, tmp_path):
    run = (
        "run",
        "--model",
        str(truncated.path),
        "--methods",
        "rtn",
        *SMALL,
        "--out",
        str(tmp_path),
        "--engine",
        "slurm",
    )
    done = run_harness(*run)
    assert done.returncode == 2 and "cluster=local tries it here" in done.stderr.splitlines()[-1]
    done = run_harness(*run, "--slurm", "minutes=soon")
    assert done.returncode == 2 and "minutes=240" in done.stderr.splitlines()[-1]
