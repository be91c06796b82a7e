import dataclasses

import pytest

from kernels.formats.layer import LayerConfig, LayerSpec
from methods import REGISTRY, method_class, parse_method, split_methods


@pytest.mark.parametrize(
    "text, hint",
    [
        ("gtpq", "did you mean 'gptq'"),
        ("nonsense", "choose from fp16, rtn, nf, gptq, gptvq, reallm"),
        ("gptq:grup=64", "did you mean 'group'"),
        ("gptq:group=many", "group=many is not int or none"),
        ("gptq:act_order=3", "is not true/false"),
        ("gptq:offset=zebra", "not one of symmetric, zero, minimum"),
        ("reallm:data_free", "did you mean 'data-free'"),
        ("reallm:dim=2", "give dim and index_bits together"),
        ("gptq:damp=nan", "must be a positive share"),
        ("reallm:rounds=0", "rounds must be at least 1"),
        ("rtn:grid=hessian", "needs data"),
        ("reallm:block=0", "block must be at least 1"),
    ],
)
def test_a_wrong_method_says_what_to_type(text, hint):
    with pytest.raises(ValueError, match=hint):
        parse_method(text)


def test_overrides_and_variants():
    assert parse_method("gptq:group=64,act_order=false") == dataclasses.replace(
        parse_method("gptq"), group=64, act_order=False
    )
    assert parse_method("reallm:data-free,rank=3").calibrated is False
    assert parse_method("reallm").variant == "calibrated" and parse_method("reallm:rank=3").variant == ""
    assert split_methods("reallm:data-free,rank=3,gptq:group=64,act_order=false,rtn") == [
        "reallm:data-free,rank=3",
        "gptq:group=64,act_order=false",
        "rtn",
    ]


@pytest.mark.parametrize("name", REGISTRY)
def test_every_method_describes_itself(name):
    method = method_class(name)()
    data = method.to_json()
    assert data["method"] == name and data["version"] >= 1
    again = method_class(name)(**{k: v for k, v in data.items() if k not in ("method", "version")})
    assert again == method
    found = method.candidates(LayerSpec("a", "a", 192, 576, bias=False))
    assert found and len(set(found)) == len(found)
    for config in found[::7]:
        assert LayerConfig.from_json(config.to_json()) == config
