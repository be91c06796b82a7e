"""The quantisers of auto-gptq and of gptqmodel beside ours: the same codes on one Hessian and one grid."""

from importlib.util import find_spec

import pytest
import torch

from kernels.formats.layer import LayerSpec
from methods import gptq_ref, parse_method
from methods.base import LayerData
from methods.gptq_ref import MODULES, reference
from tests.helpers import hessian_of

PACKAGES = [
    pytest.param(name, marks=pytest.mark.skipif(find_spec(module) is None, reason=f"{name} is not installed"))
    for name, module in MODULES.items()
]


@pytest.fixture(scope="module")
def layer():
    return torch.randn(96, 320, generator=torch.Generator().manual_seed(0)), hessian_of(320)


@pytest.fixture
def rounded_scales(monkeypatch, package):
    """Theirs rounds a scale to 16 bits after codes are chosen, ours before: on one grid means one or the other."""
    quantiser = reference(package).Quantizer
    place = quantiser.find_params

    def placed(self, x, weight=False):
        place(self, x, weight)
        self.scale = self.scale.half().float()

    monkeypatch.setattr(quantiser, "find_params", placed)


def packed(text, layer, bits, group, offset):
    weight_OI, hessian_II = layer
    method = parse_method(text)
    spec = LayerSpec("l", "l", *weight_OI.shape, bias=False)
    offered = method.candidates(spec)
    config = next(c for c in offered if (c["bits"], c["group"], c["offset"]) == (bits, group, offset))
    return method.compress(LayerData(weight_OI, hessian_II=hessian_II), spec, config).packed


@pytest.mark.parametrize("package", PACKAGES)
@pytest.mark.parametrize("options", ["", "act_order=true", "act_order=true,static_groups=true"])
@pytest.mark.parametrize("bits, group, offset", [(4, 128, "symmetric"), (3, 128, "zero"), (2, 0, "zero")])
def test_the_same_codes_on_one_hessian_and_one_grid(package, options, bits, group, offset, layer, rounded_scales):
    if "static" in options and not group:
        pytest.skip("a whole row is no group")
    named = ",".join(filter(None, (f"package={package}", options)))
    theirs = packed(f"gptq-ref:{named}", layer, bits, group, offset)
    settings = options or "act_order=false"
    if "static" not in settings:
        settings += ",static_groups=false"
    ours = packed(f"gptq:grid=minmax,damp=0.01,follow=0,shrink=0,{settings}", layer, bits, group, offset)
    assert theirs.spec() == ours.spec()
    if theirs.order is not None:  # which columns a group has, in whatever order
        groups = [[set(part.tolist()) for part in p.order.split(group or 320)] for p in (theirs, ours)]
        assert groups[0] == groups[1]
    same = (theirs.decode() == ours.decode()).float().mean()
    assert same > 0.98, same  # sums in another order: a weight between two levels may take the other
    weight_OI, hessian_II = layer
    lost = [((p.decode() - weight_OI) @ hessian_II * (p.decode() - weight_OI)).sum() for p in (theirs, ours)]
    assert lost[0] == pytest.approx(float(lost[1]), rel=0.01)


@pytest.fixture
def without_packages(monkeypatch):
    """As where none of `there` is installed."""
    there = []
    monkeypatch.setattr(gptq_ref, "find_spec", lambda name: name if name in there else None)
    reference.cache_clear()
    yield there
    reference.cache_clear()


def test_without_the_package_it_says_what_to_type(layer, without_packages):
    for text, install in {
        "gptq-ref": "auto-gptq==0.7.1 --no-deps",
        "gptq-ref:package=gptqmodel": "gptqmodel==7.6.0 optimum",
    }.items():
        with pytest.raises(ValueError, match=f"pip install {install}"):
            packed(text, layer, 4, 32, "symmetric")
    with pytest.raises(ValueError, match="package=gptq is not one of auto-gptq, gptqmodel"):
        parse_method("gptq-ref:package=gptq")


def test_the_package_that_runs_is_the_installed_one_and_in_the_key(without_packages):
    first = parse_method("gptq-ref").identity()
    assert parse_method("gptq-ref").runs == "auto-gptq" and "package" not in first
    without_packages.append("gptqmodel")
    assert parse_method("gptq-ref").runs == "gptqmodel"
    assert parse_method("gptq-ref").identity() == first | {"package": "gptqmodel"}
    without_packages.append("auto_gptq")
    assert parse_method("gptq-ref").identity() == first
