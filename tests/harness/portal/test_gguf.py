"""Files of llama.cpp: a cell leaves in one, any type of ggml comes in, and a file with the wrong name is called so."""

import logging
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGML_QUANT_SIZES, MODEL_ARCH, GGMLQuantizationType, GGUFWriter, LlamaFileType, get_tensor_name_map
from gguf.quants import dequantize, quantize
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, GgufConfig, LlamaConfig

from harness.data.assets import MODELS, ResolvedModel, fetch
from harness.data.files import CACHE_VARIABLE
from harness.model import empty_model, inventory
from harness.portal.gguf import GRIDS, blocks_of, numbers_of, require_same, vocabulary
from harness.portal.gguf_label import GUESSED, declared, mislabelled
from harness.report.baseline import read_rows
from harness.report.board import planned_board
from harness.report.leaderboard import write_leaderboard
from kernels.dispatch import kind as kind_of
from kernels.formats.ggml import GgmlLinear
from tests.harness.portal.conftest import exported, imported, load, logits, run_here

RTN4 = "rtn:bits=4,group=32,offset=symmetric"
Q2_K = GGMLQuantizationType.Q2_K


def sizes(kind: str) -> tuple[int, int]:
    """(weights of a block, its bytes)."""
    return GGML_QUANT_SIZES[GGMLQuantizationType[kind]]


def decodes(kind: str) -> bool:
    try:
        dequantize(np.zeros((1, sizes(kind)[1]), dtype=np.uint8), GGMLQuantizationType[kind])
    except NotImplementedError:
        return False
    return True


TYPES = [kind for kind in GGMLQuantizationType.__members__ if kind not in ("F32", "F16", "BF16")]
DECODED = [kind for kind in TYPES if decodes(kind)]


def test_transformers_and_we_load_gguf(cell, two_blocks, short_tokenizer, tmp_path, monkeypatch):
    found = cell(RTN4)
    words = vocabulary(two_blocks.path, len(short_tokenizer))
    assert words["token_list"] == short_tokenizer.convert_ids_to_tokens(range(len(short_tokenizer)))
    assert words["token_types"][:18] == [3] * 17 + [1] and words["eos_token_id"] == short_tokenizer.eos_token_id
    monkeypatch.setattr("harness.portal.gguf.vocabulary", lambda model, size: {})  # gguf takes seconds to read one
    path = exported(found, "gguf", tmp_path / "out")
    plain = GgufConfig(dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32, quantization_config=plain
    )
    assert torch.equal(logits(model), logits(load(found).model))
    compressed, ledger = imported(path, two_blocks)
    assert torch.equal(logits(compressed.model), logits(model)) and ledger.stored_bpw == 4.5


@pytest.mark.parametrize("kind", GRIDS)
def test_a_grid_of_gguf_is_its_blocks(kind):
    blocks = random_blocks(kind, 6, 3)
    numbers = numbers_of(kind, torch.from_numpy(blocks))
    assert np.array_equal(numbers.layer(False).decode().numpy(), dequantize(blocks, GGMLQuantizationType[kind]))
    again, bytes_OB = blocks_of(numbers)
    assert again == kind and np.array_equal(bytes_OB.numpy(), blocks)


def random_blocks(kind: str, rows: int, blocks: int) -> np.ndarray:
    """Bytes of so many blocks a row: random, but for 16-bit numbers that must be finite wherever they stand."""
    size = sizes(kind)[1]
    found = np.random.default_rng(0).integers(0, 256, (rows, blocks, size), dtype=np.uint8)
    found[:, :, 1::2] &= 0x3B  # neither the sign nor the largest exponents of an fp16 at any even place
    if kind == "MXFP4":
        found[:, :, 0] &= 0x7F  # an exponent alone
    return found.reshape(rows, -1)


@pytest.mark.parametrize("kind", [kind for kind in DECODED if kind not in GRIDS])
def test_other_types_of_ggml_are_kept_as_the_blocks_they_are(kind):
    weights = sizes(kind)[0]
    blocks = random_blocks(kind, 4, 2)
    layer = GgmlLinear(2 * weights, 4, False, kind=kind)
    layer.fill(blocks=torch.from_numpy(blocks))
    expected = dequantize(blocks, GGMLQuantizationType[kind])
    assert np.isfinite(expected).all() and np.array_equal(layer.decode().numpy(), expected)
    assert layer.stored_bits().total == 8 * blocks.nbytes
    x = torch.ones(1, 2 * weights)
    assert layer(x).shape == (1, 4) and layer.resident_bits == 8 * blocks.nbytes + 32 * layer.decode().numel()


@pytest.mark.parametrize("kind", sorted(set(TYPES) - set(DECODED)))
def test_a_type_that_gguf_does_not_decode_is_refused_by_name(kind):
    with pytest.raises(ValueError, match=f"gguf decodes no blocks of type {kind}: update gguf"):
        GgmlLinear(1024, 4, False, kind=kind)


def written(path: Path, folder: Path, blocks: dict[str, tuple[str, np.ndarray]], said: int) -> Path:
    """A file of the model in `folder` whose block matrices are these (type, bytes of rows), in transformers' order; the
    rest is the folder's weights, or zeros where there are none."""
    config = AutoConfig.from_pretrained(folder)
    weights = load_file(folder / "model.safetensors") if (folder / "model.safetensors").exists() else {}
    names = get_tensor_name_map(MODEL_ARCH.LLAMA, config.num_hidden_layers)
    writer = GGUFWriter(path, "llama")
    writer.add_file_type(said)
    writer.add_block_count(config.num_hidden_layers)
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    for name, parameter in empty_model(config, torch.float32).named_parameters():
        owner, _, leaf = name.rpartition(".")
        theirs = f"{names.get_name(owner)}.{leaf}"
        if owner in blocks:
            kind, rows = blocks[owner]
            if count := heads.get(owner.rpartition(".")[2]):  # two halves of every head, one row of each in turn
                rows = rows.reshape(count, 2, len(rows) // count // 2, -1).swapaxes(1, 2).reshape(len(rows), -1)
            writer.add_tensor(theirs, np.ascontiguousarray(rows), raw_dtype=GGMLQuantizationType[kind])
        else:
            writer.add_tensor(theirs, weights.get(name, torch.zeros(parameter.shape)).float().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_every_type_of_ggml_comes_in_from_a_file(tmp_path):
    """One small Llama, every matrix of another type, some of which are grids."""
    LlamaConfig(
        vocab_size=32,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=-(-len(DECODED) // 7),
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    ).save_pretrained(tmp_path / "small")
    layers = inventory(empty_model(AutoConfig.from_pretrained(tmp_path / "small"), torch.float32)).layers
    blocks, bits = {}, 0
    for number, layer in enumerate(layers):
        kind = DECODED[number % len(DECODED)]
        blocks[layer.name] = kind, random_blocks(kind, layer.out_features, layer.in_features // sizes(kind)[0])
        bits += 8 * blocks[layer.name][1].nbytes
    assert {kind for kind, _ in blocks.values()} == set(DECODED)
    path = written(tmp_path / "all.gguf", tmp_path / "small", blocks, LlamaFileType.MOSTLY_Q4_0)
    compressed, ledger = imported(path, ResolvedModel("small", tmp_path / "small", ""))
    for name, layer in compressed.packed.items():
        kind, rows = blocks[name]
        assert np.array_equal(layer.decode().numpy(), dequantize(rows, GGMLQuantizationType[kind])), (name, kind)
        assert (layer.format == "uniform") == (kind in GRIDS)
    assert ledger.stored_bits == bits


@pytest.mark.parametrize(
    ("said", "weights", "note"),
    [
        ("MOSTLY_Q2_K", {"Q2_K": 6, "Q3_K": 4}, ""),
        ("MOSTLY_Q2_K", {"Q2_K": 4, "Q3_K": 6}, "declared Q2_K, but its block weights are 60% Q3_K, 40% Q2_K"),
        ("MOSTLY_Q4_K_M", {"Q4_K": 7, "Q6_K": 3}, ""),
        ("MOSTLY_IQ2_S", {"IQ2_XS": 7, "IQ3_S": 3}, ""),
        ("MOSTLY_F16", {"Q8_0": 1}, "declared F16, but its block weights are 100% Q8_0"),
        (5, {"Q8_0": 1}, "declared file type 5, but its block weights are 100% Q8_0"),
        ("GUESSED", {"Q8_0": 1}, ""),
        (None, {"Q8_0": 1}, ""),
    ],
)
def test_a_name_is_true_of_what_most_weights_are(said, weights, note):
    assert mislabelled(LlamaFileType[said] if isinstance(said, str) else said, Counter(weights)) == note


def test_every_name_of_llama_cpp_stands_for_a_type():
    assert all(declared(said)[1] in GGMLQuantizationType.__members__ for said in LlamaFileType if said < GUESSED)


def test_a_file_with_a_wrong_name_is_called_so(outgoing, two_blocks, tmp_path, caplog, monkeypatch):
    """Declared Q4_0; the only rows that blocks of 256 fill are of Q2_K, all others of Q8_0."""
    weights = load_file(two_blocks.path / "model.safetensors")
    blocks = {}
    for name in (name.removesuffix(".weight") for name in weights if "_proj." in name):
        weight_OI = weights[f"{name}.weight"].float().numpy()
        kind = "Q2_K" if "down_proj" in name else "Q8_0"
        rows = quantize(weight_OI, GGMLQuantizationType.Q8_0)
        if kind == "Q2_K":
            view = random_blocks(kind, len(weight_OI), weight_OI.shape[1] // 256).reshape(len(weight_OI), -1, 84)
            view[:, :, 80:] = np.array([0.002, 0.004], dtype=np.float16).view(np.uint8)
            rows = view.reshape(len(view), -1)
        blocks[name] = kind, rows
    path = written(tmp_path / "small-Q4_0.gguf", two_blocks.path, blocks, LlamaFileType.MOSTLY_Q4_0)
    note = (
        "small-Q4_0.gguf is declared Q4_0, but its block weights are 75% Q8_0, 25% Q2_K: "
        "7.0312 bits per weight are stored"
    )
    with caplog.at_level(logging.WARNING, "harness"):
        compressed, ledger = imported(path, two_blocks)
    assert caplog.messages == [note] and ledger.stored_bpw == 0.75 * 8.5 + 0.25 * 2.625
    down = compressed.packed["model.layers.1.mlp.down_proj"]
    assert np.array_equal(down.decode().numpy(), dequantize(blocks["model.layers.1.mlp.down_proj"][1], Q2_K))
    assert kind_of(down, "cpu") == "decode-on-load"
    monkeypatch.setenv(CACHE_VARIABLE, str(outgoing[0]))
    plan = run_here(two_blocks, ["fp16"], model_cell=str(path))
    write_leaderboard(planned_board(plan, {}, "", {}), tmp_path / "out")
    row = read_rows(tmp_path / "out")["imported:small-Q4_0.gguf"]
    assert row["model_note"].endswith(note) and row["kind"] == "decode-on-load" and row["stored_bpw"] == "7.03125"
    assert "Note on imported:small-Q4" in (tmp_path / "out" / "leaderboard.md").read_text()


def test_the_published_gguf_is_the_default_model(model, weights):
    """210 matrices of Q4_1, each exactly what the converted copy holds; 5 bits, whatever '4_1' may sound like."""
    compressed, ledger = imported(published(model), model)
    assert ledger.stored_bpw == 5.0 and ledger.bits.codes == 4 * ledger.weights
    for name, layer in list(compressed.packed.items())[::30]:
        assert torch.equal(layer.decode(), weights[f"{name}.weight"].float()), name


def published(model) -> Path:
    return fetch(MODELS[model.name].file)


def test_a_file_of_another_model_is_refused(two_blocks, tmp_path):
    config = AutoConfig.from_pretrained(two_blocks.path)
    said = {"general.architecture": "llama", "llama.block_count": 30}
    with pytest.raises(ValueError, match="has block_count 30, --model 2: give the model it is of"):
        require_same(said.get, tmp_path / "x.gguf", config)
    with pytest.raises(ValueError, match="is of architecture 'qwen2', --model of 'llama'"):
        require_same({"general.architecture": "qwen2"}.get, tmp_path / "x.gguf", config)
    config.model_type = "phi3"
    with pytest.raises(ValueError, match="models of type phi3 are not read from GGUF"):
        require_same(said.get, tmp_path / "x.gguf", config)
    (tmp_path / "x.gguf").write_bytes(b"GGUX" * 9)
    with pytest.raises(ValueError, match="is no GGUF file that can be read"):
        imported(tmp_path / "x.gguf", two_blocks)
