"""The convolutional format: counted to the byte, decoded once, the same after a trip to disk."""

import copy

import pytest
import torch
from safetensors.torch import load_file, save_file

from harness.ledger import payload_bytes
from kernels.dispatch import kind
from kernels.formats.bitpack import pack
from kernels.formats.conv import FLOOR, ConvLinear, from_patches, latent_levels, layer_shapes, to_patches, weight_levels
from kernels.formats.order import index_bits
from kernels.formats.packed import PackedLinear

CONV = dict(format="conv", patch=16, latent_channels=3, latent_bits=3, stages=2, width=6, weight_bits=5, bias=False)
VARIANTS = [
    CONV,
    CONV | dict(latent_bits=16, weight_bits=16),
    CONV | dict(levels="uniform", scales="none", reorder=True),
    CONV | dict(rank=1, stages=0, block=0, scales="half", kernel=5, bias=True),
]


def random_layer(spec: dict, seed: int = 0) -> ConvLinear:
    """Any bytes make a weight; only floats, scales and orders need care."""
    layer = PackedLinear.from_spec(spec, "cpu")
    generator = torch.Generator().manual_seed(seed)
    for name, buffer in layer.named_buffers():
        if buffer.is_floating_point():
            buffer.copy_(torch.rand(buffer.shape, generator=generator))
        else:
            info = torch.iinfo(buffer.dtype)
            buffer.copy_(torch.randint(info.min, info.max + 1, buffer.shape, generator=generator))
        if name == "weights" and layer.levels == "uniform" and layer.weight_bits < 16:  # one code has no level
            buffer.copy_(
                pack(
                    torch.randint(0, 2**layer.weight_bits - 1, (1, 32 * len(buffer) // layer.weight_bits)),
                    layer.weight_bits,
                )[0]
            )
        if name.endswith("_order"):
            count = layer.out_features if name == "row_order" else layer.in_features
            buffer.copy_(pack(torch.randperm(count, generator=generator)[None], index_bits(count))[0])
    return layer


@pytest.mark.parametrize("shape", [(192, 576), (33, 65), (7, 13), (1, 1), (16, 16), (40, 8)])
@pytest.mark.parametrize("base", VARIANTS)
def test_any_shape_is_laid_out_counted_saved_and_decoded(shape, base, tmp_path):
    spec = base | dict(out_features=shape[0], in_features=shape[1])
    layer, planned = random_layer(spec), PackedLinear.from_spec(spec)
    assert planned.stored_bits() == layer.stored_bits()
    tensors = {name: layer.get_buffer(name) for name in layer.stored_parts()}
    save_file(tensors, tmp_path / "packed.safetensors")
    assert 8 * payload_bytes(tmp_path / "packed.safetensors") == planned.stored_bits().total
    decoded = layer.decode()
    assert decoded.shape == shape and decoded.dtype == torch.float32 and torch.isfinite(decoded).all()
    assert torch.equal(decoded, layer.decode())
    reloaded = PackedLinear.from_spec(layer.spec())
    state = load_file(tmp_path / "packed.safetensors") | ({"bias": layer.bias} if layer.bias is not None else {})
    reloaded.load_state_dict(state, assign=True)
    assert torch.equal(reloaded.decode(), decoded)


def test_bits_are_what_the_shapes_say():
    layer = PackedLinear.from_spec(CONV | dict(out_features=33, in_features=65))
    assert layer.shapes == [(6, 3, 1), (20, 6, 3), (16, 5, 3), (1, 4, 3)]
    bits, numbers = layer.stored_bits(), sum(o * i * k * k for o, i, k in layer.shapes)
    latents = 3 * 5 * 4 * 4 * 3  # 3 x 5 patches, the last ones mostly padding, of 4 x 4 latents on 3 channels
    assert bits.codes == -(-3 * latents // 32) * 32
    assert bits.tables == -(-5 * numbers // 32) * 32 + 2 * 16 * (6 + 20 + 16 + 1)
    assert layer_shapes(1, 3, 2, 3)[-1] == (1, 2, 3) and layer_shapes(1, 20, 64, 3)[-1] == (1, FLOOR, 3)


@pytest.mark.parametrize("shape", [(33, 65), (16, 16), (1, 40)])
def test_patches_come_back(shape):
    matrix = torch.randn(shape)
    patches = to_patches(matrix, 16)
    grid = (-(-shape[0] // 16), -(-shape[1] // 16))
    assert torch.equal(from_patches(patches, grid, *shape), matrix)
    assert patches.square().sum() == pytest.approx(float(matrix.square().sum()), rel=1e-5)  # the rest is zeros


def test_it_decodes_by_its_definition():
    """One stage-less patch of one channel, whose network is short enough to write down."""
    spec = CONV | dict(patch=4, latent_channels=1, latent_bits=2, stages=0, width=1, levels="uniform", scales="none")
    layer = PackedLinear.from_spec(spec | dict(out_features=4, in_features=4), "cpu")
    codes = torch.randint(0, 4, (1, 16), generator=torch.Generator().manual_seed(0))
    # Of 31 levels from -1 to 1: stem 1; head 1 and -1.
    weights = torch.tensor([[30, 15, 15, 15, 15, 30, 0, 15, 15, 15]])
    layer.fill(
        latents=pack(codes, 2)[0],
        weights=pack(weights, 5)[0],
        absmax=torch.tensor([2.0, 0.5]).half(),
        biases=torch.tensor([0.25, -1.0]).half(),
        gain=torch.tensor([3.0]),
    )
    drawn = torch.nn.functional.gelu(2 * (codes.view(4, 4) / 1.5 - 1) + 0.25)
    right = torch.nn.functional.pad(drawn, (0, 1))[:, 1:]
    assert torch.allclose(layer.decode(), 3 * (0.5 * drawn - 0.5 * right - 1), atol=1e-5)


def test_orders_go_back_to_where_they_came_from():
    spec = CONV | dict(out_features=33, in_features=65)
    plain, ordered = random_layer(spec | dict(scales="none")), random_layer(spec | dict(scales="none", reorder=True))
    names = ("latents", "weights", "absmax", "biases", "gain")
    ordered.fill(
        **{name: plain.get_buffer(name) for name in names},
        row_order=ordered.row_order,
        column_order=ordered.column_order,
    )
    rows, columns = ordered.orders()
    assert torch.equal(ordered.decode()[rows][:, columns], plain.decode())


@pytest.mark.parametrize("bits", [2, 3, 6, 8])
def test_level_tables_fit_their_bits(bits):
    for levels in (weight_levels(bits, "nf"), weight_levels(bits, "uniform"), latent_levels(bits)):
        assert len(levels) <= 2**bits and levels.min() == -1 and levels.max() == 1 and (levels.diff() > 0).all()
    assert 0 in weight_levels(bits, "nf") and 0 in weight_levels(bits, "uniform")


def test_it_decodes_once_and_keeps_the_weight_out_of_everything_stored(monkeypatch):
    layer = random_layer(CONV | dict(out_features=33, in_features=65, bias=True))
    assert kind(layer, "cpu") == kind(layer, "cuda") == "decode-on-load"
    calls = []
    decode = ConvLinear.decode
    monkeypatch.setattr(ConvLinear, "decode", lambda self: calls.append(1) or decode(self))
    x = torch.randn(3, 65)
    stored = sum(8 * b.numel() * b.element_size() for n, b in layer.named_buffers() if n != "bias")
    assert layer.decode_seconds is None and layer.resident_bits == stored + 32 * 33 * 65
    with torch.inference_mode():
        first = layer(x)
    assert torch.equal(first, layer(x)) and len(calls) == 1 and layer.decode_seconds > 0
    assert torch.equal(first, torch.nn.functional.linear(x, decode(layer), layer.bias.float()))
    layer(x.half())  # another dtype is another weight, and only the last is kept
    assert len(calls) == 2 and layer.resident_bits == stored + 16 * 33 * 65
    names = set(layer.state_dict())
    assert names == {n for n, _ in layer.named_buffers()} and not any("loaded" in name for name in names)
    assert layer.stored_bits().total == stored


@pytest.mark.parametrize("change", ["move", "reload", "fill", "copy"])
def test_what_was_decoded_is_dropped_with_its_bytes(change):
    layer, other = (random_layer(CONV | dict(out_features=33, in_features=65), seed) for seed in (0, 1))
    x = torch.randn(3, 65)
    before = layer(x)
    if change == "move":
        assert layer.to("cpu")._loaded is None and torch.equal(layer(x), before)
        return
    if change == "copy":
        assert copy.deepcopy(layer)._loaded is None
        return
    if change == "reload":
        torch.nn.Sequential(layer).load_state_dict({f"0.{n}": t for n, t in other.state_dict().items()})
    else:
        layer.fill(**{name: other.get_buffer(name) for name in other.stored_parts()})
    assert torch.equal(layer(x), other(x)) and not torch.equal(layer(x), before)


@pytest.mark.parametrize(
    "wrong", [dict(patch=18), dict(latent_bits=9), dict(weight_bits=1), dict(levels="nf4"), dict(kernel=2)]
)
def test_layouts_that_cannot_be_are_refused(wrong):
    with pytest.raises(AssertionError):
        PackedLinear.from_spec(CONV | dict(out_features=33, in_features=65) | wrong)
