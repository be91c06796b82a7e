"""Whatever is typed, and whatever lies in a folder: a clear ValueError or success, in bounded time."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save

from harness.cli.clean import _bytes, _days
from harness.cli.options import _read_seeds, positive_seconds
from harness.data.checkpoint import INDEX, WEIGHTS, checkpoint_files, fingerprint, view
from harness.data.protocols import parse_calibration, parse_protocol, parse_training
from harness.data.sealed import Damaged, check_tensors, load_tensors, read_sealed
from harness.data.tasks import parse_tasks
from harness.model import inventory, load_reference, read_config, skeleton
from harness.plan.budgets import parse_budget
from harness.store.records import Artifact
from kernels.formats.bitpack import pack, packed_words, unpack
from methods import METHODS, parse_method, split_methods

fuzz = settings(
    deadline=None,
    max_examples=150,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
few = settings(fuzz, max_examples=40)

# What people type, and what they do not.
WORDS = st.one_of(
    st.text(max_size=30),
    st.lists(
        st.sampled_from([*METHODS, "wiki-mini", "c4-mini", "c4", ":", "@", "/", "x", ",", "=", "512", "0", "-1", "1e9"])
        | st.sampled_from(
            ["bits", "group", "damp", "nan", "inf", "true", "data-free", "99999999999999999999", "٣", "½"]
        ),
        max_size=8,
    ).map("".join),
)
PARSERS = [
    parse_method,
    parse_protocol,
    parse_calibration,
    parse_training,
    parse_budget,
    parse_tasks,
    split_methods,
    _read_seeds,
]


@pytest.mark.parametrize("parse", PARSERS, ids=lambda parse: parse.__name__)
@fuzz
@given(text=WORDS)
def test_options_are_read_or_refused(parse, text):
    try:
        parse(text)
    except ValueError as error:
        assert str(error)


@fuzz
@given(text=WORDS)
def test_numbers_with_units_are_read_or_refused(text):
    import argparse

    for parse in (positive_seconds, _days, _bytes):
        try:
            assert parse(text) >= 0
        except argparse.ArgumentTypeError as error:
            assert "write for example" in str(error)


@fuzz
@given(name=st.sampled_from(list(METHODS)), data=st.data())
def test_options_of_methods_are_read_or_refused(name, data):
    """Every option of every method with values of all kinds."""
    import dataclasses

    names = [field.name for field in dataclasses.fields(parse_method(name))]
    values = st.sampled_from(["0", "-1", "3", "1e-3", "nan", "inf", "none", "auto", "true", "x", "", "9" * 30])
    chosen = data.draw(st.dictionaries(st.sampled_from(names or ["x"]), values, max_size=3))
    try:
        method = parse_method(f"{name}:{','.join(f'{key}={value}' for key, value in chosen.items())}")
    except ValueError as error:
        assert name in str(error)
    else:
        assert parse_method(method.text) == method


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=10),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=10), inner, max_size=3),
    max_leaves=8,
)
FIELDS = (
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "vocab_size",
    "intermediate_size",
    "rope_parameters",
)
VALUES = st.integers(-3, 3) | st.sampled_from([2**31, 10**9, 2**70]) | JSON


@few
@given(
    changes=st.dictionaries(st.sampled_from([*FIELDS, "model_type", "torch_dtype", "hidden_act"]), VALUES, max_size=2)
)
def test_configurations_are_read_or_refused(changes, tiny, tmp_path):
    config = json.loads((tiny / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | changes))
    try:
        inventory(skeleton(read_config(tmp_path)))
    except ValueError as error:
        assert len(str(error).splitlines()) == 1


@few
@given(content=JSON | st.dictionaries(st.just("weight_map"), JSON, min_size=1))
def test_indices_of_shards_are_read_or_refused(content, tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / INDEX).write_text(json.dumps(content))
    try:
        assert checkpoint_files(tmp_path) == [tmp_path / "config.json", tmp_path / INDEX]  # an empty map
    except ValueError as error:
        assert str(tmp_path) in str(error)


HEADERS = st.dictionaries(
    st.text(max_size=8),
    st.fixed_dictionaries(
        {"dtype": st.sampled_from(["F32", "F16", "X9"]), "shape": st.lists(st.integers(-1, 9)), "data_offsets": JSON}
    )
    | JSON,
    max_size=3,
)


@st.composite
def _tensor_files(draw: st.DrawFn) -> bytes:
    """Files of tensors: of any bytes, of any header, and whole ones with a wrong byte or end."""
    kind = draw(st.integers(0, 2))
    if kind == 0:
        return draw(st.binary(max_size=200))
    if kind == 1:
        header = json.dumps(draw(HEADERS)).encode()
        return (
            draw(st.sampled_from([len(header), 2**63, 0])).to_bytes(8, "little") + header + draw(st.binary(max_size=99))
        )
    content = bytearray(save({"a": torch.arange(9.0)}, {"sha256": "0" * 64}))
    content[draw(st.integers(0, len(content) - 1))] ^= draw(st.integers(1, 255))
    return bytes(content[: draw(st.integers(0, len(content)))])


@fuzz
@given(content=_tensor_files())
def test_tensors_of_the_cache_are_read_or_damaged(content, tmp_path):
    path = tmp_path / "t.safetensors"
    path.write_bytes(content)
    for read in (load_tensors, check_tensors):
        with pytest.raises(Damaged):
            read(path)


@fuzz
@given(content=st.binary(max_size=99) | JSON.map(lambda data: json.dumps(data).encode()))
def test_records_of_the_cache_are_read_or_damaged(content, tmp_path):
    path = tmp_path / "t.json"
    path.write_bytes(content)
    for read in (read_sealed, Artifact.read):
        with pytest.raises(Damaged, match="json"):
            read(path)


@few
@given(content=_tensor_files())
def test_weights_are_read_or_refused(content, tiny, session_folder):
    folder = session_folder / "weights-of-any-kind"
    if not folder.exists():
        shutil.copytree(tiny, folder)
    (folder / WEIGHTS).write_bytes(content)
    with pytest.raises(ValueError) as caught:
        load_reference(folder, "cpu", torch.float32)
    assert len(str(caught.value).splitlines()) == 1


@fuzz
@given(bits=st.integers(1, 16), count=st.integers(1, 70), rows=st.integers(1, 4), seed=st.integers(0, 99))
def test_any_words_are_codes_in_their_range(bits, count, rows, seed):
    generator = torch.Generator().manual_seed(seed)
    size = (rows, packed_words(count, bits))
    words_OW = torch.randint(-(2**31), 2**31, size, generator=generator).to(torch.int32)
    codes_ON = unpack(words_OW, bits, count)
    assert int(codes_ON.min()) >= 0 and int(codes_ON.max()) < 2**bits
    assert torch.equal(unpack(pack(codes_ON, bits), bits, count), codes_ON)


def test_a_view_holds_nothing_else(tiny, tmp_path):
    folder = shutil.copytree(tiny, tmp_path / "model")
    for name in ("pytorch_model.bin", "evil.py", "adapter_config.json", "other.safetensors"):
        (folder / name).write_bytes(b"?")
    with view(folder) as files:
        assert not {p.name for p in files.iterdir()} & {"pytorch_model.bin", "evil.py", "adapter_config.json"}
        assert all(Path(p).is_symlink() for p in files.iterdir())
    assert len(fingerprint(folder)) == 64
