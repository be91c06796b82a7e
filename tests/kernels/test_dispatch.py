"""Which product runs where: an unknown device or format, and a backend that cannot be had, take the reference."""

import torch

from kernels import dispatch
from kernels.dispatch import BACKENDS, backend, kind, linear, reference
from kernels.formats.packed import PackedLinear
from kernels.formats.uniform import UniformLinear
from kernels.synthetic import random_layer

UNIFORM = dict(format="uniform", bits=4, group=64, offset="symmetric")


def test_a_device_without_a_backend_takes_the_reference():
    layer = random_layer(UNIFORM, 32, 64)
    assert backend("meta") is None and kind(layer, "meta") == "decode-per-call"


def test_a_format_that_no_backend_names_is_not_served():
    class Foreign(UniformLinear):
        format = "foreign"

    layer = Foreign(64, 32, False, bits=4, group=64, offset="symmetric").eval()
    layer.fill(**{name: random_layer(UNIFORM, 32, 64).get_buffer(name) for name in ("codes", "scales")})
    x = torch.randn(2, 64)
    assert kind(layer, "cpu") == "decode-per-call" and torch.equal(linear(layer, x), reference(layer, x))


def test_layouts_that_the_kernels_do_not_read_take_the_reference():
    usual = dict(format="codebook", dim=2, index_bits=6, block=16, out_features=32, in_features=64, bias=False)
    for added in (dict(along="columns"), dict(band=8), dict(index_bits=13)):
        assert kind(PackedLinear.from_spec(usual | added, "cpu"), "cpu") == "decode-per-call"


def test_a_backend_that_cannot_be_imported_leaves_the_reference(monkeypatch):
    monkeypatch.setattr(BACKENDS, "_entries", {"cpu": "a_package_that_is_not_there:BACKEND"})
    monkeypatch.setattr(BACKENDS, "_resolved", {})
    dispatch.backend.cache_clear()
    try:
        assert backend("cpu") is None and kind(random_layer(UNIFORM, 32, 64), "cpu") == "decode-per-call"
    finally:
        dispatch.backend.cache_clear()
