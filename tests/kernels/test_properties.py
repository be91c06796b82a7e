"""What holds for every layout there is: codes come back, a layout says the same bits wherever it is laid out, and what
is saved is what is counted and what is decoded."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load, save

from kernels.formats.bitpack import pack, packed_words, unpack
from kernels.formats.codebook import CodebookLinear
from kernels.formats.hqq import NUMBERS, WIDTHS
from kernels.formats.numbers import NUMBER_BITS
from kernels.formats.packed import FORMATS, PackedLinear
from kernels.formats.scales import SCHEMES, STEP_DTYPES
from kernels.formats.tables import TABLES
from kernels.formats.trellis import MULTIPLIERS, WINDOWS, TrellisLinear
from kernels.formats.uniform import OFFSETS, UniformLinear
from kernels.synthetic import random_layer

Spec = dict[str, Any]
brief = settings(deadline=None, max_examples=100, derandomize=True)  # what breaks a test is a change, not a draw
SIZES = st.integers(1, 40)


@st.composite
def dense(draw: st.DrawFn, rows: int, columns: int) -> Spec:
    return dict(dtype=draw(st.sampled_from(["float16", "bfloat16"])))


@st.composite
def uniform(draw: st.DrawFn, rows: int, columns: int) -> Spec:
    return dict(
        bits=draw(st.integers(1, 16)),
        group=draw(st.integers(0, columns + 1)),
        offset=draw(st.sampled_from(OFFSETS)),
        permuted=draw(st.booleans()),
        column_scales=draw(st.booleans()),
    )


@st.composite
def codebook(draw: st.DrawFn, rows: int, columns: int) -> Spec:
    table = draw(st.sampled_from(["learnt", "nf", *TABLES]))
    dim = 1 if table == "nf" else draw(st.sampled_from([1, 2, 4, 8]))
    spec = dict(dim=dim, table=table, share="one" if table in TABLES else "", block=draw(st.integers(0, columns + 1)))
    # As many digits as a small decoder has by default must find a bit each; NormalFloat has a zero between two sides.
    spec["index_bits"] = draw(st.integers(8 if table == "mlp" else 2 if table == "nf" else 1, 9))
    spec["scales"] = draw(st.sampled_from(SCHEMES))
    if spec["scales"] == "double":
        spec["scale_bits"] = draw(st.integers(1, 8))
        spec["scale_group"] = draw(st.integers(1, 70))
        spec["scale_dtype"] = draw(st.sampled_from(list(STEP_DTYPES)))
    spec["along"] = draw(st.sampled_from(["rows", "columns"]))
    if draw(st.booleans()):
        spec["band"] = dim * draw(st.integers(1, 5))
    return spec


@st.composite
def conv(draw: st.DrawFn, rows: int, columns: int) -> Spec:
    stages = draw(st.integers(0, 2))
    return dict(
        patch=2**stages * draw(st.integers(1, 4)),
        stages=stages,
        latent_channels=draw(st.integers(1, 3)),
        latent_bits=draw(st.sampled_from([*range(1, 9), 16])),
        width=draw(st.integers(1, 6)),
        kernel=draw(st.sampled_from([1, 3])),
        weight_bits=draw(st.sampled_from([*range(2, 9), 16])),
        levels=draw(st.sampled_from(["nf", "uniform"])),
        block=draw(st.integers(0, columns + 1)),
        scales=draw(st.sampled_from(["none", "half", "double"])),
        reorder=draw(st.booleans()),
    )


@st.composite
def trellis(draw: st.DrawFn, rows: int, columns: int) -> Spec:
    bits, dim = draw(st.sampled_from(list(MULTIPLIERS)))
    return dict(bits=bits, dim=dim, window=draw(st.sampled_from(WINDOWS)), scale_bits=draw(st.integers(1, 8)))


@st.composite
def factors(draw: st.DrawFn, rows: int, columns: int) -> Spec:
    components = draw(st.integers(1, min(rows, columns)))
    return dict(components=components, bits=draw(st.sampled_from(NUMBER_BITS)), shifted=draw(st.booleans()))


@st.composite
def mpo(draw: st.DrawFn, rows: int, columns: int) -> Spec:
    return dict(chi=draw(st.integers(1, 12)), bits=draw(st.sampled_from(NUMBER_BITS)), sites=draw(st.integers(2, 4)))


@st.composite
def signs(draw: st.DrawFn, rows: int, columns: int) -> Spec:
    return dict(masks=draw(st.integers(0, 4)))


@st.composite
def bands(draw: st.DrawFn, rows: int, columns: int) -> Spec:
    full = min(rows, columns)
    first = draw(st.integers(0, full))
    second = draw(st.integers(0 if first else 1, max(full - first, 0 if first else 1)))
    return dict(
        ranks=f"{first}+{second}", widths=draw(st.sampled_from(["8+2", "3+3", "4+1"])), group=draw(st.integers(1, 50))
    )


@st.composite
def hqq(draw: st.DrawFn, rows: int, columns: int) -> Spec:
    count = rows * columns
    return dict(
        width=draw(st.sampled_from(list(WIDTHS))),
        group=draw(st.sampled_from([part for part in range(1, count + 1) if count % part == 0])),
        axis=draw(st.integers(0, 1)),
        numbers=draw(st.sampled_from(list(NUMBERS))),
    )


# Not drawn: a difference stands on a base that no file of it holds, and ggml's blocks fill rows of fixed sizes.
APART = {"delta", "ggml"}
OF_FORMAT = {
    "signs": signs,
    "bands": bands,
    "dense": dense,
    "uniform": uniform,
    "codebook": codebook,
    "trellis": trellis,
    "conv": conv,
    "factors": factors,
    "mpo": mpo,
    "hqq": hqq,
}


@st.composite
def layouts(draw: st.DrawFn) -> tuple[Spec, int, int, bool]:
    """A configuration of any format, rows, columns, and whether there is a bias."""
    rows, columns = draw(SIZES), draw(SIZES)
    name = draw(st.sampled_from(sorted(OF_FORMAT)))
    spec = {"format": name, **draw(OF_FORMAT[name](rows, columns))}
    spec |= dict(rank=draw(st.integers(0, 3)), adapter_bits=draw(st.sampled_from([8, 16])))
    spec["row_scales"] = draw(st.booleans())
    spec |= {"rotated": True} if draw(st.booleans()) else {}
    return spec, rows, columns, draw(st.booleans())


def laid_out(layout: tuple[Spec, int, int, bool], device: str) -> PackedLinear:
    spec, rows, columns, bias = layout
    return PackedLinear.from_spec({**spec, "out_features": rows, "in_features": columns, "bias": bias}, device)


def test_every_format_is_tried():
    assert set(OF_FORMAT) | APART == set(FORMATS)


@brief
@given(st.data(), st.integers(1, 16), st.integers(1, 4), st.integers(1, 100))
def test_packed_codes_come_back(data: st.DataObject, bits: int, rows: int, count: int):
    number = st.integers(0, 2**bits - 1)
    codes = torch.tensor(data.draw(st.lists(number, min_size=rows * count, max_size=rows * count))).view(rows, count)
    words = pack(codes, bits)
    assert words.shape == (rows, packed_words(count, bits)) and 0 <= 32 * words.shape[1] - bits * count < 32
    assert torch.equal(unpack(words, bits, count), codes.int())


@brief
@given(layouts(), st.integers(0, 2**31 - 1))
def test_what_is_encoded_decodes_to_the_same_weights(layout, seed: int):
    spec, rows, columns, bias = layout
    layer = random_layer(spec, rows, columns, bias, seed)
    if isinstance(layer, UniformLinear):
        codes_OI = unpack(layer.codes, layer.bits, columns)
        zero_OG = None if layer.zeros is None else unpack(layer.zeros, layer.bits, layer.scales.numel())
        order_I = None if layer.order is None else layer.order.long() & 0xFFFF
        tensors = layer.tensors(codes_OI, layer.scales, zero_OG, layer.minima, order_I, layer.column_scale)
    elif isinstance(layer, CodebookLinear):
        tensors = layer.tensors(layer.indices(), dict(layer.scales.named_buffers()), layer.entries())
        if layer.order is not None:
            tensors["order.packed"] = layer.order.store(layer.order.per_row()[:: layer.order.band])["packed"]
    elif isinstance(layer, TrellisLinear):
        tensors = layer.tensors(layer.indices() & (2**layer.bits - 1), dict(layer.scales.named_buffers()))
    else:
        return
    if layer.rotation is not None:
        tensors["rotation.signs"] = layer.rotation.signs
    again = laid_out(layout, "cpu")
    again.fill(**tensors)  # low-rank part and row scales without effect
    if again.table_key:
        again.attach(layer.shared)
    assert torch.equal(again.decode(), layer.decode_base())


@brief
@given(layouts())
def test_a_layout_takes_the_same_bits_wherever_it_is_laid_out(layout):
    planned, real = laid_out(layout, "meta"), laid_out(layout, "cpu")
    assert planned.stored_bits() == real.stored_bits() and planned.spec() == real.spec()
    assert {n: (b.shape, b.dtype) for n, b in planned.named_buffers()} == {
        n: (b.shape, b.dtype) for n, b in real.named_buffers()
    }
    assert PackedLinear.from_spec(planned.spec()).stored_bits() == planned.stored_bits()


@brief
@given(layouts(), st.integers(0, 2**31 - 1))
def test_numbers_that_are_trained_are_those_that_are_decoded_and_stored(layout, seed: int):
    spec, rows, columns, bias = layout
    layer = random_layer(spec, rows, columns, bias, seed)
    learnt = {name: value.requires_grad_() for name, value in layer.learnt().items()}
    if not learnt:
        return
    weight_OI = layer.weight_of(learnt)
    assert torch.equal(weight_OI, layer.decode()) and torch.equal(layer.weight_of(learnt, layer.indices()), weight_OI)
    weight_OI.sum().backward()
    assert all(value.grad is not None for value in learnt.values())
    layer.relearn({name: value.detach() for name, value in learnt.items()})  # as laid out, or `refill` says no


@brief
@given(layouts(), st.integers(0, 2**31 - 1))
def test_what_is_saved_is_what_is_counted_and_decoded(layout, seed: int):
    spec, rows, columns, bias = layout
    layer = random_layer(spec, rows, columns, bias, seed)
    state = layer.state_dict()
    assert layer.stored_bits().total == 8 * sum(t.numel() * t.element_size() for n, t in state.items() if n != "bias")
    again = laid_out(layout, "cpu")
    if again.table_key:
        again.attach(layer.shared)
    again.load_state_dict(load(save(state)))
    assert all(torch.equal(bits(b), bits(again.get_buffer(n))) for n, b in layer.named_buffers())
    decoded = layer.decode()
    assert decoded.shape == (rows, columns) and torch.equal(bits(decoded), bits(again.decode()))


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """The bytes of a tensor: random bits decode to NaN where they like, and NaN is not equal to itself."""
    return tensor.contiguous().view(torch.uint8)
