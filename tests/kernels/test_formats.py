"""Packed formats: bits take the bits they say, decode what they were given, and keep their dtypes."""

import pytest
import torch

from kernels.dispatch import kind, linear
from kernels.formats.bitpack import pack, packed_words, unpack
from kernels.formats.order import BandOrder, index_bits
from kernels.formats.packed import FORMATS, PackedLinear
from kernels.formats.tables import TABLES

UNIFORM = dict(format="uniform", bits=3, group=64, offset="symmetric")
CODEBOOK = dict(format="codebook", dim=2, index_bits=6, block=64, rank=3)
PERMUTED = UNIFORM | {"offset": "minimum", "permuted": True}
ACROSS = CODEBOOK | dict(dim=4, along="columns")
BANDED = CODEBOOK | dict(band=64, order_bits=12, row_scales=True)


@pytest.mark.parametrize("bits", range(1, 17))
@pytest.mark.parametrize("count", [1, 31, 32, 33, 576, 577])
def test_packing_is_lossless_and_no_wider_than_it_says(bits: int, count: int):
    codes = torch.randint(0, 2**bits, (5, count), generator=torch.Generator().manual_seed(bits * 1000 + count))
    codes[0] = 2**bits - 1  # every bit set, including the sign bit of words
    words = pack(codes, bits)
    assert words.shape == (5, packed_words(count, bits)) and words.dtype == torch.int32
    assert 32 * words.shape[1] - bits * count < 32
    assert torch.equal(unpack(words, bits, count), codes.int())


@pytest.mark.parametrize("shape", [(576, 576), (192, 576), (576, 1536), (7, 13), (1, 1), (33, 65)])
@pytest.mark.parametrize(
    "base",
    [
        UNIFORM,
        UNIFORM | {"offset": "zero"},
        UNIFORM | {"offset": "minimum", "permuted": True},
        CODEBOOK,
        ACROSS,
        BANDED,
        dict(format="factors", components=1, bits=4, shifted=True),
        dict(format="mpo", chi=5, bits=8, sites=3),
        dict(format="bands", ranks="0+1+0", widths="8+3+2", group=128),
        dict(format="signs", masks=2),
    ],
)
def test_a_layout_on_meta_counts_what_a_real_one_stores(shape: tuple[int, int], base: dict):
    spec = base | dict(out_features=shape[0], in_features=shape[1], bias=True)
    if "rank" in base:
        spec["rank"] = min(3, *shape)
    planned, real = PackedLinear.from_spec(spec), PackedLinear.from_spec(spec, "cpu")
    assert planned.stored_bits() == real.stored_bits()
    assert planned.stored_bits().total == 8 * sum(
        b.numel() * b.element_size() for n, b in real.named_buffers() if n != "bias"
    )
    assert PackedLinear.from_spec(real.spec()).spec() == spec | {k: v for k, v in real.spec().items() if k not in spec}


@pytest.mark.parametrize("shape, band", [((10, 37), 4), ((8, 64), 8), ((3, 1), 2)])
def test_column_orders_come_back(shape, band):
    order = BandOrder(*shape, band, index_bits(shape[1]))
    order_BI = torch.stack([torch.randperm(shape[1]) for _ in range(-(-shape[0] // band))])
    order.packed = order.store(order_BI)["packed"]
    matrix = torch.randn(shape)
    assert torch.equal(order.restore(matrix.gather(1, order.per_row())), matrix)
    assert torch.equal(order.per_row()[-1], order_BI[-1])
    if shape[1] > 1:
        with pytest.raises(AssertionError):
            order.store(torch.zeros_like(order_BI))  # no permutation


def test_three_bits_take_three_bits():
    spec = UNIFORM | dict(out_features=576, in_features=576, bias=False)
    assert PackedLinear.from_spec(spec).stored_bits().codes == 3 * 576 * 576


def test_moving_and_casting_never_changes_a_stored_dtype():
    layer = PackedLinear.from_spec(CODEBOOK | dict(out_features=64, in_features=64, bias=True), "cpu")
    before = {name: b.dtype for name, b in layer.named_buffers()}
    for moved in (layer.half(), layer.to(torch.bfloat16), layer.double(), layer.to("cpu", torch.float32)):
        assert {name: b.dtype for name, b in moved.named_buffers()} == before
    assert layer.to_empty(device="meta").codes.is_meta


def test_fill_refuses_another_shape_or_dtype():
    layer = PackedLinear.from_spec(UNIFORM | dict(out_features=4, in_features=64, bias=False), "cpu")
    with pytest.raises(AssertionError, match="laid out as"):
        layer.fill(codes=layer.codes, scales=torch.zeros(4, 1))
    with pytest.raises(AssertionError, match="left without a value"):
        layer.fill(scales=layer.scales)


def test_uniform_decodes_by_its_definition():
    generator = torch.Generator().manual_seed(0)
    q = torch.randint(0, 8, (5, 70), generator=generator)
    scales = torch.rand(5, 2, generator=generator).half()  # group 64: a full group and a ragged one of 6
    zeros = torch.randint(0, 8, (5, 2), generator=generator)
    layer = PackedLinear.from_spec(
        dict(format="uniform", bits=3, group=64, offset="zero", out_features=5, in_features=70, bias=False), "cpu"
    )
    layer.fill(codes=pack(q, 3), scales=scales, zeros=pack(zeros.reshape(1, -1), 3))
    for o in range(5):
        for i in range(70):
            assert layer.decode()[o, i] == scales[o, i // 64].float() * (q[o, i] - zeros[o, i // 64])


def test_permuted_groups_return_to_their_columns_and_columns_have_their_own_scales():
    order = torch.randperm(40, generator=torch.Generator().manual_seed(1))
    weight = torch.arange(8).repeat(5)[None].float()  # column i holds i % 8
    layer = PackedLinear.from_spec(
        dict(
            format="uniform",
            bits=3,
            group=40,
            offset="minimum",
            permuted=True,
            column_scales=True,
            out_features=1,
            in_features=40,
            bias=False,
        ),
        "cpu",
    )
    layer.fill(
        codes=pack(weight[:, order].long(), 3),
        scales=torch.ones(1, 1).half(),
        minima=torch.zeros(1, 1).half(),
        order=order.to(torch.int16),
        column_scale=torch.arange(40).half(),
    )
    assert torch.equal(layer.decode(), weight * torch.arange(40))


def test_codebook_decodes_by_its_definition():
    generator = torch.Generator().manual_seed(0)
    layer = PackedLinear.from_spec(
        dict(
            format="codebook",
            dim=4,
            index_bits=5,
            block=16,
            scales="double",
            rank=2,
            adapter_bits=8,
            out_features=10,
            in_features=40,
            bias=False,
        ),
        "cpu",
    )
    codes = torch.randint(0, 32, (3, 40), generator=generator)  # 10 rows are padded to 3 vectors of 4
    book = torch.randn(32, 4, generator=generator).half()
    step, offset, scale_codes = (
        torch.tensor([0.01]),
        torch.tensor([0.5]),
        torch.randint(0, 256, (10, 3), generator=generator).to(torch.uint8),
    )
    left, right = (torch.randint(-127, 128, s, generator=generator).to(torch.int8) for s in ((10, 2), (2, 40)))
    left_scale, right_scale = torch.rand(2, generator=generator).half(), torch.rand(2, generator=generator).half()
    layer.fill(
        **{
            "codes": pack(codes, 5),
            "codebook": book,
            "scales.codes": scale_codes,
            "scales.steps": step,
            "scales.offset": offset,
        },
        **{
            "lowrank.left": left,
            "lowrank.right": right,
            "lowrank.left_scale": left_scale,
            "lowrank.right_scale": right_scale,
        },
    )
    decoded = layer.decode()
    for o, i in [(0, 0), (3, 15), (4, 16), (9, 39), (7, 20)]:
        scale = scale_codes[o, i // 16].float() * 0.01 + 0.5
        lowrank = sum(
            float(left[o, r]) * float(left_scale[r]) * float(right[r, i]) * float(right_scale[r]) for r in range(2)
        )
        assert decoded[o, i].item() == pytest.approx(
            book[codes[o // 4, i], o % 4].item() * scale.item() + lowrank, rel=1e-5, abs=1e-4
        )


def test_vectors_along_columns_decode_by_their_definition():
    generator = torch.Generator().manual_seed(0)
    layer = PackedLinear.from_spec(
        ACROSS | dict(index_bits=5, block=16, scales="half", rank=0, out_features=3, in_features=22, bias=False), "cpu"
    )
    codes = torch.randint(0, 32, (3, 6), generator=generator)  # 22 columns are padded to 6 vectors of 4
    book, scales = torch.randn(32, 4, generator=generator).half(), torch.rand(3, 2, generator=generator).half()
    layer.fill(**{"codes": pack(codes, 5), "codebook": book, "scales.direct": scales})
    for o in range(3):
        for i in range(22):
            assert layer.decode()[o, i] == book[codes[o, i // 4], i % 4].float() * scales[o, i // 16].float()


def test_the_reference_product_is_the_decoded_weight():
    layer = PackedLinear.from_spec(dict(format="dense", out_features=33, in_features=65, bias=True), "cpu")
    generator = torch.Generator().manual_seed(0)
    layer.fill(weight=torch.randn(33, 65, generator=generator).half(), bias=torch.randn(33, generator=generator).half())
    x = torch.randn(3, 7, 65, generator=generator)
    expected = x.double() @ layer.decode().double().T + layer.bias.double()
    assert torch.allclose(layer(x).double(), expected, atol=1e-4) and torch.equal(layer(x), linear(layer, x))
    assert kind(layer, "cpu") == "dense"


def test_formats_and_tables_are_found_by_the_names_they_carry():
    assert all(FORMATS.get(name).format == name for name in FORMATS)
    assert all(TABLES.get(name).form == name for name in TABLES)
    with pytest.raises(ValueError, match="did you mean 'uniform'"):
        PackedLinear.from_spec({"format": "uniforn"})


def test_a_layer_that_decodes_for_every_product_keeps_no_weight():
    layer = PackedLinear.from_spec(UNIFORM | dict(out_features=4, in_features=64, bias=False), "cpu")
    with pytest.raises(AssertionError, match="decodes for every product"):
        layer.loaded(torch.float32)


def test_row_scales_are_counted_in_every_format():
    layer = PackedLinear.from_spec(UNIFORM | dict(out_features=4, in_features=64, bias=True, row_scales=True))
    assert layer.stored_parts() == {"codes": "codes", "scales": "scales", "row_scale": "scales"}
