"""The training loop, on the first blocks of the real model and real text."""

import contextlib
import itertools
import json
import shutil
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from harness.cli import main
from harness.compress import distil
from harness.compress import training as module
from harness.compress.distil import backward_from_divergence, remember_states, states_file
from harness.compress.loop import compress_model
from harness.compress.training import finetune, frozen_bases, save_adapter
from harness.compressed import CompressedModel
from harness.data.protocols import DISTIL, NEXT_TOKEN, parse_calibration, parse_training
from harness.data.sealed import Damaged
from harness.data.windows import calibration_windows
from harness.model import inventory, load_reference
from harness.plan.allocation import uniform
from harness.plan.sensitivity import measure_fisher
from harness.progress import silent
from harness.report.baseline import read_rows
from kernels.dispatch import reference_only
from methods import parse_method
from tests.helpers import SMALL, run_harness

METHODS = (
    ("qlora", NEXT_TOKEN),
    ("gptq-lora", DISTIL),
    ("lq-lora", DISTIL),
    ("lq-lora:loftq", DISTIL),
    ("reallm:finetuned,epochs=0,latent=vectors", DISTIL),
    ("qlora:dora=true", DISTIL),
    ("fp16-lora", NEXT_TOKEN),
)

TAUGHT = 24  # windows that are trained on; the others are held out


@pytest.fixture(scope="module")
def tokens(short_tokenizer) -> torch.Tensor:
    return calibration_windows(parse_calibration("c4-mini@32x40"), short_tokenizer, seed=0).tokens_NT


def packed_model(text, path, tokens, folder):
    model = load_reference(path, "cpu", torch.float32)
    method = parse_method(text)
    plan = uniform(method, inventory(model), Fraction(7, 2)).layers
    fisher = measure_fisher(model, tokens[:4]) if method.needs.fisher else None
    return compress_model(model, inventory(model), method, plan, tokens[:4], 0, folder / "blocks", fisher=fisher)[
        0
    ], method.adaptation


@pytest.fixture(scope="module")
def original(two_blocks):
    """At 16 bits, like the head that it shares with what is trained."""
    return load_reference(two_blocks.path, "cpu", torch.float32).half().float()


@pytest.fixture(scope="module")
def states(original, tokens, tmp_path_factory) -> Path:
    """Those of the uncompressed model for every window."""
    folder = tmp_path_factory.mktemp("states")
    remember_states(original, tokens, folder)
    return folder


def divergence(model, original, tokens_BT):
    """KL(original || model) as a textbook writes it, with all logits at once."""
    log_q, log_p = (m(tokens_BT).logits[:, :-1].log_softmax(-1).flatten(0, 1) for m in (model, original))
    return torch.nn.functional.kl_div(log_q, log_p, log_target=True, reduction="batchmean")


@torch.no_grad()
def held_out(model, original, tokens, loss):
    if loss == DISTIL:
        return divergence(model, original, tokens[TAUGHT:]).item()
    return model(input_ids=tokens[TAUGHT:], labels=tokens[TAUGHT:]).loss.item()


@pytest.mark.parametrize("text, loss", METHODS)
def test_training_lowers_the_loss_on_other_text(text, loss, two_blocks, original, tokens, states, tmp_path):
    compressed, adaptation = packed_model(text, two_blocks.path, tokens, tmp_path)
    bits, before = compressed.ledger(), held_out(compressed.model, original, tokens, loss)
    base = {name: layer.decode_base() for name, layer in compressed.packed.items()}
    taught = {"states": states} if loss == DISTIL else {}
    report = finetune(compressed, adaptation, tokens[:TAUGHT], 2, 0, tmp_path, **taught)
    assert (report.steps, report.tokens, len(report.losses)) == (TAUGHT // 2, TAUGHT * 32, TAUGHT // 2)
    assert held_out(compressed.model, original, tokens, loss) < before
    assert compressed.ledger() == bits
    # Only what may be was trained.
    assert all(torch.equal(layer.decode_base(), base[name]) for name, layer in compressed.packed.items())
    compressed.save(tmp_path / "saved")
    reloaded = CompressedModel.load(tmp_path / "saved", "cpu", torch.float32)
    with torch.no_grad():
        assert torch.equal(reloaded.model(tokens[:1]).logits, compressed.model(tokens[:1]).logits)

    save_adapter(compressed, adaptation, tmp_path / "adapter")
    from peft import PeftModel

    if text == "fp16-lora":  # a normal adapter folder, for the model as it was published
        onto = AutoModelForCausalLM.from_pretrained(two_blocks.path, dtype=torch.float32)
        onto = onto.half().float()
    else:
        onto = frozen_bases(reloaded)
    with torch.no_grad():
        expected = compressed.model(tokens[:1]).logits
        found = PeftModel.from_pretrained(onto, tmp_path / "adapter").eval()(tokens[:1]).logits
    assert torch.allclose(found, expected, atol=2e-3 * expected.abs().max().item())


@pytest.mark.parametrize(
    "text, trained",
    [
        ("mpo:healed", ["core_", "norm.weight"]),
        ("gptq:distilled", [".scales", "norm.weight"]),
        # Four steps of the default rate are less than half a unit of the few 16-bit scales of the low-rank part.
        ("reallm:distilled,latent=trellis,window=8,rank=2,distil_rate=0.001", [".scales.", ".lowrank.", "norm.weight"]),
    ],
)
def test_own_numbers_are_trained_and_nothing_else(text, trained, two_blocks, original, tokens, states, tmp_path):
    """With the one loop, text and loss; a killed training goes on to the same bytes."""

    def moves(name: str) -> bool:
        return any(part in name for part in trained)

    ended = []
    for name, killed_after in (("whole", None), ("part", 2)):
        compressed, adaptation = packed_model(text, two_blocks.path, tokens, tmp_path)  # the second time what is kept
        bits, before = compressed.ledger(), held_out(compressed.model, original, tokens, DISTIL)
        rest = {n: t.clone() for n, t in compressed.model.state_dict().items() if not moves(n)}
        stored = {n: t.clone() for n, t in compressed.model.state_dict().items() if moves(n)}

        def progress(phase, done, total, killed_after=killed_after):
            if done == killed_after:
                raise Killed

        for attempt in (progress, silent):
            with contextlib.suppress(Killed):
                report = finetune(compressed, adaptation, tokens[:8], 2, 0, tmp_path / name, attempt, 0.0, states)
                break
        assert len(report.losses) == 4 and held_out(compressed.model, original, tokens, DISTIL) < before
        after = compressed.model.state_dict()
        assert compressed.ledger() == bits and all(torch.equal(after[n], rest[n]) for n in rest)
        assert after.keys() == rest.keys() | stored.keys()
        assert all(any(part in n and not torch.equal(after[n], stored[n]) for n in stored) for part in trained)
        ended.append((report.losses, {n: after[n] for n in stored}))
    assert ended[0][0] == ended[1][0] and all(torch.equal(t, ended[1][1][n]) for n, t in ended[0][1].items())


class Killed(Exception):
    pass


@reference_only()
def test_the_divergence_and_its_gradient_are_autograds(two_blocks, original, tokens, states, tmp_path, monkeypatch):
    """Slice by slice, the last one short, against one graph through both softmaxes."""
    model = packed_model("nf", two_blocks.path, tokens, tmp_path)[0].model
    norm = model.model.norm.weight.requires_grad_()
    expected = divergence(model, original, tokens[:2])
    expected.backward()
    gradient, norm.grad = norm.grad, None
    monkeypatch.setattr(distil, "SLICE_LOGITS", 20 * model.config.vocab_size)
    files = (states_file(states, index) for index in range(2))
    found = sum(backward_from_divergence(model, tokens[i], file, 2) for i, file in enumerate(files))
    assert found == pytest.approx(expected.item(), rel=1e-4)
    assert torch.allclose(norm.grad, gradient, rtol=1e-3, atol=1e-5 * gradient.abs().max().item())


def test_the_uncompressed_model_has_next_to_nothing_to_learn_from_itself(two_blocks, tokens, states, tmp_path):
    compressed, adaptation = packed_model("fp16-lora", two_blocks.path, tokens, tmp_path)
    report = finetune(compressed, adaptation, tokens[:3], 1, 0, tmp_path, states=states)
    # Adam takes steps of one size from gradients of any, those of rounding too.
    assert abs(report.losses[0]) < 1e-6 and max(report.losses) < 2e-3


def test_only_what_is_missing_or_damaged_is_remembered_again(original, tokens, states, tmp_path, caplog):
    folder = Path(shutil.copytree(states, tmp_path / "states"))
    whole, damaged, missing = (states_file(folder, index) for index in range(3))
    data = damaged.read_bytes()
    damaged.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    missing.unlink()
    before = whole.stat().st_mtime_ns
    with pytest.raises(Damaged, match="window_00001"):
        backward_from_divergence(original, tokens[1], damaged, 1)
    remember_states(original, tokens[:3], folder)
    assert whole.stat().st_mtime_ns == before and "window_00001.safetensors is damaged" in caplog.text
    assert damaged.read_bytes() == data and missing.read_bytes() == states_file(states, 2).read_bytes()


@pytest.mark.parametrize("text, loss", [("qlora", NEXT_TOKEN), ("qlora:dora=true", DISTIL)])
def test_resumed_training_ends_with_the_same_numbers(text, loss, two_blocks, tokens, states, tmp_path):
    results = []
    taught = {"states": states} if loss == DISTIL else {}
    for name, killed_after in (("whole", ()), ("part", (1, 3))):
        folder = tmp_path / name
        compressed, adaptation = packed_model(text, two_blocks.path, tokens, folder)
        names = set(compressed.packed)
        for step in (*killed_after, None):

            def progress(phase, done, total, step=step):
                if done == step:
                    raise Killed

            try:
                report = finetune(compressed, adaptation, tokens[:5], 1, 3, folder, progress, 0.0, **taught)
            except Killed:
                assert "peft_config" not in vars(compressed.model) and set(compressed.packed) == names
        results.append((report.losses, compressed.model.state_dict()))
    (losses, whole), (losses_again, part) = results
    assert losses == losses_again and len(losses) == 5
    assert whole.keys() == part.keys() and all(torch.equal(whole[name], part[name]) for name in whole)


def test_a_parameter_that_no_loss_reached_yet_is_restored_too(tmp_path):
    used, unused = (torch.nn.Parameter(torch.ones(3)) for _ in range(2))
    parameters = {"used": used, "unused": unused}
    optimiser = torch.optim.AdamW(parameters.values())
    used.sum().backward()
    optimiser.step()
    module._checkpoint(tmp_path / "state.safetensors", parameters, optimiser, [1.0], 2.0)
    fresh = {name: torch.nn.Parameter(torch.zeros(3)) for name in parameters}
    again = torch.optim.AdamW(fresh.values())
    assert module._restore(tmp_path / "state.safetensors", fresh, again) == ([1.0], 2.0)
    assert torch.equal(fresh["used"], used) and torch.equal(fresh["unused"], unused)
    assert (
        torch.equal(again.state[fresh["used"]]["exp_avg"], optimiser.state[used]["exp_avg"])
        and not again.state[fresh["unused"]]
    )


def test_rows_of_zeros_have_no_magnitude(two_blocks, tokens, tmp_path):
    compressed, adaptation = packed_model("qlora:dora=true", two_blocks.path, tokens, tmp_path)
    layer = next(iter(compressed.packed.values()))
    layer.refill(codes=torch.zeros_like(layer.codes))
    layer.scales.offset.zero_()
    layer.scales.steps.zero_()
    with pytest.raises(ValueError, match="write dora=false"):
        finetune(compressed, adaptation, tokens[:2], 1, 0, tmp_path)


def test_running_blocks_twice_changes_nothing(two_blocks, tokens, tmp_path, monkeypatch):
    losses = []
    for kept in (module.KEPT_BYTES, 0):
        monkeypatch.setattr(module, "KEPT_BYTES", kept)
        compressed, adaptation = packed_model("qlora", two_blocks.path, tokens, tmp_path / str(kept))
        losses.append(finetune(compressed, adaptation, tokens[:4], 1, 0, tmp_path / str(kept)).losses)
        assert "forward" not in vars(compressed.model.model.layers[0])
    assert losses[0] == losses[1]


def test_a_plan_without_adapters_and_a_loss_that_is_none(two_blocks, tokens, tmp_path):
    compressed, adaptation = packed_model("qlora", two_blocks.path, tokens, tmp_path)
    for layer in compressed.packed.values():
        layer.lowrank.left_scale.fill_(float("inf"))
        for rest in (layer.lowrank.left, layer.lowrank.right, layer.lowrank.right_scale):
            rest.fill_(1)
    with pytest.raises(ValueError, match="try a smaller lora_rate"):
        finetune(compressed, adaptation, tokens[:2], 1, 0, tmp_path)
    model = load_reference(two_blocks.path, "cpu", torch.float32)
    plan = uniform(parse_method("nf"), inventory(model), Fraction(4)).layers
    plain = compress_model(model, inventory(model), parse_method("nf"), plan, None, 0, tmp_path / "plain")[0]
    with pytest.raises(ValueError, match="no layer has a low-rank part"):
        finetune(plain, adaptation, tokens[:2], 1, 0, tmp_path)


def test_the_fisher_information_is_the_mean_squared_gradient(truncated, tokens):
    """Against autograd's own gradient of every weight."""
    model = load_reference(truncated.path, "cpu", torch.float32)
    measured = measure_fisher(model, tokens[:5])
    name = "model.layers.1.mlp.down_proj"
    squares = 0
    for row in tokens[:5]:
        model.zero_grad()
        (model(input_ids=row[None], labels=row[None]).loss * (len(row) - 1)).backward()
        squares = squares + model.get_submodule(name).weight.grad.square()
    squares = squares / tokens[:5].numel()
    outer = squares.mean(dim=1, keepdim=True) * squares.mean(dim=0) / squares.mean()
    found = measured[name].row_O[:, None] * measured[name].column_I
    assert torch.allclose(found, outer, rtol=1e-2, atol=1e-4 * outer.max().item())
    assert len(measured) == 3 * 7


def test_a_run_trains_and_counts(truncated, finished_cache, tmp_path):
    run = ("run", "--model", str(truncated.path), "--bits", "3.25", *SMALL)
    trained = ("--methods", "qlora,fp16-lora", "--training", "c4-mini@128x6/2,loss=distil")
    done = run_harness(*run, *trained, "--out", str(tmp_path / "out"))
    assert done.returncode == 0, done.stderr
    rows = read_rows(tmp_path / "out")
    assert set(rows) == {"fp16", "fp16-lora", "qlora 3.25"}
    for name in ("fp16-lora", "qlora 3.25"):
        row = rows[name]
        assert (row["training_steps"], row["training_tokens"], row["track"]) == ("3", "768", "fine-tuned")
        record = json.loads((tmp_path / "out" / "cells" / f"{row['cell']}.json").read_text())
        assert (
            record["artifact"]["ledger"]["bpw_by_part"]["adapters"] > 0.1
            and len(record["artifact"]["training"]["losses"]) == 3
        )
        assert row["training_loss"] == "distil"
        cell = finished_cache / "cells" / row["cell"]
        assert (cell / "adapter" / "adapter_model.safetensors").exists() and not (cell / "teacher").exists()
    # At 16 bits it is the reference, and a divergence teaches it nothing.
    assert float(rows["fp16-lora"]["kld_c4-mini@128/4"]) < 1e-4 < float(rows["qlora 3.25"]["kld_c4-mini@128/4"])
    assert float(rows["qlora 3.25"]["stored_bpw"]) <= 3.25 < 16 < float(rows["fp16-lora"]["stored_bpw"])
    assert rows["fp16"]["training_steps"] == ""
    steps = ("--methods", "qlora", "--training", "c4-mini@128x6/3,loss=next-token")
    other = run_harness(*run, *steps, "--out", str(tmp_path / "other"))
    assert other.stderr.count("found, not repeated") == 1  # other steps are other cells; the reference is not
    assert read_rows(tmp_path / "other")["qlora 3.25"]["training_loss"] == "next-token"


@pytest.mark.parametrize(
    "text",
    [
        "c4-mini@512",
        "wiki-mini@512x8",
        "c4-mini@512x8/0",
        "c4-mini@512x8/two",
        "c4-mini@512x8,loss=mse",
        "c4-mini@5x8,",
    ],
)
def test_a_wrong_training_says_what_to_type(text, capsys):
    assert main(["plan", "--training", text]) == 2
    assert "write TEXT@CONTEXTxSEQUENCES/BATCH" in capsys.readouterr().err
    assert parse_training("c4-mini@512x8").batch == 1
    for spelt in ("c4-mini@512x8/2", "c4-mini@512x8/2,loss=next-token"):
        assert parse_training(spelt).text == spelt


@pytest.mark.parametrize(
    "method, budget, stored, adapters",
    [
        ("qlora:published", "4.127", 4.522, 0.395),
        ("lq-lora", "2.75", 2.948, 0.198),
        ("gptq-lora:published", "3.149", 3.543, 0.395),
    ],
)
def test_published_sizes(method, budget, stored, adapters, capsys):
    """QLoRA's 4.127 and GPTQ-LoRA's 3.148 without adapters; LQ-LoRA's 2.75 with adapters of rank 64 in 8 bits is
    2.95."""
    assert main(["plan", "--model", "llama2-7b", "--methods", method, "--bits", budget, "--scope", "paper"]) == 0
    lines = capsys.readouterr().out.splitlines()
    total = float(next(line for line in lines if "with adapters" in line).split()[2])
    assert total == pytest.approx(float(budget) + adapters, abs=2e-3)
    largest = next(itertools.islice((line for line in reversed(lines) if "rank=64" in line), 1)).split()
    assert float(largest[4]) == pytest.approx(adapters, abs=1e-3)
    if method != "lq-lora":
        assert float(largest[0]) == pytest.approx(stored, abs=1e-3)
