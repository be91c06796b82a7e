"""The compiled CPU kernels against an fp64 product of the decoded weights: every format, ragged shapes, random stored
bytes."""

import ctypes
import warnings

import pytest
import torch

import kernels.cpu
from kernels.cpu import build
from kernels.dispatch import fused, kind, linear, reference, reference_only
from kernels.synthetic import random_layer
from tests.kernels.served import ADDED, SCALAR, TRELLIS, UNIFORM, VECTOR

SHAPES = [(576, 576), (192, 577), (7, 13), (1, 1), (101, 97), (1100, 1024), (45, 4200)]
BATCHES = (1, 2, 3, 5, 9, 33)
EXACT = {"avx512": 6e-5, "avx2": 1e-5}  # integers, and fp32
LIMITS = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 4e-3}  # relative, of the norm


@pytest.fixture(params=["avx512", "avx2"])
def instructions(request, monkeypatch) -> str:
    monkeypatch.delenv("HARNESS_CPU_KERNELS", raising=False)
    try:
        build._compiler()
        widest = build._instructions()
    except RuntimeError as error:
        pytest.skip(str(error))
    if request.param == "avx512" and widest != build.WIDE:
        pytest.skip("no AVX-512 with VBMI here")
    monkeypatch.setenv("HARNESS_CPU_KERNELS", request.param)
    build.library.cache_clear()
    assert build.library() is not None  # a source that does not compile is no reason to skip
    yield request.param
    build.library.cache_clear()


@pytest.mark.parametrize(
    "spec",
    UNIFORM + SCALAR + VECTOR + TRELLIS + ADDED,
    ids=lambda spec: "-".join(str(value) for value in spec.values()),
)
def test_products_are_those_of_the_decoded_weights(spec, instructions):
    for index, (rows, columns) in enumerate(SHAPES):
        if spec.get("rank", 0) >= min(rows, columns):
            continue
        layer = random_layer(spec, rows, columns, bias=bool(index % 2))
        assert kind(layer, "cpu") == "fused" and fused(layer, "cpu") is kernels.cpu.product
        weight_OI = layer.decode().double()
        for batch in BATCHES:
            x = torch.randn(batch, columns, generator=torch.Generator().manual_seed(batch))
            expected = x.double() @ weight_OI.t() + (layer.bias.double() if layer.bias is not None else 0)
            found = linear(layer, x)
            # What is lost is a part of the inputs: it shows against products of this size, of any sign.
            size = weight_OI.norm() * x.double().norm() / columns**0.5
            off = (found.double() - expected).norm().item()
            limit = EXACT[instructions] * size + 2**-23 * expected.norm()  # the last is what rounding the sum takes
            assert found.shape == expected.shape and off <= limit, (
                rows,
                columns,
                batch,
                off / size,
            )
            assert torch.equal(found, linear(layer, x))


@pytest.mark.parametrize("dtype", LIMITS)
def test_activations_of_sixteen_bits(dtype, instructions):
    layer = random_layer(ADDED[2], 130, 320, bias=True)
    for batch in (1, 40):
        x = torch.randn(2, batch, 320).to(dtype)
        expected = x.double() @ layer.decode().double().t() + layer.bias.double()
        found = linear(layer, x)
        assert found.dtype == dtype and found.shape == (2, batch, 130)
        assert (found.double() - expected).norm() <= LIMITS[dtype] * expected.norm()


def test_a_layer_that_was_written_to_is_read_again(instructions):
    layer, x = random_layer(VECTOR[-2], 64, 64, bias=False), torch.randn(1, 64)
    first = linear(layer, x)
    layer.codebook.mul_(2)  # in place
    assert torch.allclose(linear(layer, x), 2 * first, rtol=1e-5)
    layer.refill(codebook=layer.codebook.clone() / 4)
    assert torch.allclose(linear(layer, x), first / 2, rtol=1e-5)
    assert torch.equal(linear(layer.to("cpu"), x), linear(layer, x))


def test_what_is_compressed_does_not_depend_on_the_kernels_of_a_machine(instructions):
    layer, x = random_layer(UNIFORM[0], 64, 64, bias=False), torch.randn(2, 64)
    with reference_only():
        assert fused(layer, "cpu") is None and torch.equal(linear(layer, x), reference(layer, x))
    assert fused(layer, "cpu") is not None


def test_gradients_take_the_reference_path(instructions):
    layer = random_layer(SCALAR[0], 32, 64, bias=False)
    x = torch.randn(3, 64, requires_grad=True)
    linear(layer, x).sum().backward()
    assert torch.allclose(x.grad, layer.decode().sum(dim=0).expand(3, -1), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("reason", ["none", "compiler", "broken"])
def test_without_a_kernel_there_is_one_warning_and_the_reference(reason, monkeypatch, tmp_path):
    if reason == "none":
        monkeypatch.setenv("HARNESS_CPU_KERNELS", "none")
    elif reason == "compiler":
        monkeypatch.setenv("PATH", str(tmp_path))
        monkeypatch.delenv("CXX", raising=False)
    else:
        monkeypatch.setenv("HARNESS_CACHE", str(tmp_path))
        monkeypatch.setattr(build, "SOURCE", tmp_path / "fused.cpp")
        build.SOURCE.write_text("this is no C++")
    build.library.cache_clear()
    layer, x = random_layer(UNIFORM[0], 64, 64, bias=False), torch.randn(2, 64)
    try:
        with pytest.warns(UserWarning, match="no fused CPU kernels"):
            assert kind(layer, "cpu") == "decode-per-call"
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert torch.equal(linear(layer, x), reference(layer, x))
    finally:
        build.library.cache_clear()


def test_the_structure_is_the_one_of_the_source():
    """Fields in the same order and of the same size: every one is eight bytes."""
    from kernels.cpu.view import Layer

    text = build.SOURCE.with_name("layer.h").read_text()
    declared = text[text.index("typedef struct {") : text.index("} Layer;")]
    names = [
        name.strip().lstrip("*")
        for line in declared.splitlines()[1:]
        for name in line.partition("//")[0]
        .strip()
        .rstrip(";")
        .removeprefix("const ")
        .partition(" ")[2]
        .replace(";", ",")
        .split(",")
        if name.strip()
    ]
    cleaned = [name.rpartition(" ")[2].lstrip("*") for name in names]
    assert cleaned == [name for name, _ in Layer._fields_]
    assert ctypes.sizeof(Layer) == 8 * len(Layer._fields_)
