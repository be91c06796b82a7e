"""Every shell line of README.md, CONTRIBUTING.md and docs/ is run, or says what it needs.

They are run on a model of two narrow blocks. The lines of a page run in order, in a folder of its own; pages share one
cache of results. What is appended to a line makes it small: the last of two equal options wins."""

from __future__ import annotations

import importlib
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from harness.data.files import CACHE_VARIABLE, cache_dir
from harness.engine import local
from harness.measure import machine
from tests.helpers import linked_cache, run_harness

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
MARKS = ("needs a GPU", "needs the hub", "needs a server", "needs a cluster")  # in a line's comment: why it is not run
LANGUAGES = ("sh", "python", "toml")  # of code blocks; those of the first two are run (test_python_blocks.py)
SMALL = shlex.split(
    "--calibration c4-mini@128x4 --training c4-mini@128x4/1 --protocols wiki-mini@128/2 --seeds 0 --limit 5"
)
QUICK = shlex.split("--bench-seconds 0.02 --bench-threads 1")
SCORING = shlex.split("--context 64 --windows 2 --rounds 1")


def blocks(page: Path) -> Iterator[tuple[str, list[str]]]:
    """(language, lines) of a page's fenced code blocks."""
    for block in re.finditer(r"^```(\w*)\n(.*?)^```$", page.read_text(), flags=re.MULTILINE | re.DOTALL):
        yield block[1], block[2].splitlines()


def shell_lines(page: Path) -> list[str]:
    """Those that are more than a comment."""
    lines = (line for language, lines in blocks(page) if language == "sh" for line in lines)
    return [line for line in lines if shlex.split(line, comments=True)]


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A cache that all pages share, without results at first; the lock of measurements is this file's own, and their
    processes are forked like those of cells: what they find is not looked at."""
    folder = tmp_path_factory.mktemp("docs")
    with pytest.MonkeyPatch.context() as patch:
        local._prepare("cpu")
        patch.setattr(local, "MEASURED", "forkserver")
        patch.setattr(machine, "lock_path", lambda: folder / "machine.lock")
        yield linked_cache(cache_dir().resolve(), folder / "cache")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_code_block_names_its_language(page):
    assert {language for language, _ in blocks(page)} <= set(LANGUAGES)


@pytest.mark.parametrize("page", [page for page in PAGES if shell_lines(page)], ids=lambda page: page.name)
def test_every_shell_line_runs_or_says_what_it_needs(page, cache, narrow, tmp_path, monkeypatch):
    for line in shell_lines(page):
        words = shlex.split(line, comments=True)
        match words:
            case ["make", target]:
                subprocess.run(["make", "-n", target], cwd=ROOT, check=True, capture_output=True)
            case ["export", _]:  # a cache of its own is given to every line
                continue
            case ["pip", "install", what]:
                assert _can_be_installed(what), line
            case ["python", "-m", "harness", verb, *_] if any(mark in line for mark in MARKS):
                with monkeypatch.context() as patch:  # its options are read, no more
                    patch.setattr(importlib.import_module(f"harness.cli.{verb}"), "main", lambda arguments: 0)
                    assert run_harness(*words[3:]).returncode == 0, line
            case ["python", "-m", "harness", verb, *options]:
                small = _smaller(verb, options, str(narrow))
                done = run_harness(verb, *options, *small, cwd=tmp_path, HARNESS_CACHE=str(cache))
                assert done.returncode == 0, f"{line}\n{done.stdout}\n{done.stderr}"
            case ["python", "benchmarks/scoring.py"]:
                monkeypatch.setenv(CACHE_VARIABLE, str(cache))
                command = [sys.executable, ROOT / words[1], "--model", narrow, *SCORING]
                subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, text=True)
            case _:
                pytest.fail(f"{page.name}: nobody knows how to run '{line}'; teach this test, or describe it in words")


def _smaller(verb: str, options: list[str], model: str) -> list[str]:
    """What is appended to a line so that it takes seconds."""
    one = [] if "--methods" in options else ["--methods", "gptq"]
    one += [] if "uniform" in options else ["--bits", "3.25"]  # a method may name bits that need a budget of their own
    if verb == "run":
        return ["--model", model, *SMALL, *one, "--no-bench"]
    if verb == "bench":
        what = "--shapes" if "--shapes" in options else "--model"
        return [what, model, *SMALL, *one, *QUICK]
    return []


def _can_be_installed(what: str) -> bool:
    """This project, with an extra that it has or without."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    named = re.fullmatch(r"\.(?:\[([\w,]+)\])?", what)
    return named is not None and (named[1] is None or set(named[1].split(",")) <= extras.keys())
