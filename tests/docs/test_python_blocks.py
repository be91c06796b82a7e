"""Every block of Python in README.md, CONTRIBUTING.md and docs/ is run as a script, or says what it needs.

The blocks of a page are one script, run in a folder where `my-model` is a model of two narrow blocks."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from harness.data.files import CACHE_VARIABLE, cache_dir
from tests.docs.test_shell_lines import MARKS, PAGES, ROOT, blocks
from tests.helpers import linked_cache


def python_blocks(page: Path) -> list[str]:
    return ["\n".join(lines) for language, lines in blocks(page) if language == "python"]


@pytest.mark.parametrize("page", [page for page in PAGES if python_blocks(page)], ids=lambda page: page.name)
def test_every_python_block_runs_or_says_what_it_needs(page, narrow, tmp_path):
    found = python_blocks(page)
    for block in found:
        compile(block, page.name, "exec")
    script = "\n\n".join(block for block in found if not any(mark in block for mark in MARKS))
    shutil.copytree(narrow, tmp_path / "my-model")
    (tmp_path / "page.py").write_text(script)
    cache = linked_cache(cache_dir().resolve(), tmp_path / "cache")
    added = {"PYTHONPATH": str(ROOT), CACHE_VARIABLE: str(cache), "TMPDIR": str(tmp_path)}  # a lock of its own
    command = [sys.executable, "page.py"]
    done = subprocess.run(command, cwd=tmp_path, env=os.environ | added, capture_output=True, text=True)
    assert done.returncode == 0, f"{page.name}\n{done.stdout}\n{done.stderr}"
