"""Perplexity of the default model under every method against the committed baseline, with the verb a user has for it.

After a change that moves numbers on purpose:

    python -m harness run <ARGUMENTS> --out /tmp/now && python -m harness check /tmp/now
    results/baselines/smollm2-135m.csv --update
"""

from pathlib import Path

import pytest

from harness.cli import main
from harness.data.files import locked
from harness.report.baseline import read_rows
from tests.helpers import linked_cache, run_harness

BASELINE = Path(__file__).parents[2] / "results" / "baselines" / "smollm2-135m.csv"
ARGUMENTS = (
    "--methods",
    "gptq,reallm:window=8",  # short windows: the search is a third of the time
    "--bits",
    "3.25",
    "--calibration",
    "c4-mini@128x8",
    "--protocols",
    "wiki-mini@256/3,c4-mini@256/3",
    "--no-bench",
)


@pytest.fixture(scope="session")
def leaderboard(assets_cache, session_folder) -> Path:
    folder = session_folder / "regression"
    with locked(folder, folder.name):
        if not (folder / "out" / "leaderboard.csv").exists():
            cache = linked_cache(assets_cache, folder / "cache")
            done = run_harness("run", *ARGUMENTS, "--out", str(folder / "out"), HARNESS_CACHE=str(cache))
            assert done.returncode == 0, done.stderr
    return folder / "out"


def test_perplexities_are_those_of_the_baseline(leaderboard, capsys):
    code = main(["check", str(leaderboard), str(BASELINE)])
    assert code == 0, capsys.readouterr().out


def test_the_order_is_what_it_should_be(leaderboard):
    """Data helps, vectors help, nothing beats the reference."""
    for column in ("ppl_wiki-mini@256/3", "ppl_c4-mini@256/3"):
        value = {name: float(row[column]) for name, row in read_rows(leaderboard).items()}
        order = ("fp16", "reallm:window=8 3.25", "gptq 3.25")
        assert sorted(order, key=value.__getitem__) == list(order)
