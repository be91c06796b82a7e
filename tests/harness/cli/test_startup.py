"""What is typed wrong, or asks for help, is answered before anything heavy is imported."""

import json
import subprocess
import sys

import pytest

from harness.model import PRESETS, inventory, laid_out, read_config, skeleton

HEAVY = ("torch", "transformers", "lm_eval", "datasets", "pandas", "scipy", "peft", "pyarrow")
# Runs the command line, and says how it ended and which of those it has imported.
SCRIPT = f"""
import json, sys
from harness.cli import main
try:
    code = main(sys.argv[1:])
except SystemExit as stop:
    code = stop.code
sys.stdout.flush()
print(json.dumps([code, [name for name in {HEAVY} if name in sys.modules]]))
"""


def imported(*arguments, cache):
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, *arguments],
        capture_output=True,
        text=True,
        env={"HARNESS_CACHE": str(cache), "PATH": "", "PYTHONPATH": ":".join(filter(None, sys.path))},
    )
    assert done.stdout, done.stderr
    code, found = json.loads(done.stdout.splitlines()[-1])
    return code, set(found)


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["--version"],
        *(
            [verb, "--help"]
            for verb in (
                "run",
                "plan",
                "bench",
                "check",
                "compare",
                "recommend",
                "export",
                "kld",
                "ls",
                "verify",
                "clean",
            )
        ),
        *(["ls", what] for what in ("runs", "models", "protocols", "tasks")),
        ["verify"],
    ],
    ids=" ".join,
)
def test_help_and_lists_import_nothing_heavy(arguments, tmp_path):
    assert imported(*arguments, cache=tmp_path) == (0, set())


@pytest.mark.parametrize(
    "arguments",
    [
        ["rum"],
        ["run", "--bitz", "3"],
        ["run", "--methods", "gtpq"],
        ["run", "--bits", "3,x"],
        ["run", "--protocols", "wikitext103@512"],
        ["run", "--tasks", "pika"],
        ["run", "--calibration", "pile@512x4"],
        ["run", "--training", "c4-mini"],
        ["run", "--seeds", "a"],
        ["run", "--jobs", "0"],
        ["run", "--model", "./nowhere"],
        ["run", "--model", "llama2-7b"],  # which has no weights
        ["plan", "--model", "llama2-7bb"],
        ["bench", "--end-to-end"],
        ["bench", "--bench-seconds", "0"],
        ["check", "./nowhere", "./nowhere"],
        ["compare", "./nowhere"],
        ["recommend", "--memory", "4"],
        ["export", "./nowhere", "--to", "x", "--format", "ggml"],
        ["run", "--model-cell", "./nowhere"],
        ["clean"],
        ["clean", "--older-than", "x"],
    ],
    ids=" ".join,
)
def test_a_refusal_imports_nothing_heavy(arguments, tmp_path):
    assert imported(*arguments, cache=tmp_path) == (2, set())


def test_an_option_of_a_method_is_refused_with_torch_alone(tmp_path):
    assert imported("run", "--methods", "gptq:grop=64", cache=tmp_path) == (2, {"torch"})


def test_a_preset_is_planned_without_transformers(tmp_path):
    arguments = ("plan", "--model", "smollm2-135m", "--methods", "gptq,nf", "--bits", "3.25")
    assert imported(*arguments, cache=tmp_path) == (0, {"torch"})


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_is_what_transformers_builds_of_it(preset):
    assert laid_out(preset) == inventory(skeleton(read_config(preset)))
