"""`plan` as a user types it."""

import json
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


def test_the_page_on_scaling_says_what_is_predicted():
    page = (Path(__file__).parents[3] / "docs" / "scaling.md").read_text()
    rows = re.findall(r"^\| ([\w.-]+) \| (fp16|gptq) \| ([\d.]+) \| ([\d.]+) \|$", page, flags=re.MULTILINE)
    assert len(rows) >= 6
    for model in dict.fromkeys(row[0] for row in rows):
        done = run_harness("plan", "--model", model, "--methods", "gptq", "--bits", "3.25", "--device", "cpu", "--json")
        for cell in json.loads(done.stdout)["cells"]:
            peaks = (cell["predicted_peak_gib"], cell["predicted_peak_by_blocks_gib"])
            assert (model, cell["method"], *(f"{gib:.1f}" for gib in peaks)) in rows
