"""Memory and latency: nothing here asserts on a time, only on what was measured, of what, and beside what."""

import csv
import dataclasses
import threading
from pathlib import Path

import pytest
import torch

import kernels.cpu
import kernels.dispatch
from harness.cli import main
from harness.cli.shapes import blocks_held
from harness.compressed import CompressedModel
from harness.data.sealed import read_object
from harness.measure import machine
from harness.measure import measurement as bench
from harness.measure.layers import describe, groups_of
from harness.measure.runner import CONTEXT, Runner, bytes_per_token, prompt, resident_bytes, scored_logits, timed_model
from harness.model.shapes import laid_out
from harness.plan.budgets import Budget
from harness.report.latency import COLUMNS
from kernels.synthetic import random_layer
from kernels.timing import interleaved, speed_up
from tests.helpers import PLANNED, linked_cache, linked_cells, run_harness

PLAN = ("--methods", "rtn,nf", "--bits", "4.25", "--allocate", "uniform", *PLANNED)
BENCH = ("--bench-seconds", "0.02", "--bench-threads", "1")


def rows_of(path) -> list[dict[str, str]]:
    with open(path) as handle:
        return list(csv.DictReader(handle))


@pytest.fixture(scope="module")
def unmeasured(truncated, finished, assets_cache, estimates, tmp_path_factory) -> Path:
    """A folder with a run that measured nothing (out), and its cache (cache)."""
    folder = tmp_path_factory.mktemp("unmeasured")
    cache = linked_cells(finished / "cache", linked_cache(assets_cache, folder / "cache", estimates))
    run = ("run", *PLAN, "--no-bench", "--model", str(truncated.path))
    done = run_harness(*run, "--out", str(folder / "out"), HARNESS_CACHE=str(cache))
    assert done.returncode == 0, done.stderr
    return folder


def test_every_row_of_a_run_has_memory_and_latency_of_its_own_bytes(truncated, unmeasured, cache, tmp_path):
    linked_cells(unmeasured / "cache", cache)
    assert {row["decode_ms_b1"] for row in rows_of(unmeasured / "out" / "leaderboard.csv")} == {""}  # not asked for
    run = ("run", *PLAN, *BENCH, "--model", str(truncated.path), "--out", str(tmp_path / "out"))
    done = run_harness(*run)
    assert done.returncode == 0, done.stderr
    rows = rows_of(tmp_path / "out" / "leaderboard.csv")
    assert [row["method"] for row in rows][0] == "fp16" and len(rows) == 3
    for row in rows:
        numbers = set(COLUMNS) - {"runner", "ppl_decode_gap"}
        assert all(float(row[column]) > 0 for column in numbers), row
        assert row["runner"] == "native" and abs(float(row["ppl_decode_gap"])) < 0.1
        assert float(row["decode_tok_s_b1"]) == pytest.approx(1e3 / float(row["decode_ms_b1"]))
        assert (
            float(row["decode_speedup_b1_p10"])
            <= float(row["decode_speedup_b1"])
            <= float(row["decode_speedup_b1_p90"])
        )
    reference, *others = rows
    assert float(reference["decode_speedup_b1"]) == 1 and reference["kind"] == "dense"
    assert all(
        row["kind"] == "fused" and float(row["resident_gib"]) < float(reference["resident_gib"]) for row in others
    )
    kernels_csv = rows_of(tmp_path / "out" / "kernels.csv")
    assert {row["row"] for row in kernels_csv} == {"rtn 4.25", "nf 4.25"}
    assert len({row["bandwidth_gb_s"] for row in (*rows, *kernels_csv)}) == 1  # one machine, one limit
    for row in kernels_csv:
        assert float(row["bandwidth_pct"]) == pytest.approx(100 * float(row["gb_s"]) / float(row["bandwidth_gb_s"]))
    assert {row["batch"] for row in kernels_csv} == {"1", "4", "16"} and {row["kind"] for row in kernels_csv} == {
        "fused"
    }
    assert sum(int(row["layers"]) for row in kernels_csv if row["row"] == "rtn 4.25" and row["batch"] == "1") == 21

    again = run_harness(*run)
    assert "memory and latency" not in again.stderr  # found, not measured again
    assert rows_of(tmp_path / "out" / "leaderboard.csv") == rows


def test_a_run_that_has_not_been_made_cannot_be_measured(truncated, cache, tmp_path, capsys):
    assert main(["bench", *PLAN, *BENCH, "--model", str(truncated.path), "--out", str(tmp_path)]) == 2
    assert "with `run` does it first" in capsys.readouterr().err


def test_shapes_need_no_weights(tmp_path, cache):
    arguments = [
        "--shapes",
        "smollm2-135m",
        "--methods",
        "reallm,gptq,qlora",
        "--bits",
        "3.25",
        "--bench-seconds",
        "0.01",
        "--bench-threads",
        "1",
    ]
    done = run_harness("bench", *arguments, "--out", str(tmp_path))
    assert done.returncode == 0, done.stderr
    rows = rows_of(tmp_path / "kernels.csv")
    assert {(row["rows"], row["columns"]) for row in rows} == {
        ("576", "576"),
        ("192", "576"),
        ("1536", "576"),
        ("576", "1536"),
    }
    assert {row["row"] for row in rows} == {"reallm 3.25", "gptq 3.25", "qlora 3.25"}
    assert all(float(row["us"]) > 0 and float(row["speedup"]) > 0 and row["kind"] == "fused" for row in rows)
    assert read_object(tmp_path / "machine.json")["threads"] == 1


@pytest.fixture
def stored(unmeasured) -> CompressedModel:
    """A reloaded cell of rtn."""
    cell = next(row for row in rows_of(unmeasured / "out" / "leaderboard.csv") if row["method"] == "rtn")
    return CompressedModel.load(unmeasured / "cache" / "cells" / cell["cell"], "cpu", torch.float32)


def test_a_decoded_token_is_the_scored_one_and_bytes_are_counted_once(stored):
    model = timed_model(stored)
    window = prompt(model, 2, CONTEXT)
    runner = Runner(model, window)
    runner.step()
    assert torch.allclose(runner.logits_BV, scored_logits(model, window)[:, -1], atol=1e-2)
    after = torch.cat([window, scored_logits(model, window)[:, -1].argmax(dim=-1, keepdim=True)], dim=1)
    runner.step()
    assert torch.allclose(runner.logits_BV, scored_logits(model, after)[:, -1], atol=1e-2)

    packed_bytes = stored.ledger().stored_bits // 8
    others = sum(p.numel() * 4 for p in model.parameters())
    others += 2 * model.get_input_embeddings().weight.numel()  # tied: the head is the embedding, and all of it is read
    assert packed_bytes + others <= bytes_per_token(stored) < packed_bytes + others + 10_000  # rotary frequencies
    assert bytes_per_token(stored) <= resident_bytes(model) < 1.1 * bytes_per_token(stored)


def test_of_random_bits_one_layer_of_every_shape_and_configuration_is_compared(stored):
    kinds = {str(layer.spec()) for layer in stored.packed.values()}
    some = bench._one_of_each(stored.packed)
    assert len(some) == len(kinds) < len(stored.packed)
    assert next(iter(some)) == next(iter(stored.packed))


def test_what_differs_from_what_was_scored_is_not_timed(stored, monkeypatch):
    bench._compare_products(stored.packed, "cpu", torch.float32, lambda *_: None)
    right = kernels.cpu.BACKEND
    wrong = dataclasses.replace(right, product=lambda layer, x: right.product(layer, x) * 1.001)
    monkeypatch.setattr(kernels.dispatch, "backend", lambda device_type: wrong)
    with pytest.raises(ValueError, match="not timed: the fused product of .* is off by 1.0e-03"):
        bench._compare_products(stored.packed, "cpu", torch.float32, lambda *_: None)


def test_a_measurement_waits_for_work_and_work_for_it():
    order: list[str] = []
    may_end = threading.Event()

    def work() -> None:
        with machine.working(), machine.working():  # any number of workers at once
            started.set()
            may_end.wait()
            order.append("work")

    started = threading.Event()
    worker = threading.Thread(target=work)
    worker.start()
    started.wait()
    with machine.quiet(may_end.set):  # called because it has to wait
        order.append("measurement")
    worker.join()
    assert order == ["work", "measurement"]


def test_rounds_take_turns_and_ratios_stay_inside_them():
    called: list[str] = []
    calls = {name: (lambda name=name: called.append(name)) for name in ("a", "b")}
    taken = interleaved(calls, "cpu", seconds=0, fewest=3, most=9, before=lambda: called.append("-"))
    assert "".join(called) == "-a-b-b-a-a-b" and {len(values) for values in taken.values()} == {3}
    assert speed_up([1.0, 2.0, 4.0], [3.0, 6.0, 12.0])["median"] == 3


def test_layers_alike_are_one_group():
    spec = dict(format="codebook", dim=2, index_bits=6, block=64)
    layers = [random_layer(spec, 64, 64, seed=seed) for seed in range(3)] + [random_layer(spec | {"rank": 2}, 64, 64)]
    groups = groups_of(layers)
    assert [(group.config, len(group.layers)) for group in groups] == [
        ("codebook dim=2 index_bits=6 block=64", 3),
        ("codebook rank=2 dim=2 index_bits=6 block=64", 1),
    ]
    assert describe(layers[0]) == groups[0].config and groups[0].stored_bytes == layers[0].stored_bits().total / 8


def test_whole_models_of_shapes_need_no_weights(truncated, tmp_path, cache):
    options = ("--methods", "rtn,gptvq", "--bits", "3.25", "--bench-seconds", "0.01", "--bench-threads", "1")
    done = run_harness("bench", "--shapes", str(truncated.path), "--end-to-end", *options, "--out", str(tmp_path))
    assert done.returncode == 0, done.stderr
    rows = rows_of(tmp_path / "end_to_end.csv")
    assert [row["row"] for row in rows] == ["fp16", "rtn 3.25", "gptvq 3.25"]
    assert all(row["runner"] == "native" and float(row["decode_tok_s_b1"]) > 0 for row in rows)
    assert float(rows[0]["resident_gib"]) > float(rows[1]["resident_gib"]) and float(rows[1]["stored_bpw"]) <= 3.25


def test_models_that_find_no_room_have_fewer_blocks_of_their_own(monkeypatch, capsys):
    stock = laid_out("llama2-13b")
    for gib, fewest, most in ((80, None, None), (20, 10, 32), (8, 3, 12)):
        monkeypatch.setattr(machine, "available_bytes", lambda gib=gib: gib * 2**30)
        held = blocks_held("llama2-13b", stock, [Budget.parse("3.25")])
        assert held is None if fewest is None else fewest <= held <= most
    monkeypatch.setattr(machine, "available_bytes", lambda: 4 * 2**30)
    assert main(["bench", "--shapes", "llama2-13b", "--end-to-end", "--methods", "rtn", "--bits", "3.25"]) == 2
    assert "too few of its 40 blocks find room in the 4.0 GiB" in capsys.readouterr().err


def test_end_to_end_asks_for_shapes(capsys):
    assert main(["bench", "--end-to-end"]) == 2
    assert "--shapes llama3.2-1b" in capsys.readouterr().err
    assert main(["bench", "--end-to-end", "--shapes", ","]) == 2
    assert "--shapes names no model" in capsys.readouterr().err
