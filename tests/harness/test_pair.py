"""A model that is a pair: from two folders to rows, and back from the stored difference to the tuned model."""

import csv
import dataclasses
import shutil
from fractions import Fraction

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from benchmarks.tuned_pair import tune
from harness.compress.loop import compress_model
from harness.compressed import CompressedModel
from harness.data.assets import resolve_model
from harness.data.files import file_sha256, locked
from harness.data.protocols import parse_calibration, parse_protocol
from harness.data.texts import mini_documents
from harness.data.windows import calibration_windows
from harness.ledger import payload_bytes
from harness.model import inventory, load_reference
from harness.model.pair import Base
from harness.plan.allocation import uniform
from harness.plan.costs import expected_costs
from methods import parse_method
from methods.base import Sensitivity
from tests.helpers import SMALL, linked_cache, run_harness

PAIR = ("--calibration", "c4-mini@128x4", "--training", "c4-mini@64x4/1", "--no-bench", "--jobs", "1")


@pytest.fixture(scope="session")
def tuned(two_blocks, session_folder):
    """The two blocks after a step that moves all their weights and norms: low rank, and something everywhere."""
    folder = session_folder / "smollm2-2-blocks-tuned"
    with locked(folder, folder.name):
        if not (folder / "model.safetensors").exists():
            shutil.copytree(two_blocks.path, folder, dirs_exist_ok=True)
            weights, generator = load_file(two_blocks.path / "model.safetensors"), torch.Generator().manual_seed(0)
            for name, tensor in weights.items():
                if "layers" in name and tensor.ndim == 2:
                    left, right = (
                        torch.randn(*shape, generator=generator) for shape in ((len(tensor), 8), (8, tensor.shape[1]))
                    )
                    tensor += 0.002 * left @ right + 0.002 * torch.randn(tensor.shape, generator=generator)
                elif "layers" in name:
                    tensor += 0.01
            save_file(weights, folder / "model.safetensors", {"format": "pt"})
        return resolve_model(str(folder))


@pytest.fixture(scope="module")
def board(two_blocks, tuned, assets_cache, estimates, tmp_path_factory):
    """(rows by method, the cache they are in)."""
    folder = tmp_path_factory.mktemp("pair")
    cache = linked_cache(assets_cache, folder / "cache", estimates)
    pair = ("--model", str(tuned.path), "--base", str(two_blocks.path), "--protocols", "c4-mini@128/4")
    methods = (
        "--methods",
        "delta-come,bitdelta,bitdelta:distilled,base",
        "--bits",
        "2.01",
        "--allocate",
        "uniform",
    )
    done = run_harness("run", *pair, *methods, *PAIR, "--out", str(folder / "out"), HARNESS_CACHE=str(cache))
    assert done.returncode == 0, done.stderr
    rows = csv.DictReader((folder / "out" / "leaderboard.csv").open())
    return {":".join(filter(None, (row["method"], row["variant"]))): row for row in rows}, cache


def test_rows_store_the_difference_and_nothing_of_the_base(board, tuned, two_blocks):
    rows, cache = board
    weights = load_file(two_blocks.path / "model.safetensors")
    base_bytes = 2 * sum(tensor.numel() for tensor in weights.values())
    for name, row in rows.items():
        folder = cache / "cells" / row["cell"]
        if name == "fp16":
            assert row["track"] == "data-free" and row["delta_bpw"] == "" == row["gib_1_tenants"]
            continue
        assert (
            row["track"] == "delta" and row["status"] in ("ok", "underspent") and row["delta_bpw"] == row["stored_bpw"]
        )
        assert float(row["delta_bpw"]) == 8 * payload_bytes(folder / "packed.safetensors") / 7077888
        rest = load_file(folder / "rest.safetensors")
        assert len(rest) == 4 and all("layernorm" in key for key in rest)  # the embedding is the base's, bit for bit
        stored = int(row["checkpoint_bytes"])
        assert stored == sum((folder / f"{part}.safetensors").stat().st_size for part in ("packed", "rest"))
        for tenants in (1, 10, 100):
            assert float(row[f"gib_{tenants}_tenants"]) == (base_bytes + tenants * stored) / 2**30
    assert float(rows["base"]["delta_bpw"]) == 0
    assert all(1.95 <= float(row["delta_bpw"]) <= 2.01 for name, row in rows.items() if name not in ("base", "fp16"))


def test_rows_are_held_against_the_tuned_model_and_ranked_together(board):
    rows, _ = board
    kld = {name: float(row["kld_c4-mini@128/4"]) for name, row in rows.items()}
    assert kld["fp16"] < 1e-5 < min(kld[name] for name in ("delta-come", "bitdelta"))
    assert max(kld[name] for name in ("delta-come", "bitdelta", "bitdelta:distilled")) < kld["base"] / 2
    assert {row["rank_c4-mini@128/4"] for row in rows.values()} >= {"", "1"} and rows["base"][
        "rank_c4-mini@128/4"
    ] == ""


def test_the_reference_of_a_pair_is_that_of_the_tuned_model_alone(board, tuned):
    rows, cache = board
    plan = run_harness("plan", "--model", str(tuned.path), "--methods", "rtn", HARNESS_CACHE=str(cache))
    assert rows["fp16"]["cell"] in plan.stdout


@pytest.mark.parametrize("method", ["delta-come", "bitdelta"])
def test_a_difference_leaves_with_the_base_it_stands_on(method, board, two_blocks, tuned, tmp_path):
    rows, cache = board
    key, there = rows[method]["cell"], tmp_path / "there"
    for format in ("gptq", "gguf"):
        done = run_harness("export", key, "--to", str(there), "--format", format, HARNESS_CACHE=str(cache))
        assert done.returncode == 2 and not there.exists()
        assert f"difference to {two_blocks.name}, which {format} has no form for: write --format hf" in done.stderr
    done = run_harness("export", key, "--to", str(there), HARNESS_CACHE=str(cache))
    assert done.returncode == 0, done.stderr
    cell = CompressedModel.load(cache / "cells" / key, "cpu", torch.float32, two_blocks).model
    model, tokens = AutoModelForCausalLM.from_pretrained(there), torch.arange(5, 29)[None]
    with torch.inference_mode():
        assert torch.equal(model(tokens).logits, cell(tokens).logits)
    card = (there / "README.md").read_text()
    assert f"--model {tuned.name} --base {two_blocks.name} --methods {method}" in card
    assert f"Of the difference, counted from the bytes of its tensors; {two_blocks.name} is here in 16 bits" in card


@pytest.mark.parametrize("text", ["delta-come", "svd"])
def test_a_stored_difference_is_the_model_again_and_a_killed_one_goes_on_to_the_same_bytes(
    text, two_blocks, tuned, short_tokenizer, tmp_path
):
    method, base = parse_method(text), Base.load(two_blocks, "cpu")
    tokens = calibration_windows(parse_calibration("c4-mini@64x4"), short_tokenizer, seed=0).tokens_NT
    sums = []
    for attempt in ("whole", "again"):
        model = load_reference(tuned.path, "cpu", torch.float32)
        stock = inventory(model)
        blocks = tmp_path / "blocks"
        if attempt == "again":  # the first block is found, the second was not finished
            (blocks / "block_0001.safetensors").unlink()
        configs = uniform(method, stock, Fraction("2.001")).layers
        compressed, _ = compress_model(model, stock, method, configs, tokens, 0, blocks, base=base)
        compressed.save(tmp_path / attempt)
        sums.append([file_sha256(tmp_path / attempt / f"{part}.safetensors") for part in ("packed", "rest")])
    assert sums[0] == sums[1]
    loaded = CompressedModel.load(tmp_path / "again", "cpu", torch.float32, two_blocks)
    for name, layer in loaded.packed.items():
        assert torch.equal(layer.decode(), compressed.packed[name].decode())
    assert sum(layer.beside_bits for layer in loaded.packed.values()) == 16 * stock.weights  # read for every token
    original = load_reference(tuned.path, "cpu", torch.float32)
    with torch.no_grad():
        expected, found, base_alone = (
            m(tokens[:1]).logits
            for m in (original, loaded.model, load_reference(two_blocks.path, "cpu", torch.float32))
        )
    assert (found - expected).norm() < 0.5 * (base_alone - expected).norm()
    with pytest.raises(ValueError, match="the base given is none: give the one it was made with"):
        CompressedModel.load(tmp_path / "again", "cpu", torch.float32)
    with pytest.raises(ValueError, match=r"the base given is smollm2-2-blocks-tuned \("):
        CompressedModel.load(tmp_path / "again", "cpu", torch.float32, tuned)


def test_costs_of_an_allocation_are_those_of_the_difference(two_blocks, tuned):
    model, base = load_reference(tuned.path, "cpu", torch.float32), Base.load(two_blocks, "cpu")
    stock = inventory(model)
    flat = {
        layer.name: Sensitivity(torch.ones(layer.out_features), torch.ones(layer.in_features)) for layer in stock.layers
    }
    method = parse_method("bitdelta")
    costs = expected_costs(method, model, stock, Fraction(1), flat, 0, base=base)
    for layer in stock.layers[:3]:
        weight = model.get_parameter(f"{layer.name}.weight").detach()
        difference = weight - base.weight(layer.name).float()
        nothing = next(cost for config, cost in costs[layer.name].items() if config["masks"] == 0)
        assert nothing == pytest.approx(0.5 * difference.square().sum().item(), rel=1e-5)
        assert nothing < 0.5 * weight.square().sum().item() / 2


@pytest.mark.parametrize(
    "options, line",
    [
        (("--methods", "delta-come"), "delta-come stores the difference of two models: write --base with"),
        (
            ("--methods", "gptq", "--base", "BASE"),
            "gptq does not pack the difference of two models: write gptq:follow=0",
        ),
        (("--methods", "svd", "--base", "BASE", "--act-bits", "8"), "write --act-bits 16"),
        (("--methods", "svd", "--base", "nowhere"), "no folder nowhere: give a folder, a hub id"),
        (("--methods", "svd", "--base", "TUNED"), "are the same model, smollm2-2-blocks-tuned: there is no difference"),
        (
            ("--methods", "svd", "--base", "THREE"),
            "are no pair (model.layers.2.self_attn.q_proj is absent in one and 576 x",
        ),
        (("--methods", "svd", "--base", "llama2-7b"), "no folder llama2-7b"),
        (
            ("--methods", "bitdelta:masks=1", "--base", "BASE", "--bits", "1", "--allocate", "uniform"),
            "at least 1.0000",
        ),
    ],
)
def test_what_is_no_pair_says_so_in_one_line(options, line, tuned, two_blocks, truncated, cache):
    places = {"BASE": two_blocks.path, "TUNED": tuned.path, "THREE": truncated.path}
    typed = [str(places.get(word, word)) for word in options]
    done = run_harness("run", "--model", str(tuned.path), *typed, *SMALL)
    assert done.returncode != 0 and line in done.stderr + done.stdout and "Traceback" not in done.stderr


def test_bits_of_a_pair_are_planned_from_configurations_alone():
    """Presets have no weights; at 7B one bit a weight is the published ranks less what scales take."""
    pair = ("--model", "llama2-7b", "--base", "llama2-7b", "--allocate", "uniform", "--json")
    done = run_harness("plan", *pair, "--methods", "delta-come:ranks=2+32+968,bitdelta,base", "--bits", "1.07")
    assert done.returncode == 0, done.stderr
    assert '"chosen": true' in done.stdout and "ranks=2+32+968" in done.stdout


def test_the_base_decides_the_key(tuned, two_blocks, truncated, cache):
    def keys(*options: str) -> set[str]:
        done = run_harness("plan", "--model", str(tuned.path), "--methods", "svd", *options)
        return {line.split("[")[1].split("]")[0] for line in done.stdout.splitlines() if "predicted peak" in line}

    alone, paired = keys(), keys("--base", str(two_blocks.path))
    assert len(alone) == len(paired) == 2 and len(alone & paired) == 1  # the reference is shared


def test_what_a_model_is_tuned_on_is_never_scored():
    parts = [set(mini_documents("code-mini", part)) for part in ("training", "evaluation", "tuning")]
    assert all(parts) and not parts[0] & parts[1] and not parts[1] & parts[2] and not parts[0] & parts[2]
    with pytest.raises(ValueError, match="is the text that a model is tuned on: score code-mini@512"):
        parse_protocol("code-mini:training@512")
    assert dataclasses.replace(parse_protocol("code-mini@512")).windows == 16


def test_a_tuning_lowers_the_loss_moves_no_embedding_and_comes_out_the_same_twice(two_blocks, short_tokenizer):
    tokens = calibration_windows(parse_calibration("c4-mini@32x1"), short_tokenizer, seed=0).tokens_NT.repeat(4, 1)
    before = load_reference(two_blocks.path, "cpu", torch.float32).state_dict()
    found = []
    for _ in range(2):
        model = load_reference(two_blocks.path, "cpu", torch.float32)
        losses = tune(model, tokens)
        found.append((losses, model.state_dict()))
    (losses, after), (again, same) = found
    assert losses == again and losses[-1] < losses[0] and all(torch.equal(after[name], same[name]) for name in after)
    moved = {name for name in after if not torch.equal(after[name], before[name])}
    assert moved == {name for name in after if ".layers." in name}
