"""The compiled CPU kernels against an fp64 product of the decoded weights: every format, ragged shapes, random stored
bytes."""

import ctypes
import warnings

import pytest
import torch

import kernels.cpu
from kernels.cpu import build
from kernels.cpu.logits import compare
from kernels.cpu.many import Inputs
from kernels.dispatch import fused, kind, linear, prepared, reference, reference_only
from kernels.synthetic import random_layer
from tests.kernels.served import ADDED, SCALAR, TRELLIS, UNIFORM, VECTOR

SHAPES = [(576, 576), (192, 577), (7, 13), (1, 1), (101, 97), (1100, 1024), (45, 4200)]
BATCHES = (1, 2, 3, 5, 9, 33)
EXACT = 6e-5  # of inputs that are made integers
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
            limit = EXACT * size + 2**-23 * expected.norm()  # the last is what rounding the sum takes
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


@pytest.fixture
def matrix_unit(monkeypatch):
    monkeypatch.delenv("HARNESS_CPU_KERNELS", raising=False)
    build.matrix_unit.cache_clear()
    if not build._flags().issuperset(build.TILES):
        pytest.skip("no matrix unit (AMX) here")
    assert build.matrix_unit() is not None  # a source that does not compile is no reason to skip
    yield
    build.matrix_unit.cache_clear()


@pytest.mark.parametrize("bits", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_a_matrix_unit_errs_no_more_than_fp32(bits, matrix_unit):
    """Weights of one, two and three parts; inputs whose sizes span six orders of magnitude."""
    generator = torch.Generator().manual_seed(0)
    for count, rows, columns in ((300, 577, 576), (33, 31, 1536), (65, 64, 40), (1, 1, 1)):
        x_NI = torch.randn(count, columns, generator=generator) * 10 ** (
            6 * torch.rand(columns, generator=generator) - 3
        )
        weight_OI = torch.randn(rows, columns, generator=generator).to(bits).float()
        exact = x_NI.double() @ weight_OI.double().t()
        found = torch.empty(count, rows + 5)[:, 2:-3]  # some columns of a wider matrix
        Inputs(x_NI).times(weight_OI, found)
        torchs = torch.nn.functional.linear(x_NI, weight_OI)
        off, theirs = ((y.double() - exact).norm() / exact.norm() for y in (found, torchs))
        assert off < max(theirs, 1e-7) and off < 4e-7


def test_a_product_is_the_same_for_any_number_of_inputs_and_threads(matrix_unit):
    x_NI, weight_OI = torch.randn(97, 200), torch.randn(70, 200)
    whole, threads = torch.empty(97, 70), torch.get_num_threads()
    Inputs(x_NI).times(weight_OI, whole)
    try:
        for count in (1, 40, 97):
            torch.set_num_threads(2)
            part = torch.empty(count, 70)
            Inputs(x_NI[:count]).times(weight_OI, part)
            assert torch.equal(part, whole[:count])
    finally:
        torch.set_num_threads(threads)


def test_a_weight_that_is_packed_once_gives_the_same_as_one_that_is_packed_for_every_product(matrix_unit):
    for weight_OI in (torch.randn(2000, 600), torch.randn(2000, 600).bfloat16().float()):
        once, every = (prepared(weight_OI, copied) for copied in (True, False))
        x = torch.randn(3, 50, 600)
        assert torch.equal(once(x), every(x)) and torch.equal(once(2 * x), 2 * every(x))
        assert torch.allclose(once(x), x @ weight_OI.t(), atol=1e-3) and once(x).shape == (3, 50, 2000)
    with reference_only():
        assert torch.equal(prepared(weight_OI, True)(x), torch.nn.functional.linear(x, weight_OI))


def test_a_number_that_is_not_finite_stays_one(matrix_unit):
    for broken in (torch.nan, torch.inf, -torch.inf):
        x_NI, weight_OI = torch.ones(40, 64), torch.ones(3, 64)
        x_NI[7, 9] = broken
        found = torch.empty(40, 3)
        Inputs(x_NI).times(weight_OI, found)
        assert not found[7].isfinite().any() and found.isfinite().sum() == 39 * 3


def test_without_a_matrix_unit_torch_multiplies(monkeypatch):
    monkeypatch.setenv("HARNESS_CPU_KERNELS", "avx2")
    build.matrix_unit.cache_clear()
    try:
        x_NI, weight_OI, found = torch.randn(200, 64), torch.randn(9, 64), torch.empty(200, 9)
        Inputs(x_NI).times(weight_OI, found)
        assert torch.equal(found, x_NI @ weight_OI.t())
        assert torch.equal(prepared(weight_OI, True)(x_NI), torch.nn.functional.linear(x_NI, weight_OI))
    finally:
        build.matrix_unit.cache_clear()


def test_what_is_asked_of_logits_is_the_textbook_sum(instructions):
    generator = torch.Generator().manual_seed(0)
    for vocabulary in (1, 5, 1030, 49152):
        reference_NV = 4 * torch.randn(9, vocabulary, generator=generator) + 50
        model_NV = reference_NV + torch.randn(9, vocabulary, generator=generator)
        log_p_NV, log_q_NV = (logits.double().log_softmax(-1) for logits in (reference_NV, model_NV))
        found = compare(model_NV, reference_NV)
        for values_N, expected_N in (
            (found.lse_N, model_NV.double().logsumexp(-1)),
            (found.kld_N, (log_p_NV.exp() * (log_p_NV - log_q_NV)).sum(-1)),
            (found.reverse_N, (log_q_NV.exp() * (log_q_NV - log_p_NV)).sum(-1)),
        ):
            assert torch.allclose(values_N, expected_N, rtol=1e-6, atol=1e-6)
        assert torch.equal(found.first_N, model_NV.argmax(-1)) and torch.equal(
            found.highest_N, model_NV.amax(-1).double()
        )
        assert torch.equal(compare(model_NV, None).lse_N, found.lse_N)
    model_NV[3, 5] = torch.inf
    assert compare(model_NV, None) is None and compare(reference_NV, model_NV) is None
