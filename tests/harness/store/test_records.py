"""Records on disk: round trips, what is said of a file that is wrong, files of earlier versions, keys."""

import dataclasses
import json
import math
from dataclasses import replace
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, ClassVar, get_args, get_origin, get_type_hints

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from harness.data.assets import ResolvedModel
from harness.data.files import digest
from harness.data.protocols import (
    Calibration,
    Protocol,
    Training,
    parse_calibration,
    parse_protocol,
    parse_training,
    protocol_key,
)
from harness.data.record import Record
from harness.data.tasks import Task
from harness.store.cells import CellStore
from harness.store.records import AllocationRecord, Artifact, CellSpec
from harness.store.results import Bench, Score, TaskResult
from kernels.formats.layer import LayerConfig

EARLIER = Path(__file__).parent / "earlier"  # as the harness wrote them before records had versions
STORED = (AllocationRecord, Artifact, Bench, CellSpec, Score, TaskResult)
ASKED = (Protocol, ResolvedModel, Task, Training)

# --- round trips

TEXT = st.text(max_size=8)
SCALARS: dict[Any, st.SearchStrategy] = {
    bool: st.booleans(),
    int: st.integers(-(2**53), 2**53),
    float: st.floats(),
    str: TEXT,
    type(None): st.none(),
    Path: st.lists(st.sampled_from(["a", "bü", ".."]), min_size=1).map(lambda parts: Path(*parts)),
    LayerConfig: st.dictionaries(st.sampled_from(["bits", "group"]), st.integers(1, 8)).map(
        lambda hyper: LayerConfig.of("uniform", **hyper)
    ),
}


# A perplexity is shown of every score: there is a window, and weights are sizes.
LOSSES = st.one_of(st.floats(-100, 1000), st.sampled_from([math.nan, math.inf, -math.inf]))
FIELDS: dict[str, st.SearchStrategy] = {
    "window_nll": st.lists(LOSSES, min_size=2, max_size=2).map(tuple),
    "window_weight": st.one_of(st.none(), st.lists(st.floats(1, 1e6), min_size=2, max_size=2).map(tuple)),
}


def of_type(annotation: Any) -> st.SearchStrategy:
    """Values of a field of a record."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if annotation in SCALARS:
        return SCALARS[annotation]
    if origin is Annotated:
        return of_type(arguments[0])
    if origin is UnionType:
        return st.one_of(*map(of_type, arguments))
    if origin is tuple:
        return st.lists(of_type(arguments[0]), max_size=3).map(tuple)
    if origin is dict:
        return st.dictionaries(TEXT, of_type(arguments[1]), max_size=2)
    return records(annotation)


def records(kind: type[Record]) -> st.SearchStrategy:
    hints, names = get_type_hints(kind, include_extras=True), [field.name for field in dataclasses.fields(kind)]
    return st.builds(kind, **{name: FIELDS[name] if name in FIELDS else of_type(hints[name]) for name in names})


def plain(record: Record) -> str:
    """Unlike ==, this holds of two numbers that are none."""
    return json.dumps(record.to_json())


@pytest.mark.parametrize("kind", STORED + ASKED, ids=lambda kind: kind.__name__)
def test_every_record_comes_back_as_it_was(kind, tmp_path):
    @settings(max_examples=25, deadline=None)
    @given(records(kind))
    def round_trip(record):
        record.write(tmp_path / "record.json")
        again = kind.read(tmp_path / "record.json")
        assert repr(again) == repr(record) and plain(again) == plain(record)

    round_trip()


# --- what is wrong with a file


@dataclasses.dataclass(frozen=True)
class Inner(Record):
    values: tuple[float, ...]


@dataclasses.dataclass(frozen=True)
class Outer(Record):
    VERSION: ClassVar[int] = 2
    SHOWN: ClassVar[tuple[str, ...]] = ("total",)

    name: str
    inner: dict[str, Inner]
    limit: int | None = None

    @classmethod
    def upgrade(cls, data: dict[str, Any], version: int) -> dict[str, Any]:
        return {"name": data.pop("title"), **data}

    @property
    def total(self) -> float:
        return math.fsum(value for inner in self.inner.values() for value in inner.values)


GOOD = {"version": 2, "total": 0.0, "name": "a", "inner": {"x": {"values": [1, math.nan, math.inf]}}, "limit": None}


def test_a_record_is_read_strictly_and_its_shown_values_are_ignored():
    record = Outer.from_json(GOOD)
    assert repr(record) == "Outer(name='a', inner={'x': Inner(values=(1.0, nan, inf))}, limit=None)"
    earlier = {"title": "a", "inner": {"x": {"values": [1, math.nan, math.inf]}}}
    assert repr(Outer.from_json(earlier)) == repr(record)  # a file without a version is of the first


@pytest.mark.parametrize(
    "change, hint",
    [
        ({"colour": 1}, "the field 'colour' is unknown"),
        ({"inner": {"x": {"values": [], "more": 1}}}, "the field 'inner.x.more' is unknown"),
        ({"inner": {"x": {}}}, "the field 'inner.x.values' is missing"),
        ({"inner": {"x": {"values": [1, "2"]}}}, "'inner.x.values.1': '2' is wrong"),
        ({"inner": {"x": {"values": [True]}}}, "'inner.x.values.0': True is wrong"),
        ({"inner": [1]}, "'inner': (1,) is wrong"),
        ({"name": None}, "'name': None is wrong"),
        ({"limit": 1.5}, "'limit': 1.5 is wrong"),
        ({"version": 3}, "version 3 is of a later harness, this one knows 2; update the harness"),
        ({"version": "2"}, "version is '2', not a number"),
        ({"version": 1}, "the field 'title' is missing"),
    ],
)
def test_a_wrong_file_is_one_line_with_file_and_field(change, hint, tmp_path):
    path = tmp_path / "outer.json"
    path.write_text(json.dumps(GOOD | change))
    with pytest.raises(ValueError) as error:
        Outer.read(path)
    message = str(error.value)
    assert message.startswith(f"{path}: ") and hint in message and len(message.splitlines()) == 1


@pytest.mark.parametrize("text", ["", "{", "[1]", '"a"', "null"])
def test_what_is_no_record_at_all_is_one_line_too(text, tmp_path):
    path = tmp_path / "outer.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"outer\.json (is no JSON|holds no object)"):
        Outer.read(path)


def test_a_layer_without_a_format_is_named(tmp_path):
    data = json.loads((EARLIER / "plan.json").read_text())
    del data["layers"]["model.layers.0.self_attn.q_proj"]["format"]
    with pytest.raises(ValueError, match=r"self_attn.q_proj': .* is no configuration of a layer"):
        AllocationRecord.from_json(data)


# --- files of earlier versions


@pytest.fixture
def store(tmp_path, monkeypatch):
    """A finished cell of an earlier version, in a cache of its own."""
    monkeypatch.setenv("HARNESS_CACHE", str(tmp_path))
    store = CellStore("c952a3c8924fb70e")
    store.folder.mkdir(parents=True)
    suffix = {"score": "_abd656de52de1e20", "task": "_1", "bench": "_2"}
    for path in EARLIER.glob("*.json"):
        (store.folder / f"{path.stem}{suffix.get(path.stem, '')}.json").write_bytes(path.read_bytes())
    return store


def earlier(name: str) -> dict[str, Any]:
    return json.loads((EARLIER / f"{name}.json").read_text())


def test_a_finished_cell_of_an_earlier_version_is_found(store):
    assert store.finished(["abd656de52de1e20"], ["1"]) and not store.finished(["another"])
    spec, artifact, allocation = store.spec(), store.artifact(), store.allocation()
    assert spec == artifact.spec  # where the cell's process was told to look for the reference is forgotten
    assert (spec.method, spec.method_text, spec.method_version) == ("reallm:finetuned", "reallm:finetuned", 3)
    assert spec.options["finetune"] is True and spec.options["dim"] is None and "version" not in spec.options
    assert spec.protocols["abd656de52de1e20"] == parse_protocol("wiki-mini@128/4") and spec.configs == {}
    assert spec.model.path == Path("models/two-blocks") and spec.training.windows.source == "c4-mini"
    was = earlier("artifact")
    assert (artifact.stored_bpw, artifact.code_bpw) == (was["stored_bpw"], was["code_bpw"])
    assert artifact.allocation == allocation.prediction and allocation.layers.keys() == artifact.layers.keys()
    layer, before = artifact.layers["model.layers.0.self_attn.k_proj"], was["layers"]["model.layers.0.self_attn.k_proj"]
    assert layer.role == "self_attn.k_proj" and layer.config.to_json() == before["config"]
    assert layer.report == before["report"] and type(layer.report["tuning_steps"]) is int
    assert artifact.training.losses == tuple(was["training"]["losses"])
    assert spec.training.loss == artifact.training.text.loss == "next-token"  # there was no other


def test_scores_tasks_and_measurements_of_an_earlier_version_are_read(store):
    score, task, bench = store.score("abd656de52de1e20"), store.task("1"), store.bench("2")
    was = earlier("score")
    assert (score.ppl, score.nonfinite_windows) == (was["ppl"], was["nonfinite_windows"])
    was["divergence"] |= {"kld_p999": None, "reverse_kld": None, "histogram": [], "position_kld": []}  # added since
    assert score.to_json() == {"version": 1, "cost": None, **was}
    assert task.marks("acc") == [0, 1, 1] and task.to_json() == {"version": 1, **earlier("task")}
    assert bench.decode["1"].speed_up.median > 0 and len(bench.kernels) == 2 and bench.machine.gpu is None
    assert bench.memory.peak_bytes == bench.memory.process_peak_bytes


def test_the_reference_of_an_earlier_version_is_read():
    artifact = Artifact.read(EARLIER / "artifact_of_the_reference.json")
    assert artifact.allocation is None and artifact.training is None and artifact.spec.is_reference
    assert artifact.spec.budget is None and artifact.spec.configs["model.layers.0.self_attn.q_proj"].format == "dense"


def test_what_was_read_is_written_in_the_version_of_today(store):
    store.put_spec(store.spec())
    store.put_allocation(store.allocation())
    store.put_artifact(store.artifact())
    assert json.loads((store.folder / "spec.json").read_text())["version"] == CellSpec.VERSION
    assert store.artifact() == Artifact.read(EARLIER / "artifact.json")
    (store.folder / "plan.json").unlink()
    assert store.allocation() == AllocationRecord.read(EARLIER / "plan.json")


# --- keys


@pytest.mark.parametrize(
    "text, bos, key",
    [
        ("wiki-mini@512", "text", "ef109c13d9cca0d9"),
        ("c4@2048", "window", "56b8880f0514ce0a"),
        ("wikitext2@2048/20", "text", "3530f3229d8396f9"),
        ("wiki-mini:tuning@128/4", "text", "7cfbc586ae396ea8"),
        ("wikitext2-words@1024", "text", "158224aa00808d20"),
    ],
)
def test_keys_of_protocols_never_change(text, bos, key):
    protocol = parse_protocol(text, bos)
    assert protocol_key(protocol) == key and Protocol.from_json(protocol.to_json()) == protocol


def test_keys_of_texts_and_calibrations_never_change():
    assert protocol_key(replace(parse_protocol("c4-new@2048"), text_sha256="ab" * 32)) == "d578d7ebd2db805c"
    calibration, training = parse_calibration("c4-mini@512x24"), parse_training("c4@1024x2048/8")
    assert digest(calibration.to_json())[:16] == "5697160e3fd0df97"
    # As it was when there was no other loss, and then while training began with the windows of calibration.
    assert digest(replace(training, loss="next-token", apart=False).identity)[:16] == "4dd8c02de0f25866"
    assert digest(replace(training, apart=False).identity)[:16] == "1c6e82637371c858"
    assert digest(training.identity)[:16] == "1511d91026654802"
    assert Calibration.from_json(calibration.to_json()) == calibration
    assert Training.from_json(training.to_json()) == training


@pytest.mark.parametrize(
    "task, key",
    [
        (Task("piqa", "1.0", "validation", ("acc", "acc_norm")), "58a11e78fb46fe57"),
        (Task("hellaswag", "1.0", "validation", ("acc", "acc_norm"), "hub", 5), "446cfbfb888369bd"),
        (Task("copa", "1.0", "validation", ("acc",), limit=100), "9fabd6deebad33c7"),
    ],
)
def test_keys_of_tasks_never_change(task, key):
    assert task.key == key and Task.from_json(task.to_json()) == task
