"""Perplexity of the default model under every method, against a committed baseline, from both sides.

A worse number is a regression; a better one is suspicious until explained, and then the baseline is rewritten on purpose:

    python -m tests.harness.test_regression
"""

import csv
from pathlib import Path

import pytest

from tests.harness.conftest import read_rows, run_harness

BASELINE = Path(__file__).parents[2] / "results" / "baselines" / "smollm2-135m.csv"
ARGUMENTS = (
    "run", "--methods", "rtn,gptq,reallm,reallm:data-free", "--bits", "3.25",
    "--calibration", "c4-mini@512x4", "--protocols", "wiki-mini@512/3,c4-mini@512/3",
)  # fmt: skip
PERPLEXITIES = ("ppl_wiki-mini@512/3", "ppl_c4-mini@512/3")
# The reference has no choices to make; a quantiser's roundings fall differently on another CPU's arithmetic.
TOLERANCE = {"fp16": 0.002}
OTHERS = 0.05


@pytest.fixture(scope="module")
def rows(assets_cache, tmp_path_factory) -> dict[str, dict[str, str]]:
    from tests.harness.conftest import linked_cache

    folder = tmp_path_factory.mktemp("regression")
    done = run_harness(*ARGUMENTS, "--out", str(folder / "out"), HARNESS_CACHE=str(linked_cache(assets_cache, folder / "cache")))
    assert done.returncode == 0, done.stderr
    return read_rows(folder / "out")


def test_perplexities_are_those_of_the_baseline(rows):
    with open(BASELINE, newline="") as handle:
        baseline = {row["label"]: row for row in csv.DictReader(handle)}
    assert set(rows) == set(baseline)
    for label, row in rows.items():
        assert row["stored_bpw"] == baseline[label]["stored_bpw"], label
        for column in PERPLEXITIES:
            assert float(row[column]) == pytest.approx(float(baseline[label][column]), rel=TOLERANCE.get(label, OTHERS)), (label, column)


def test_the_order_is_what_it_should_be(rows):
    for column in PERPLEXITIES:
        value = {label: float(row[column]) for label, row in rows.items()}
        assert value["fp16"] < value["reallm:calibrated 3.25"] < value["gptq 3.25"] < value["rtn 3.25"]
        assert value["reallm:calibrated 3.25"] < value["reallm:data-free 3.25"] < value["rtn 3.25"]


def rewrite(folder: Path) -> None:
    rows = read_rows(folder)
    columns = ("label", "stored_bpw", *PERPLEXITIES)
    with open(BASELINE, "w", newline="") as handle:
        writer = csv.DictWriter(handle, columns, extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        writer.writerows({"label": label} | row for label, row in rows.items())


if __name__ == "__main__":
    import tempfile

    with tempfile.TemporaryDirectory() as name:
        assert run_harness(*ARGUMENTS, "--out", name).returncode == 0
        BASELINE.parent.mkdir(parents=True, exist_ok=True)
        rewrite(Path(name))
