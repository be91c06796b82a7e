"""Tables that layers share, weights that follow their inputs' drift, and blocks tuned as a whole: on the first blocks
of the real model."""

import itertools
import random
import subprocess
import sys
from fractions import Fraction
from functools import cache

import pytest
import torch
from safetensors.torch import load_file

from harness.compress.block import BlockRun
from harness.compress.forward import BlockInputs
from harness.compress.loop import compress_model
from harness.compressed import CompressedModel
from harness.data.protocols import parse_calibration
from harness.data.windows import calibration_windows
from harness.ledger import payload_bytes, planned
from harness.model import BlockSpec, Inventory, inventory, load_reference, read_config, skeleton
from harness.plan.allocation import mixed
from kernels.formats.layer import LayerConfig, LayerSpec, shared_bits
from kernels.formats.mlp_table import MlpTable
from methods import parse_method
from methods.base import LayerData
from methods.codecs.drift import followed

SHAPE = (4, 9)
RESUMED = "reallm:blockwise,epochs=1,latent=vectors"  # behind two finished blocks: it needs a third
TEXTS = (RESUMED, "reallm:data-free,rounds=1", "reallm:data-free,rounds=1,decoder=mlp")


@pytest.fixture(scope="module")
def tokens(short_tokenizer) -> torch.Tensor:
    return calibration_windows(parse_calibration("c4-mini@128x4"), short_tokenizer, seed=0).tokens_NT


def shared_plan(method, stock, rank=2):
    """The shared codebook for up and down projections, one of their own for the others."""
    plan = {}
    for layer in stock.layers:
        shared = "up_proj" in layer.name or "down_proj" in layer.name
        form = "learnt" if not shared else "mlp" if method.decoder == "mlp" else "plain"
        wanted = dict(rank=rank, block=64, table=form) | dict(
            zip(("dim", "index_bits"), SHAPE if shared else (2, 6), strict=True)
        )
        plan[layer.name] = next(
            c for c in method.candidates(layer) if all(c[key] == value for key, value in wanted.items())
        )
        assert bool(plan[layer.name].table_key) == shared
    return plan


def compress(folder, text, tokens, path):
    model, method = load_reference(path, "cpu", torch.float32), parse_method(text)
    plan = shared_plan(method, inventory(model))
    compressed, report = compress_model(model, inventory(model), method, plan, tokens, 0, folder)
    return compressed, plan, report


@pytest.fixture(scope="module")
def path_of(truncated, two_blocks):
    """Text of a method -> folder of the model it is tried on."""
    return lambda text: (truncated if text == RESUMED else two_blocks).path


@pytest.fixture(scope="module")
def whole(path_of, tokens, tmp_path_factory):
    """Text of a method -> (compressed model, plan, report, folder of blocks), once for all that only read them."""

    @cache
    def compressed_by(text):
        folder = tmp_path_factory.mktemp("whole")
        return *compress(folder, text, tokens, path_of(text)), folder

    return compressed_by


@pytest.mark.parametrize("text", TEXTS)
def test_shared_tables_are_stored_and_counted_once(text, whole, path_of, tmp_path):
    compressed, plan, report, _ = whole(text)
    assert len(compressed.tables) == 2
    if "mlp" in text:
        assert 2 * 2**9 * 4 * 16 > shared_bits(plan.values()).total == 2 * MlpTable(*SHAPE).stored_bits().total
    else:
        assert shared_bits(plan.values()).total == 2 * 2**9 * 4 * 16
    compressed.save(tmp_path / "artifact")
    stock = inventory(skeleton(read_config(path_of(text))))
    expected = planned(plan, stock.layers, stock.uncovered_bits, stock.weights)
    assert compressed.ledger() == expected
    assert 8 * payload_bytes(tmp_path / "artifact" / "packed.safetensors") == expected.stored_bits
    reports = [value for value in report.layers.values() if "loss_before" in value]
    assert len(reports) == (len(plan) if "epochs" in text else 0)
    assert all(value["loss_after"] <= value["loss_before"] for value in reports)
    assert not reports or any(value["loss_after"] < 0.99 * value["loss_before"] for value in reports)


AGAIN = """
import sys, torch
from pathlib import Path
from harness.compressed import CompressedModel
torch.set_num_threads(1)
for folder in map(Path, sys.argv[1:]):
    seen = torch.load(folder / "before.pt")
    loaded = CompressedModel.load(folder / "artifact", "cpu", torch.float32)
    assert torch.equal(loaded.model(seen["tokens"]).logits, seen["logits"]), folder
"""


def test_a_process_that_has_nothing_but_the_files_gives_the_same_logits(whole, tokens, tmp_path):
    folders = [tmp_path / str(index) for index in range(len(TEXTS))]
    for folder, text in zip(folders, TEXTS, strict=True):
        compressed = whole(text)[0]
        compressed.save(folder / "artifact")
        with torch.no_grad():
            before = compressed.model(tokens[:2, :64]).logits
        torch.save({"tokens": tokens[:2, :64], "logits": before}, folder / "before.pt")
    done = subprocess.run([sys.executable, "-c", AGAIN, *map(str, folders)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_resumed_compression_stores_the_same_bytes(whole, path_of, tokens, tmp_path):
    expected, _, _, blocks = whole(RESUMED)
    (tmp_path / "part").mkdir()
    for name in ("tables.safetensors", "block_0000.safetensors", "block_0001.safetensors"):
        (tmp_path / "part" / name).write_bytes((blocks / name).read_bytes())
    part, _, _ = compress(tmp_path / "part", RESUMED, tokens, path_of(RESUMED))
    left, right = expected.model.state_dict(), part.model.state_dict()
    assert left.keys() == right.keys()
    assert all(torch.equal(left[name], right[name]) for name in left)


def test_the_tables_of_a_plan_do_not_depend_on_how_far_it_came(whole, path_of, tmp_path):
    """Fitted again after a kill in front of the first block, they are the same."""
    text = "reallm:data-free,rounds=1"
    compress(tmp_path, text, None, path_of(text))
    again, first = (load_file(folder / "tables.safetensors") for folder in (tmp_path, whole(text)[-1]))
    assert all(torch.equal(first[name], again[name]) for name in first)


def test_drift_is_the_difference_of_two_models(truncated, tokens):
    """Inputs of every stage of block 1, from plain hooks on the uncompressed model and on the half-packed one."""
    model, original = (load_reference(truncated.path, "cpu", torch.float32) for _ in range(2))
    tokens = tokens[:4]
    stock = inventory(model)
    inputs, rtn = BlockInputs(model, tokens), parse_method("rtn")
    hidden, original_states = inputs.hidden, inputs.hidden.copy()
    config = {layer.name: rtn.candidates(layer)[0] for layer in stock.layers}
    for index in (0, 1):
        block = BlockRun(model, stock.blocks[index], inputs.block(index), hidden, original_states)
        with block:
            for stage in block.stages():
                name = stage[0]
                if index == 1:
                    got = block.drift(name)
                    clean = _inputs(original, name, tokens)
                    packed = _inputs(model, name, tokens)
                    expected = (clean - packed).T @ packed
                    assert torch.allclose(got, expected, atol=1e-3 * expected.abs().max()), name
                for name in stage:
                    block.install(name, rtn.compress(LayerData(block.weight(name)), block.layers[name], config[name]))
            original_states.replace(block.original_outputs())
            hidden.replace(block.outputs())
    with torch.no_grad():
        expected = original.model(tokens, output_hidden_states=True).hidden_states[2]
    assert torch.allclose(original_states.whole(), expected, atol=1e-4 * expected.abs().max())


@torch.no_grad()
def test_a_restored_block_is_the_original_until_it_is_packed_again(truncated, tokens):
    model, rtn = load_reference(truncated.path, "cpu", torch.float32), parse_method("rtn")
    stock, inputs = inventory(model), BlockInputs(model, tokens[:2])
    with BlockRun(model, stock.blocks[0], inputs.block(0), inputs.hidden, inputs.hidden) as block:
        packed = {
            name: rtn.compress(LayerData(block.weight(name)), layer, rtn.candidates(layer)[0])
            for name, layer in block.layers.items()
        }
        original = torch.cat([*block.original_outputs()])
        for name in packed:
            block.install(name, packed[name])
        outputs = torch.cat([*block.outputs()])
        assert not torch.allclose(outputs, original, rtol=1e-2)
        for name in packed:
            block.restore(name)
        assert torch.equal(block.run(inputs.hidden.whole()), original)
        for name in packed:
            block.install(name, packed[name])
        assert torch.equal(torch.cat([*block.outputs()]), outputs)


@torch.no_grad()
def _inputs(model, name, tokens):
    seen = []
    handle = model.get_submodule(name).register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    model(tokens)
    handle.remove()
    return seen[0].reshape(-1, seen[0].shape[-1])


def test_following_the_drift_gives_back_outputs():
    """Random inputs and a linear drift small enough for the damping."""
    generator = torch.Generator().manual_seed(0)
    weight, clean = torch.randn(6, 8, generator=generator), torch.randn(500, 8, generator=generator)
    drifted = clean @ (torch.eye(8) + 0.05 * torch.randn(8, 8, generator=generator))
    hessian, drift = drifted.T @ drifted, (clean - drifted).T @ drifted
    error = [
        float((clean @ weight.T - drifted @ w.T).norm())
        for w in (weight, *(followed(weight, hessian, drift, s) for s in (0.5, 1.0)))
    ]
    assert error[0] > error[1] > error[2] and error[2] < 0.25 * error[0]


@pytest.mark.parametrize("seed", range(20))
def test_a_table_is_bought_when_it_is_worth_its_bits(seed):
    """Against every plan there is: within the budget, the bound below the best, and the plan near it."""
    source = random.Random(seed)
    layers = tuple(LayerSpec(f"{kind}{n}", kind, 64, 64, False) for kind in "ab" for n in range(3))
    stock = Inventory((BlockSpec("block", layers),))
    costs = {}
    for layer in layers:
        own = [LayerConfig.of("codebook", dim=2, index_bits=b, block=64, table="learnt") for b in (3, 4, 6)]
        shared = LayerConfig.of("codebook", dim=4, index_bits=9, block=64, table="plain", share=layer.role)
        weight = source.lognormvariate(0, 1)
        gain = source.uniform(0.3, 1.2)
        costs[layer.name] = {
            c: weight * 4.0 ** (-c["index_bits"] / c["dim"]) * (gain if c.table_key else 1) for c in (*own, shared)
        }
    budget = Fraction(source.randint(30, 65), 10)
    best = float("inf")
    for picks in itertools.product(range(4), repeat=6):
        plan = {layer.name: list(costs[layer.name])[pick] for layer, pick in zip(layers, picks, strict=True)}
        if planned(plan, layers, 0, stock.weights).fits(budget):
            best = min(best, sum(costs[name][config] for name, config in plan.items()))
    allocation = mixed(stock, budget, costs)
    assert allocation.ledger.fits(budget)
    assert allocation.bound <= best * (1 + 1e-9) <= allocation.predicted * (1 + 2e-9)
    assert allocation.predicted <= 1.35 * best


def test_a_loaded_model_owns_its_tables(whole, tmp_path):
    compressed = whole("reallm:data-free,rounds=1")[0]
    compressed.save(tmp_path / "artifact")
    loaded = CompressedModel.load(tmp_path / "artifact", "cpu", torch.float32)
    assert loaded.tables.keys() == compressed.tables.keys() and "mlp.up_proj:plain4x9" in loaded.tables
    for key, table in loaded.tables.items():
        assert torch.equal(table.entries(), compressed.tables[key].entries())
        assert table.values.dtype == torch.float16
    loaded.model.to(torch.bfloat16)
    assert all(table.values.dtype == torch.float16 for table in loaded.tables.values())
