"""`plan` as a user types it."""

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
