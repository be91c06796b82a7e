"""What is in a cell's key, and what is not."""

import dataclasses
import json
import sys
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import pytest

from harness.data.assets import ResolvedModel
from harness.data.protocols import Calibration
from harness.plan.budgets import Budget
from harness.plan.cells import Cell, Compute
from harness.plan.earlier import adopt, earlier_identity, earlier_key
from harness.store.cells import CellStore
from methods import METHODS, parse_method
from methods.base import codec_versions
from methods.gptq import GPTQ

EARLIER = json.loads(Path(__file__).with_name("earlier_identities.json").read_text())
DEFAULTS = json.loads(Path(__file__).with_name("defaults.json").read_text())


def cell(text: str) -> Cell:
    return Cell(
        parse_method(text),
        text,
        ResolvedModel("tiny", Path("tiny"), "f" * 64),
        Budget("3.25", Fraction(13, 4)),
        Calibration("c4-mini", 512, 24),
        None,
        0,
        Compute("cpu", "float32", 1),
        "text",
    )


def test_an_option_added_with_its_default_changes_no_key():
    @dataclass(frozen=True, kw_only=True)
    class Later(GPTQ):
        follow: float = 0.0

    assert Later().identity() == GPTQ().identity()
    assert Later(follow=0.5).identity() != GPTQ().identity()
    assert Later(damp=0.01).identity() == GPTQ(damp=0.01).identity() != GPTQ().identity()


@pytest.mark.parametrize(
    "codec, users, others",
    [
        ("error_feedback", {"gptq", "gptvq", "reallm", "gptq-lora"}, {"rtn", "nf", "fp16", "qlora", "lq-lora"}),
        ("vector", {"gptvq", "reallm", "nf", "lq-lora", "qlora"}, {"rtn", "fp16"}),
        ("vector_feedback", {"gptvq", "reallm"}, {"gptq", "lq-lora"}),
        ("grids", {"rtn", "gptq", "gptq-lora"}, {"nf", "gptvq"}),
        ("kernels.formats.scales", {"nf", "gptvq", "reallm", "lq-lora"}, {"fp16"}),
        ("kernels.formats.order", {"reallm"}, {"rtn", "gptq", "fp16"}),
    ],
)
def test_a_change_of_a_codec_reaches_every_method_that_uses_it(codec, users, others, monkeypatch):
    classes = {name: METHODS.get(name) for name in METHODS}
    before = {name: cell(name).key for name in classes}
    codec_versions.cache_clear()
    module = codec if "." in codec else f"methods.codecs.{codec}"
    monkeypatch.setattr(sys.modules[module], "VERSION", 2, raising=False)
    try:
        changed = {name for name in classes if cell(name).key != before[name]}
    finally:
        codec_versions.cache_clear()
    assert users <= changed and not others & changed


@pytest.mark.parametrize("name", list(METHODS))
def test_defaults_of_a_version_stay(name):
    """The key holds the options that differ from their defaults: a default that changes needs a new version, here and
    in the class."""
    default = METHODS.get(name)()
    for variant in {type(method): method for method in (default, *default.variants().values())}:
        known = DEFAULTS[variant().text]
        assert known["version"] == variant.version
        now = {field.name: field.default for field in dataclasses.fields(variant)}
        assert {option: now.get(option, "gone") for option in known["defaults"]} == known["defaults"]


@pytest.mark.parametrize("text", EARLIER)
def test_the_earlier_key_of_a_configuration_is_known(text):
    """Identities as the code before this one wrote them into its keys."""
    assert earlier_identity(parse_method(text)) == EARLIER[text]


def test_what_could_not_be_asked_for_earlier_has_no_earlier_key():
    @dataclass(frozen=True, kw_only=True)
    class Later(GPTQ):
        follow: float = 0.0

    assert earlier_key(cell("gptq")) not in (None, cell("gptq").key)
    assert earlier_identity(Later()) == EARLIER["gptq"] and earlier_identity(Later(follow=0.5)) is None


def older_cache(wanted: Cell) -> Path:
    folder = CellStore(earlier_key(wanted)).folder
    folder.mkdir(parents=True)
    (folder / "log.txt").write_text("hello")
    return folder


def test_cells_of_an_older_cache_are_found(tmp_path, monkeypatch):
    monkeypatch.setenv("HARNESS_CACHE", str(tmp_path))
    wanted, said = cell("reallm:released,rounds=3"), []
    old = older_cache(wanted)
    adopt([wanted], said.append)
    assert not old.exists() and (CellStore(wanted.key).folder / "log.txt").read_text() == "hello"
    assert len(said) == 1 and "found under the key of an earlier version" in said[0]
    adopt([wanted], said.append)
    assert len(said) == 1


def test_where_the_bytes_would_be_others_one_line_says_so(tmp_path, monkeypatch):
    monkeypatch.setenv("HARNESS_CACHE", str(tmp_path))
    old, said = older_cache(cell("gptq")), []
    monkeypatch.setattr(GPTQ, "version", 2)
    adopt([cell("gptq")], said.append)
    assert old.exists() and len(said) == 1 and "stored other bytes" in said[0]
