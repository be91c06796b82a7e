"""What is typed wrong, or asks for help, is answered before anything heavy is imported."""

import json
import subprocess
import sys

import pytest

from harness.model import PRESETS, inventory, laid_out, read_config, skeleton

HEAVY = ("torch", "transformers", "lm_eval", "datasets", "pandas", "scipy", "peft", "pyarrow")
# Runs command lines, one a line of its input, each in a fork of a process that has imported the entry point and no
# more; says how each ended and which of those it has imported.
SCRIPT = f"""
import json, os, sys
from harness.cli import main
for line in sys.stdin:
    os.environ["HARNESS_CACHE"], *arguments = json.loads(line)
    answer, said = os.pipe()
    if not os.fork():
        os.dup2(2, 1)  # what is printed is shown when a test fails
        try:
            code = main(arguments)
        except SystemExit as stop:
            code = stop.code
        sys.stdout.flush()
        os.write(said, json.dumps([code, [name for name in {HEAVY} if name in sys.modules]]).encode())
        os._exit(0)
    os.close(said)
    with os.fdopen(answer) as found:
        print(found.read() or "null", flush=True)
    os.wait()
"""


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    errors = tmp_path_factory.mktemp("startup") / "errors.txt"
    environment = {"PATH": "", "PYTHONPATH": ":".join(filter(None, sys.path))}
    command = [sys.executable, "-c", SCRIPT]
    with open(errors, "w") as out:
        pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=out, text=True, env=environment)
        with subprocess.Popen(command, **pipes) as process:
            yield process, errors


@pytest.fixture
def imported(server, tmp_path):
    """Words of a command line -> (exit code, which heavy packages it imported)."""
    process, errors = server

    def answer(*arguments):
        print(json.dumps([str(tmp_path), *arguments]), file=process.stdin, flush=True)
        found = json.loads(process.stdout.readline() or "null")
        assert found, errors.read_text()
        return found[0], set(found[1])

    return answer


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
def test_help_and_lists_import_nothing_heavy(arguments, imported):
    assert imported(*arguments) == (0, set())


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
def test_a_refusal_imports_nothing_heavy(arguments, imported):
    assert imported(*arguments) == (2, set())


def test_an_option_of_a_method_is_refused_with_torch_alone(imported):
    assert imported("run", "--methods", "gptq:grop=64") == (2, {"torch"})


def test_a_preset_is_planned_without_transformers(imported):
    arguments = ("plan", "--model", "smollm2-135m", "--methods", "gptq,nf", "--bits", "3.25")
    assert imported(*arguments) == (0, {"torch"})


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_is_what_transformers_builds_of_it(preset):
    assert laid_out(preset) == inventory(skeleton(read_config(preset)))
