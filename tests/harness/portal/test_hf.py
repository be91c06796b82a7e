"""An exported cell is the cell: in transformers, under peft and in lm-eval's hands; without us it is refused."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.quantizers import auto

from harness.compressed import CompressedModel
from harness.data.checkpoint import load_tokenizer
from harness.data.task_documents import write_task_file
from harness.data.tasks import parse_tasks
from harness.evaluate.zero_shot import open_lm, score_task
from harness.portal.folder import Request
from harness.portal.hf import EXPORTER
from kernels.dispatch import kind
from tests.helpers import run_harness

ROOT = Path(__file__).parents[3]
GPTQ = "gptq:bits=3,group=64,offset=zero,static_groups=false"
QLORA = "qlora:bits=4,block=64,rank=4"
TEXT = "The river bends twice before it reaches the town"


def logits(model, folder):
    tokens = AutoTokenizer.from_pretrained(folder)(TEXT, return_tensors="pt").input_ids
    with torch.inference_mode():
        return model(tokens).logits


def of_cell(cell):
    return CompressedModel.load(cell.store.folder, "cpu", torch.float32).model


@pytest.mark.parametrize("method", [GPTQ, QLORA, "fp16"])
def test_what_transformers_loads_is_the_cell_bit_for_bit(method, cell, tmp_path):
    found = cell(method)
    EXPORTER.write(Request(found, tmp_path / "there", shard_bytes=5_000_000))
    assert (tmp_path / "there" / "model.safetensors.index.json").exists()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "there")
    assert torch.equal(logits(loaded, tmp_path / "there"), logits(of_cell(found), tmp_path / "there"))
    if method != "fp16":
        assert kind(loaded.model.layers[1].mlp.up_proj, "cpu") == "fused"
        tokens = torch.arange(5, 9)[None]
        written = loaded.generate(tokens, attention_mask=tokens > 0, max_new_tokens=4, do_sample=False)
        assert torch.equal(written, of_cell(found).generate(tokens, max_new_tokens=4, do_sample=False))


def test_without_this_package_transformers_refuses_the_folder(cell, tmp_path, monkeypatch):
    EXPORTER.write(Request(cell(GPTQ), tmp_path / "there"))
    monkeypatch.delitem(auto.AUTO_QUANTIZER_MAPPING, "ptq-harness")
    monkeypatch.delitem(auto.AUTO_QUANTIZATION_CONFIG_MAPPING, "ptq-harness")
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "there")


def test_an_installed_package_is_found_by_the_command_lines_of_others(cell, tmp_path):
    """lm-eval imports nothing of ours; what pyproject.toml announces to torch does. It gives the row's accuracies."""
    found = cell(GPTQ)
    EXPORTER.write(Request(found, tmp_path / "there"))
    (task,) = parse_tasks("piqa", limit=10)
    (tmp_path / "tasks").mkdir()
    write_task_file(task, tmp_path / "tasks")
    installed = tmp_path / "site" / "announced-1.dist-info"
    installed.mkdir(parents=True)
    (installed / "METADATA").write_text("Metadata-Version: 2.1\nName: announced\nVersion: 1\n")
    (installed / "entry_points.txt").write_text("[torch.backends]\nptq = harness.portal.hook:announce\n")
    assert 'ptq_harness_exports = "harness.portal.hook:announce"' in (ROOT / "pyproject.toml").read_text()
    options = (
        f"--model hf --model_args pretrained=there --tasks tasks/{task.name}.yaml --limit {task.limit} --device cpu "
        "--batch_size 4 --log_samples --output_path out"
    )
    path = os.pathsep.join([str(ROOT), str(tmp_path / "site")])
    done = subprocess.run(
        [sys.executable, "-m", "lm_eval", *options.split()],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": path, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    (results,) = (tmp_path / "out").rglob("results_*.json")
    (samples,) = (tmp_path / "out").rglob("samples_piqa_*.jsonl")
    theirs = sorted(map(json.loads, samples.read_text().splitlines()), key=lambda sample: sample["doc_id"])
    ours = score_task(open_lm(of_cell(found), load_tokenizer(found.artifact.spec.model.path)), task)
    for metric, accuracy in ours.metrics.items():
        assert json.loads(results.read_text())["results"]["piqa"][f"{metric},none"] == accuracy.value
        assert ours.correct[metric] == "".join(str(int(sample[metric])) for sample in theirs)
    for values, sample in zip(ours.loglikelihoods, theirs, strict=True):
        assert list(values) == pytest.approx([float(value) for value, _ in sample["filtered_resps"]], abs=1e-2)


def test_peft_adapts_packed_layers(cell, tmp_path):
    EXPORTER.write(Request(cell(GPTQ), tmp_path / "there"))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "there")
    before = logits(model, tmp_path / "there")
    config = LoraConfig(r=2, target_modules=["q_proj", "down_proj"], use_dora=False, task_type="CAUSAL_LM")
    adapted = get_peft_model(model, config)
    assert torch.equal(logits(adapted, tmp_path / "there"), before)
    tokens = torch.arange(5, 37)[None]
    adapted(input_ids=tokens, labels=tokens).loss.backward()
    trained = [p for p in adapted.parameters() if p.requires_grad]
    assert len(trained) == 2 * 2 * 2 and all(p.grad is not None for p in trained)
    adapted.save_pretrained(tmp_path / "adapter")
    again = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path / "there"), tmp_path / "adapter")
    assert torch.equal(logits(again, tmp_path / "there"), before)


def test_adapters_that_were_trained_load_beside_their_base(cell, tmp_path):
    found = cell(QLORA)
    EXPORTER.write(Request(found, tmp_path / "base", "base"))
    with safe_open(tmp_path / "base" / "model.safetensors", framework="pt") as file:
        assert not [name for name in file.offset_keys() if "lowrank" in name]
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    alone = logits(base, tmp_path / "base")
    whole = logits(of_cell(found), tmp_path / "base")
    both = logits(PeftModel.from_pretrained(base, tmp_path / "base" / "adapter"), tmp_path / "base")
    assert (both - whole).norm() < 2e-4 * (alone - whole).norm()


def test_the_command_line_writes_a_card_and_says_what_it_cannot_do(finished, finished_cache, tmp_path):
    run = str(finished / "out")
    done = run_harness("export", run, "--row", "gptq 3.25", "--to", str(tmp_path / "a"))
    assert done.returncode == 0, done.stderr
    card = (tmp_path / "a" / "README.md").read_text()
    assert "| stored bits per weight | 3.2" in card and "| wiki-mini@128/4 |" in card and "--methods gptq" in card
    first = (tmp_path / "a" / "model.safetensors").read_bytes()
    key = re.search("[|] cell [|] (.*) [|]", card)[1]
    (tmp_path / "a" / "config.json").unlink()  # as a kill would leave it
    assert run_harness("export", key[:8], "--to", str(tmp_path / "a")).returncode == 0
    assert (tmp_path / "a" / "model.safetensors").read_bytes() == first
    to = ("--to", str(tmp_path / "b"))
    refused = {
        ("export", run, *to): "has several rows: write --row",
        ("export", run, "--row", "gtpq", *to): "has no row 'gtpq'",
        ("export", run, "--row", "gptq", *to): "there are 2 rows 'gptq': choose from ",
        ("export", run, "--row", "fp16", "--to", str(tmp_path / "a")): "holds something else",
        ("export", "0123456789abcdef", *to): "there are 0 cells",
        ("export", "nowhere", *to): "no folder nowhere",
        ("export", key, *to, "--format", "ggml"): "unknown format to export 'ggml'",
        ("export", key, *to, "--variant", "base"): "has no adapters of its own",
        ("export", key, *to, "--variant", "bas"): "has no variant 'bas': choose from whole, base",
    }
    for arguments, reason in refused.items():
        done = run_harness(*arguments)
        assert done.returncode == 2 and reason in done.stderr, done.stderr
    assert not (tmp_path / "b").exists()
