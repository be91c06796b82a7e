"""`plan` as a user types it."""

import json
import math
import re
from pathlib import Path

from tests.helpers import PLANNED, run_harness


def test_a_plan_names_every_layer(truncated, finished_cache):
    plan = run_harness("plan", "--model", str(truncated.path), "--methods", "gptq", *PLANNED)
    assert plan.stdout.count("model.layers.") == 21 and "predicted divergence" in plan.stdout


def test_plan_counts_without_weights():
    done = run_harness("plan", "--model", "llama2-7b", "--methods", "gptq:group=128,reallm", "--bits", "3.25", "--all")
    assert done.returncode == 0, done.stderr
    assert "6,476,005,376 weights" in done.stdout and "3.148" in done.stdout and "adapters" in done.stdout
    refused = run_harness("plan", "--model", "smollm2-135m", "--methods", "gptq", "--bits", "1")
    assert refused.returncode == 1 and "refused: gptq stores at least 2.0234" in refused.stdout


PAGE = Path(__file__).parents[3] / "docs" / "scaling.md"


def planned(model, *arguments):
    """The reference and gptq."""
    asked = ("--model", model, "--methods", "gptq", "--bits", "3.25", "--device", "cpu", "--json", *arguments)
    return json.loads(run_harness("plan", *asked).stdout)["cells"]


def rows_of(page, columns):
    """Of its tables: those of a model and so many numbers (and words) behind it."""
    cells = r" \| ".join([r"([\w.-]+)"] * (columns + 1))
    return re.findall(rf"^\| {cells} \|$", page, flags=re.MULTILINE)


def test_the_page_on_scaling_says_what_is_predicted():
    rows = rows_of(PAGE.read_text(), 3)
    for model in ("llama3.2-1b", "llama2-7b", "llama2-70b"):
        for cell in planned(model):
            peaks = (cell["predicted_peak_gib"], cell["predicted_peak_by_blocks_gib"])
            assert (model, cell["method"], *(f"{gib:.1f}" for gib in peaks)) in rows


def test_the_page_on_scaling_adds_up_a_grid():
    page, scored, rate, cells, seeds = PAGE.read_text(), 866, 0.1, 12, 3
    for model in ("llama2-7b", "llama2-70b"):
        phases = []
        for cell in planned(model, "--profile", "standard"):
            flop = {name: count / 1e15 for name, count in cell["predicted_flop"].items()}
            phases.append([flop.get("measure layers", 0), flop.get("compress", 0), scored * flop["score"]])
            assert (model, cell["method"], *(f"{count:.1f}" for count in phases[-1])) in rows_of(page, 4)
        (_, _, reference), (measure, compress, score) = phases
        one = reference + seeds * measure + cells * (compress + score)
        many = [reference + math.ceil(cells / devices) * sum(phases[1]) for devices in (8, 64)]
        hours = [f"{work / rate / 3600:.1f}" for work in (one, *many)]
        assert (model, f"{cell['predicted_peak_by_blocks_gib']:.1f}", *hours) in rows_of(page, 4)
