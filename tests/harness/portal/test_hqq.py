"""Checkpoints of hqq: every layout it writes is decoded to the numbers it stands for, and what is not read is named."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from kernels.dispatch import kind
from tests.harness.portal.conftest import block_bytes, imported

WORDS = {
    8: (8, 1),
    6: (8, 1),
    5: (8, 1),
    4: (4, 2),
    3: (3, 10),
    2: (2, 4),
    1: (1, 8),
}  # bits -> (width, codes of a word)
LAYOUTS = [(bits, axis) for bits in WORDS for axis in (0, 1)]  # one for every matrix of two blocks


def characters(text):
    return torch.tensor([ord(character) for character in text], dtype=torch.uint8)


def settings(bits, axis, group, shape):
    """The tensors that stand beside the numbers of a layer."""
    found = {name: torch.tensor(value, dtype=torch.int32) for name, value in (("nbits", bits), ("axis", axis))}
    found |= {"group_size": torch.tensor(group, dtype=torch.int32), "shape": torch.tensor(shape)}
    width = WORDS[bits][0]
    found["packing"] = characters("3bit_32" if width == 3 else f"{width}bit_u8")
    found["compute_dtype"] = characters("torch.float16")
    flags = ("view_as_float", "quant_scale", "quant_zero")
    return found | {name: torch.tensor(0, dtype=torch.uint8) for name in flags}


def a_layer(bits, axis, group, shape, generator):
    """(its tensors, its weight), from the words of the format: code by code into the words, group by group out."""
    rows, columns = shape
    groups = rows * columns // group
    code_GS = torch.randint(0, 2**bits, (groups, group), generator=generator)
    scale_G = (torch.rand(groups, generator=generator) / 100).half()
    zero_G = (torch.rand(groups, generator=generator) * 2**bits).half()  # of any value
    weight_GS = (code_GS - zero_G.float()[:, None]) * scale_G.float()[:, None]
    grid, weight = (code_GS, weight_GS) if axis else (code_GS.t(), weight_GS.t())
    width, count = WORDS[bits]
    step = -(-len(grid) // count)
    words = torch.zeros(step, grid.shape[1], dtype=torch.int64)
    for place in range(count):
        part = grid[place * step : (place + 1) * step]
        words[: len(part)] += part << (width * (count - 1 - place))
    numbers = {"scale": scale_G, "zero": zero_G}
    tensors = {"W_q": words.to(torch.int32 if width == 3 else torch.uint8)}
    tensors |= {name: value[:, None] if axis else value[None] for name, value in numbers.items()}
    return tensors | settings(bits, axis, group, shape), weight.reshape(rows, columns)


@pytest.fixture
def checkpoint(two_blocks, tmp_path):
    """(folder, the weights it stands for): every matrix in another layout."""
    folder, expected, generator = tmp_path / "hqq", {}, torch.Generator().manual_seed(0)
    tensors = load_file(two_blocks.path / "model.safetensors")
    names = [name for name in tensors if "_proj." in name]
    assert len(names) == len(LAYOUTS)
    for name, (bits, axis) in zip(names, LAYOUTS, strict=True):
        owner = name.removesuffix(".weight")
        found, expected[owner] = a_layer(bits, axis, 64, tensors.pop(name).shape, generator)
        tensors |= {f"{owner}.{leaf}": tensor.contiguous() for leaf, tensor in found.items()}
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors")
    config = json.loads((two_blocks.path / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "hqq", "quant_config": {"self_attn.q_proj": {}}}
    (folder / "config.json").write_text(json.dumps(config))
    return folder, expected


def test_every_layout_is_what_its_words_say(checkpoint, two_blocks):
    folder, expected = checkpoint
    compressed, ledger = imported(folder, two_blocks)
    for name, weight_OI in expected.items():
        assert torch.equal(compressed.packed[name].decode(), weight_OI), (name, compressed.packed[name])
        assert kind(compressed.packed[name], "cpu") == "decode-per-call"
    assert ledger.stored_bits == 8 * block_bytes(folder)
    compressed.save(folder / "ours")
    assert compressed.load(folder / "ours", "cpu", torch.float32).kind == "decode-per-call"


DAMAGES = [
    ({"self_attn.q_proj.quant_zero": torch.tensor(1)}, "q_proj has zero points that are quantised themselves"),
    ({"self_attn.q_proj.quant_scale": torch.tensor(1)}, "q_proj has scales that are quantised themselves"),
    ({"self_attn.q_proj.channel_wise": torch.tensor(0)}, "q_proj has one scale for all of it"),
    ({"self_attn.q_proj.packing": characters("5bit_32")}, "q_proj is packed as '5bit_32', which is not read here"),
    ({"mlp.up_proj.shape": torch.tensor([8, 8])}, r"up_proj is \[8, 8\] in groups of 64 along axis ., where"),
    ({"mlp.up_proj.group_size": torch.tensor(128)}, "up_proj has codes of .* groups of 128.: the file is mislabelled"),
    ({"mlp.up_proj.scale": torch.zeros(3).half()}, "up_proj has scales of .* belongs"),
    ({"mlp.up_proj.meta_scale": torch.zeros(3)}, "holds 1 tensors that .* no place for .*up_proj.meta_scale"),
    ({"mlp.up_proj.nbits": None}, "lacks model.layers.1.mlp.up_proj.nbits"),
]


@pytest.mark.parametrize(("damage", "reason"), DAMAGES)
def test_what_is_not_read_is_named(damage, reason, checkpoint, two_blocks):
    folder, _ = checkpoint
    tensors = load_file(folder / "model.safetensors")
    for name, tensor in damage.items():
        full = f"model.layers.1.{name}"
        tensors.pop(full, None)
        tensors |= {} if tensor is None else {full: tensor}
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(ValueError, match=reason):
        imported(folder, two_blocks)


@pytest.mark.parametrize(
    ("said", "reason"),
    [
        (
            {"quant_config": {"weight_quant_params": {"nbits": 4, "axis": 1}}},
            "nbits is ., and 4 in its config: the file is mislab",
        ),
        ({"quant_config": None}, "quant_config=None, which is no hqq of a version known"),
    ],
)
def test_a_configuration_that_says_otherwise_is_refused(said, reason, checkpoint, two_blocks):
    folder, _ = checkpoint
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] |= said
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=reason):
        imported(folder, two_blocks)


def test_what_hqq_writes_is_what_hqq_decodes(two_blocks, tmp_path):
    quantize = pytest.importorskip("hqq.core.quantize")
    tensors = load_file(two_blocks.path / "model.safetensors")
    names, expected = [name for name in tensors if "_proj." in name], {}
    for name, (bits, axis) in zip(names, LAYOUTS, strict=True):
        linear = torch.nn.Linear(*reversed(tensors[name].shape), bias=False)
        linear.weight.data = tensors.pop(name).float()
        config = quantize.BaseQuantizeConfig(nbits=bits, group_size=64, axis=axis, view_as_float=bits == 4)
        theirs = quantize.HQQLinear(linear, config, compute_dtype=torch.float16, device="cpu")
        owner = name.removesuffix(".weight")
        tensors |= {f"{owner}.{leaf}": t.data.contiguous() for leaf, t in theirs.state_dict().items() if t is not None}
        in_full = theirs.meta | {"compute_dtype": torch.float32}  # the same numbers, without rounding every step
        expected[owner] = quantize.Quantizer.dequantize(theirs.W_q, in_full).float()
    folder = tmp_path / "theirs"
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors")
    config = json.loads((two_blocks.path / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "hqq", "quant_config": {}}
    (folder / "config.json").write_text(json.dumps(config))
    compressed, ledger = imported(folder, two_blocks)
    assert all(torch.equal(compressed.packed[name].decode(), weight) for name, weight in expected.items())
    assert ledger.stored_bits == 8 * block_bytes(folder)
