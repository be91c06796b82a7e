"""What the pages say of files, columns and code is so: links lead somewhere, paths exist, examples run."""

from __future__ import annotations

import csv
import importlib
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from harness.data.tasks import GROUPS, PINNED_SPLITS, parse_tasks
from harness.report.latency import KERNEL_COLUMNS
from harness.report.rows import COLUMNS_AFTER, COLUMNS_BEFORE, protocol_columns
from harness.report.task_pages import task_columns
from methods import METHODS, LayerData, LayerSpec, parse_method, split_methods
from tests.docs.test_shell_lines import PAGES, ROOT, blocks

COMMITTED = ("baselines", "cpu-*", "h200")  # folders of results/ that are not some user's runs
WITH_LINKS = [
    *ROOT.glob("*.md"),
    *(page for folder in ("docs", "kernels", "methods") for page in ROOT.glob(f"{folder}/**/*.md")),
    ROOT / "results" / "README.md",
    *(page for folder in COMMITTED for page in ROOT.glob(f"results/{folder}/**/README.md")),
]
MANUAL = ROOT / "docs" / "columns.md"
PROTOCOL = r"[\w:-]+@\d+(/\d+)?(\+bos)?"


def _name(page: Path) -> str:
    return str(page.relative_to(ROOT))


@pytest.mark.parametrize("page", WITH_LINKS, ids=_name)
def test_relative_links_lead_to_files_and_headings(page):
    for target in re.findall(r"\]\((?!\w+:)([^)\s]+)\)", page.read_text()):
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), target
        assert not anchor or anchor in _anchors(file), target


def _anchors(page: Path) -> set[str]:
    """Names of a page's headings, as they are made for links."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", [page for page in WITH_LINKS if page.name != "CHANGELOG.md"], ids=_name)
def test_paths_of_files_exist(page):
    for path in re.findall(r"`((?:\.\./|[\w.-]+/)[\w./-]*\.(?:py|sh|md|cpp|h|json))`", page.read_text()):
        assert any((folder / path).exists() for folder in (ROOT, page.parent)), path


@pytest.mark.parametrize("page", [page for page in WITH_LINKS if page.name != "CHANGELOG.md"], ids=_name)
def test_methods_that_are_named_can_be_typed(page):
    text = page.read_text()
    quoted = [name for name in _quoted(text) if ":" in name and name.partition(":")[0] in METHODS]
    lists = re.findall(r"--methods ([a-z][\w:=.,+-]*)", text)
    for name in (*quoted, *(name for listed in lists for name in split_methods(listed))):
        parse_method(name)


def test_every_column_is_explained():
    explained = [re.compile(pattern) for pattern in _explained_columns()]
    columns = {*COLUMNS_BEFORE, *COLUMNS_AFTER, *protocol_columns(["wiki-mini@512"]), *task_columns(parse_tasks("all"))}
    columns |= set(KERNEL_COLUMNS)
    for path in (path for folder in COMMITTED for path in ROOT.glob(f"results/{folder}/**/*.csv")):
        with open(path, newline="") as handle:
            columns |= set(next(csv.reader(handle)))
    unexplained = {column for column in columns if not any(pattern.fullmatch(column) for pattern in explained)}
    assert not unexplained, f"columns without a line in docs/columns.md: {sorted(unexplained)}"


def _explained_columns() -> Iterator[str]:
    """Patterns of the columns that docs/columns.md explains: names in a table's first cell, and with the endings that
    its line gives."""
    text = MANUAL.read_text()
    for line in re.findall(r"^\| `.*$", text, flags=re.MULTILINE):
        names, endings = _quoted(line.split("|")[1]), [word for word in _quoted(line) if word.startswith("_")]
        for name in (name for name in names if not name.startswith("_")):
            for ending in ("", *endings):
                pattern = re.escape(name + ending).replace(re.escape("<text>@<context>"), PROTOCOL)
                pattern = pattern.replace("<role>", r"[\w.*]+")
                yield pattern.replace("<task>", f"({'|'.join(PINNED_SPLITS)})")


def _quoted(text: str) -> list[str]:
    return re.findall(r"`([^`\n]+)`", text)


def test_groups_and_tasks_of_the_page_are_those_there_are():
    text = (ROOT / "docs" / "tasks.md").read_text()
    assert all(f"`{name}`" in text for name in (*PINNED_SPLITS, *GROUPS))


def test_the_example_of_a_method_packs_a_matrix_as_rtn_does(tmp_path, monkeypatch):
    code = next(lines for page in PAGES for language, lines in blocks(page) if language == "python")
    (tmp_path / "example_of_a_method.py").write_text("\n".join(code))
    monkeypatch.syspath_prepend(tmp_path)
    layer = LayerSpec("layer", "layer", 96, 128, bias=False)
    data = LayerData(torch.randn(96, 128, generator=torch.Generator().manual_seed(0)))
    method = importlib.import_module("example_of_a_method").Nearest()
    (config,) = method.candidates(layer)
    packed = method.compress(data, layer, config).packed
    assert config.stored_bits(layer).total == 96 * 128 * 3.25
    assert torch.equal(packed.decode(), parse_method("rtn").compress(data, layer, config).packed.decode())
