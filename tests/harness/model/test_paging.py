"""Models larger than memory: the same bytes and numbers from blocks that are in memory only while they run."""

import contextlib
import re
import resource
import sys
from multiprocessing import forkserver
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig

from harness.compress.distil import remember_states
from harness.data.tensor_file import NAMES, TensorFile, TensorSpec, write_tensor_file
from harness.model import load_reference
from harness.model.described import describe
from harness.model.paging import load_by_blocks, pages_of, resident, tensor_of
from harness.plan.budgets import Budget
from harness.plan.cells import Cell, Compute
from harness.plan.memory import predicted_phases
from harness.plan.sensitivity import measure_sensitivities
from harness.report.baseline import read_rows
from harness.store.cells import CellStore
from methods import parse_method
from tests.helpers import SMALL, byte_tokenizer, linked_cache, run_harness, steady

UNTOUCHED = 128 << 20  # bytes that libraries reserve when they are first used, on other machines than ours


def test_a_file_is_the_librarys_byte_for_byte(tmp_path):
    tensors = {f"{name} {size}": torch.ones(size).to(dtype) for dtype, name in NAMES.items() for size in (0, 3, 10)}
    for metadata in (None, {"a": "é"}):
        save_file(tensors, tmp_path / "theirs", metadata=metadata)
        specs = {name: TensorSpec.of(tensor) for name, tensor in tensors.items()}
        write_tensor_file(tmp_path / "ours", specs, tensors.__getitem__, metadata)
        assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()
    file = TensorFile(tmp_path / "theirs")
    assert all(torch.equal(file.read(name), tensor) for name, tensor in tensors.items())
    (tmp_path / "cut").write_bytes((tmp_path / "theirs").read_bytes()[:-1])
    with pytest.raises(ValueError, match="no whole safetensors file"):
        TensorFile(tmp_path / "cut")


@pytest.fixture(scope="module")
def pair(two_blocks):
    """The first blocks of the real model, whole and paged."""
    return [
        load(two_blocks.path, "cpu", torch.float32, two_blocks.fingerprint) for load in (load_reference, load_by_blocks)
    ]


def test_what_is_read_is_what_a_whole_model_holds(pair):
    whole, paged = pair
    state = whole.state_dict()
    assert state.keys() == paged.state_dict().keys()
    assert all(torch.equal(tensor, tensor_of(paged, name)) for name, tensor in state.items())
    tokens_NT = torch.arange(24).view(2, 12)
    with torch.no_grad():
        assert torch.equal(whole(tokens_NT).logits, paged(tokens_NT).logits)
    assert torch.equal(whole.generate(tokens_NT, max_new_tokens=3), paged.generate(tokens_NT, max_new_tokens=3))


def test_a_block_is_in_memory_only_while_it_is_used(pair):
    block = pages_of(pair[1]).blocks[1]
    assert all(parameter.is_meta for parameter in block.parameters())
    with resident(pair[1], 1), resident(pair[1], 1):
        pair[1](torch.zeros(1, 2, dtype=torch.long))
        assert not any(parameter.is_meta for parameter in block.parameters())
    assert all(parameter.is_meta for parameter in block.parameters())


def test_sensitivities_are_the_same(pair):
    tokens_NT = torch.arange(64).view(2, 32)
    whole, paged = (measure_sensitivities(model, tokens_NT, seed=0) for model in pair)
    assert whole.keys() == paged.keys()
    assert all(
        torch.equal(whole[n].row_O, s.row_O) and torch.equal(whole[n].column_I, s.column_I) for n, s in paged.items()
    )


def test_remembered_states_are_the_same_and_read_the_model_once(pair, tmp_path):
    tokens_NT = torch.arange(96).view(3, 32)
    sources, reads = pages_of(pair[1]).sources[1], []
    name, read = next(iter(sources.items()))
    sources[name] = lambda: (reads.append(name), read())[1]
    try:
        for model, folder in zip(pair, (tmp_path / "whole", tmp_path / "paged"), strict=True):
            remember_states(model, tokens_NT, folder)
    finally:
        sources[name] = read
    assert len(reads) == 1
    files = sorted(path.name for path in (tmp_path / "whole").iterdir())
    assert len(files) == 3 and files == sorted(path.name for path in (tmp_path / "paged").iterdir())
    assert all((tmp_path / "whole" / f).read_bytes() == (tmp_path / "paged" / f).read_bytes() for f in files)


def test_other_architectures_are_read_or_refused(tmp_path):
    from tests.harness.test_architectures import FAMILIES

    torch.manual_seed(0)
    outcomes = {}
    for name, (kind, values) in FAMILIES.items():
        AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **values)).save_pretrained(tmp_path / name)
        whole = load_reference(tmp_path / name, "cpu", torch.float32)
        try:
            paged = load_by_blocks(tmp_path / name, "cpu", torch.float32)
        except ValueError as error:
            assert "write --load whole" in str(error)
            outcomes[name] = False
            continue
        tokens_NT = torch.arange(8).view(1, 8) + 3
        with torch.no_grad():
            assert torch.equal(whole(tokens_NT).logits, paged(tokens_NT).logits), name
        outcomes[name] = True
    assert outcomes["qwen2"] and outcomes["gemma3"] and not outcomes["gpt2"] and not outcomes["mixtral"], outcomes


def test_a_run_by_blocks_is_that_of_whole_models(finished, truncated, assets_cache, estimates, tmp_path):
    cache = linked_cache(assets_cache, tmp_path / "cache", estimates)
    arguments = ("--model", str(truncated.path), "--methods", "gptq", "--bits", "3.25", *SMALL, "--load", "blocks")
    done = run_harness("run", *arguments, "--out", str(tmp_path / "out"), HARNESS_CACHE=str(cache))
    assert done.returncode == 0, done.stderr
    whole, paged = steady(read_rows(finished / "out")), steady(read_rows(tmp_path / "out"))
    ranked = {"rank", "memory", "peak_ram_gib"}
    for label, row in paged.items():
        differing = {name for name, value in row.items() if whole[label].get(name) != value}
        assert not {name for name in differing if name not in ranked and not name.startswith("rank")}, differing
    for folder in (cache / "cells").glob("*/packed.safetensors"):
        twin = finished / "cache" / "cells" / folder.parent.name / folder.name
        assert folder.read_bytes() == twin.read_bytes()
    assert re.search(r"compress: .* s a block; .* GiB read; at most .* GiB of memory", done.stderr)


def test_damaged_weights_are_refused_by_name(two_blocks, tmp_path):
    from safetensors.torch import load_file

    for file in two_blocks.path.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    tensors = load_file(tmp_path / "model.safetensors")
    broken = "model.layers.1.mlp.up_proj.weight"
    tensors[broken][0, 0] = float("nan")
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    model = load_by_blocks(tmp_path, "cpu", torch.float32)
    with pytest.raises(ValueError, match=f"no finite numbers.*{broken}"):
        model(torch.zeros(1, 2, dtype=torch.long))
    save_file({n: t for n, t in tensors.items() if n != broken}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=f"{broken} first.*write --load whole"):
        load_by_blocks(tmp_path, "cpu", torch.float32)


def _large_model(folder):
    """A random Llama of 200 MiB in fp32, half of that on disk, that reads bytes."""
    tokenizer = byte_tokenizer()
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    sizes = dict(hidden_size=512, intermediate_size=1408, num_attention_heads=8, num_key_value_heads=8)
    config = LlamaConfig(
        num_hidden_layers=16, max_position_embeddings=1024, tie_word_embeddings=True, vocab_size=len(tokenizer), **sizes
    )
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float16)
    model.save_pretrained(folder, max_shard_size="50MB")
    return 4 * sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.skipif(sys.platform != "linux", reason="memory is limited and read as Linux does")
def test_a_model_of_three_times_the_memory_goes_to_a_row(tiny, assets_cache, tmp_path, monkeypatch):
    """Granted is a third of the weights, beyond what a cell of a tiny model takes: held against the kernel's count of
    the most memory, and (with what libraries reserve and never touch) set as a limit that the whole model hits."""
    need = _large_model(tmp_path / "large")  # in fp32; the files are half of it
    grant = need // 3
    cache = linked_cache(assets_cache, tmp_path / "cache")
    asked = ("--methods", "rtn", "--bits", "3.25", "--jobs", "1", "--no-bench", "--protocols", "wiki-mini@128/2")

    def run(model, load="blocks"):
        where = ("--model", str(model), "--load", load, "--out", str(tmp_path / f"{model.name} {load}"))
        run_harness("run", *asked, *where, HARNESS_CACHE=str(cache))
        return read_rows(tmp_path / f"{model.name} {load}")

    def most(rows):
        return max(float(row["peak_ram_gib"]) for row in rows.values()) * 2**30

    interpreter = most(run(tiny))
    with _limited(UNTOUCHED + grant):
        rows = run(tmp_path / "large", "whole")
        assert "ok" not in {row["status"] for row in rows.values()}
        rows = run(tmp_path / "large")
    assert [row["status"] for row in rows.values()] == ["ok", "ok"]
    assert most(rows) < interpreter + grant
    monkeypatch.setenv("HARNESS_CACHE", str(cache))
    known = describe(tmp_path / "large")
    for row in rows.values():
        artifact = CellStore(row["cell"]).artifact()
        for name, predicted in _predicted(artifact.spec, known).items():
            assert artifact.phases[name].peak_gib == pytest.approx(predicted, rel=0.25), name
        if estimating := artifact.phases.get("estimate errors"):  # every weight is read once, two bytes of its four
            assert estimating.read_gib * 2**30 / need == pytest.approx(0.5, rel=0.1)


def _predicted(spec, known):
    """What the plan says of the phases in which a model is compressed."""
    compute = Compute(spec.device, spec.dtype, spec.threads)
    budget = spec.budget and Budget.parse(spec.budget)
    cell = Cell(
        parse_method(spec.method), "", spec.model, budget, None, None, 0, compute, spec.bos, allocate=spec.allocate
    )
    phases = predicted_phases(cell, known.stock, known.hidden, known.vocabulary, by_blocks=True)
    return {name: gib for name, gib in phases.items() if name != "score"}


@contextlib.contextmanager
def _limited(more):
    """Cells may reserve this many bytes more than the process they are forked from has."""
    server = forkserver._forkserver._forkserver_pid
    reserved = 1024 * int(re.search(r"VmData:\s+(\d+)", Path(f"/proc/{server}/status").read_text())[1])
    before = resource.prlimit(server, resource.RLIMIT_DATA)
    resource.prlimit(server, resource.RLIMIT_DATA, (reserved + more, before[1]))
    try:
        yield
    finally:
        resource.prlimit(server, resource.RLIMIT_DATA, before)
