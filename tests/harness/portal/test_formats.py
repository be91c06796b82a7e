"""A cell leaves in a format of others, is read there by who maintains it, and comes back with every number it had."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from harness.portal.card import command
from harness.portal.files import resolve
from kernels.dispatch import kind
from tests.harness.portal.conftest import block_bytes, exported, imported, keys_of, load, logits, run_here

GPTQ = "gptq:bits=3,group=64,offset=zero,static_groups=false"
RTN4 = "rtn:bits=4,group=32,offset=symmetric"
RTN8 = "rtn:bits=8,group=32,offset=symmetric"
NF4 = "nf:bits=4,block=64"
QLORA = "qlora:bits=4,block=64,rank=4"


@pytest.mark.parametrize(
    ("method", "format", "variant"),
    [
        (GPTQ, "gptq", "v2"),
        (RTN4, "gptq", "v1"),
        (RTN8, "gptq", "v2"),
        (RTN4, "compressed-tensors", ""),
        (NF4, "bnb", "whole"),
    ],
)
def test_what_leaves_comes_back_with_every_number(method, format, variant, cell, two_blocks, tmp_path):
    found = cell(method)
    path = exported(found, format, tmp_path / "out", variant)
    compressed, ledger = imported(path, two_blocks)
    before = load(found)
    for name, layer in before.packed.items():
        assert torch.equal(compressed.packed[name].decode(), layer.decode()), name
        assert kind(compressed.packed[name], "cpu") == "fused"
    assert torch.equal(logits(compressed.model), logits(before.model))
    assert ledger.weights == before.inventory.weights
    assert ledger.stored_bits == 8 * block_bytes(path)


def test_a_file_of_gptq_is_what_its_readers_take_it_for(cell, tmp_path):
    """By the words of the format alone: a code is 3 bits at 3 i of the stream down a column."""
    for version, less in (("v1", 1), ("v2", 0)):
        found = cell(GPTQ)
        try:
            path = exported(found, "gptq", tmp_path / version, version)
        except ValueError as error:
            assert version == "v1" and "zero points of 0, which version 1 cannot store: write --variant v2" in str(
                error
            )
            continue
        name = "model.layers.1.self_attn.k_proj"
        tensors = {k.removeprefix(f"{name}."): v for k, v in load_file(path / "model.safetensors").items() if name in k}
        column_bits = [int(w) & 0xFFFFFFFF for w in tensors["qweight"][:, 7]]
        stream = sum(word << (32 * i) for i, word in enumerate(column_bits))
        codes = np.array([(stream >> (3 * i)) & 7 for i in range(576)])
        zero_rows = [sum((int(w) & 0xFFFFFFFF) << (32 * i) for i, w in enumerate(row)) for row in tensors["qzeros"]]
        zeros = np.array([(row >> (3 * 7)) & 7 for row in zero_rows]) + less
        group = tensors["g_idx"].numpy()
        weight = tensors["scales"][:, 7].float().numpy()[group] * (codes - zeros[group])
        assert np.array_equal(weight, load(found).packed[name].decode()[7].numpy())
        config = json.loads((path / "config.json").read_text())["quantization_config"]
        said = {name: config[name] for name in ("bits", "group_size", "desc_act", "sym", "checkpoint_format")}
        assert said == {
            "bits": 3,
            "group_size": 64,
            "desc_act": True,
            "sym": False,
            "checkpoint_format": "gptq" if less else "gptq_v2",
        }


def test_gptqmodel_loads_gptq(cell, tmp_path, monkeypatch):
    monkeypatch.setenv("GPTQMODEL_CPU_WORKERS", "2")
    gptqmodel = pytest.importorskip("gptqmodel")
    found = cell(GPTQ)
    path = exported(found, "gptq", tmp_path / "out", "v2")
    model = gptqmodel.GPTQModel.load(str(path), device="cpu", backend=gptqmodel.BACKEND.TORCH).model
    theirs, ours = logits(model).float(), logits(load(found).model)
    assert (theirs - ours).norm() < 0.01 * ours.norm()  # in bfloat16


def test_compressed_tensors_loads_compressed_tensors(cell, tmp_path):
    pytest.importorskip("compressed_tensors")
    found = cell(RTN4)
    path = exported(found, "compressed-tensors", tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    assert torch.equal(logits(model), logits(load(found).model))


def test_bitsandbytes_loads_bnb_and_peft_its_adapters(cell, tmp_path):
    from peft import PeftModel

    found = cell(QLORA)
    with pytest.raises(ValueError, match="has a low-rank part: --variant base"):
        exported(found, "bnb", tmp_path / "out")
    path = exported(found, "bnb", tmp_path / "out", "base")
    base = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    adapted = PeftModel.from_pretrained(base, path / "adapter")
    for name, layer in load(found).packed.items():
        module = adapted.base_model.model.get_submodule(name)
        weight_OI = dequantized(module.base_layer)
        assert torch.equal(weight_OI, layer.decode_base()), name
        torch.testing.assert_close(weight_OI + module.get_delta_weight("default"), layer.decode(), atol=1e-6, rtol=1e-5)


def dequantized(linear) -> torch.Tensor:
    from bitsandbytes.functional import dequantize_4bit

    return dequantize_4bit(linear.weight.data, linear.weight.quant_state)


@pytest.mark.parametrize("double", [True, False])
def test_a_checkpoint_of_bitsandbytes_is_what_it_runs(double, two_blocks, tmp_path):
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=double)
    theirs = AutoModelForCausalLM.from_pretrained(two_blocks.path, quantization_config=config, dtype=torch.float32)
    theirs.save_pretrained(tmp_path / "bnb")
    compressed, ledger = imported(tmp_path / "bnb", two_blocks)
    assert 8 * block_bytes(tmp_path / "bnb") == ledger.stored_bits
    for name, layer in compressed.packed.items():
        assert torch.equal(layer.decode(), dequantized(theirs.get_submodule(name))), name
        assert kind(layer, "cpu") == "fused"


def awq_words(codes_NO: torch.Tensor) -> torch.Tensor:
    """AutoAWQ's gemm words, by a loop over its order."""
    order = [0, 2, 4, 6, 1, 3, 5, 7]
    words = torch.zeros(len(codes_NO), codes_NO.shape[1] // 8, dtype=torch.int64)
    for place, output in enumerate(order):
        words |= codes_NO[:, output::8].long() << (4 * place)
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)


def test_a_checkpoint_of_awq_is_what_its_words_say(two_blocks, tmp_path):
    folder, expected = tmp_path / "awq", {}
    tensors = load_file(two_blocks.path / "model.safetensors")
    generator = torch.Generator().manual_seed(0)
    for name in [name for name in tensors if "_proj." in name]:
        rows, columns = tensors.pop(name).shape
        codes_IO = torch.randint(0, 16, (columns, rows), generator=generator)
        zero_GO = torch.randint(0, 16, (columns // 64, rows), generator=generator)
        scale_GO = torch.rand(columns // 64, rows, generator=generator).half()
        owner = name.removesuffix(".weight")
        tensors |= {f"{owner}.qweight": awq_words(codes_IO), f"{owner}.qzeros": awq_words(zero_GO)}
        tensors[f"{owner}.scales"] = scale_GO
        group_I = torch.arange(columns) // 64
        expected[owner] = ((codes_IO - zero_GO[group_I]) * scale_GO[group_I].float()).t()
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors")
    config = json.loads((two_blocks.path / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "awq", "bits": 4, "group_size": 64, "version": "gemm"}
    (folder / "config.json").write_text(json.dumps(config))
    compressed, ledger = imported(folder, two_blocks)
    assert all(torch.equal(compressed.packed[name].decode(), weight) for name, weight in expected.items())
    assert ledger.stored_bpw == 4 + (4 + 16) / 64


def test_a_checkpoint_is_a_row_like_any_other(cell, outgoing, two_blocks, tmp_path):
    path = exported(cell(RTN4), "compressed-tensors", tmp_path / "theirs")
    keys = keys_of(run_here(two_blocks, ["fp16"], model_cell=str(path)))
    row = cell_of(keys["imported:theirs"])
    own = cell(RTN4)
    (score,), (same,) = (list(map(c.store.score, c.artifact.spec.protocols)) for c in (row, own))
    assert score.window_nll == same.window_nll and score.kind == "fused"
    assert score.divergence.kld == same.divergence.kld
    assert row.artifact.ledger.stored_bits == 8 * block_bytes(path) > own.artifact.ledger.stored_bits
    assert row.artifact.spec.source.fingerprint == resolve(str(path)).fingerprint
    assert command(row.artifact.spec).startswith(
        f"python -m harness run --model {two_blocks.name} --methods fp16 --model-cell {path} --protocols"
    )
    card = (exported(row, "hf", tmp_path / "again") / "README.md").read_text()
    assert command(row.artifact.spec) in card and "as the checkpoint `theirs` of another program has it" in card
    assert f"| {row.artifact.ledger.stored_bits:,} |" in card and "imported:theirs`" not in card
    name = "self_attn.q_proj"
    assert {layer.config["bits"] for layer in row.artifact.layers.values() if layer.role == name} == {4}


def cell_of(key):
    from harness.portal.cells import stored_cell

    return stored_cell(key, None)


def rewritten(path: Path, change) -> None:
    tensors = load_file(path / "model.safetensors")
    change(tensors)
    save_file(tensors, path / "model.safetensors")


def reconfigured(path: Path, **changes) -> None:
    config = json.loads((path / "config.json").read_text())
    config["quantization_config"] |= changes
    (path / "config.json").write_text(json.dumps(config))


def _drop(name):
    return lambda path: rewritten(path, lambda tensors: tensors.pop(name))


def _add(name):
    return lambda path: rewritten(path, lambda tensors: tensors.update({name: torch.zeros(3)}))


def _say(**changes):
    return lambda path: reconfigured(path, **changes)


def _pickled(path):
    (path / "model.safetensors").unlink()
    (path / "pytorch_model.bin").write_bytes(b"\x80\x04.")


DAMAGES = [
    (_drop("model.layers.1.mlp.up_proj.scales"), "lacks model.layers.1.mlp.up_proj.scales"),
    (_drop("model.norm.weight"), "lacks model.norm.weight"),
    (_add("model.layers.7.mlp.up_proj.scales"), r"holds 1 tensors .* no place for \(model.layers.7.mlp.up_proj"),
    (_say(bits=8), "qweight is .* belongs: the file is mislabelled"),
    (_say(bits=5), "says 5 bits, and gptq has 2, 3, 4, 8"),
    (_say(group_size=64), "qzeros is .* belongs: the file is mislabelled"),
    (_say(checkpoint_format="marlin"), "of gptq's form 'marlin': save it as gptq or gptq_v2"),
    (_say(bits=None), "bits=None, which is no gptq of a version known here"),
    (_say(group_size=0), "groups of 0, which is no number of columns"),
    (_say(quant_method="quip"), "quantised by 'quip', which is not read here"),
    (_pickled, "is a pickle, .* python -c"),
]


@pytest.mark.parametrize(("damage", "reason"), DAMAGES)
def test_a_checkpoint_that_is_not_what_it_says_is_refused_by_name(damage, reason, cell, two_blocks, tmp_path):
    path = exported(cell(RTN4), "gptq", tmp_path / "theirs")
    damage(path)
    with pytest.raises(ValueError, match=reason):
        imported(path, two_blocks)


REFUSED = [
    (NF4, "gptq", "", "stored as the format 'codebook', which gptq has no form for: write --format hf"),
    (QLORA, "compressed-tensors", "", "stored as the format 'codebook'"),
    (GPTQ, "compressed-tensors", "", "forms its groups along an order of columns: write --format gptq, or hf"),
    (GPTQ, "gguf", "", "is a grid that no type of GGUF is"),
    (RTN4, "bnb", "", "is not NF4 in blocks of 64"),
    ("fp16", "compressed-tensors", "", "is not quantised"),
]


@pytest.mark.parametrize(("method", "format", "variant", "reason"), REFUSED)
def test_what_a_format_cannot_hold_is_refused_by_name(method, format, variant, reason, cell, tmp_path):
    with pytest.raises(ValueError, match=reason):
        exported(cell(method), format, tmp_path / "out", variant)
    assert not (tmp_path / "out").exists()
