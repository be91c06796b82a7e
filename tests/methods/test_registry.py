import dataclasses

import pytest

from methods import METHODS, LayerConfig, LayerSpec, Track, parse_method, split_methods


@pytest.mark.parametrize(
    "text, hint",
    [
        ("gtpq", "did you mean 'gptq'"),
        ("nonsense", "choose from fp16, rtn, nf, hqq, awq, gptq, gptq-ref, gptvq, trellis, reallm"),
        ("gptq:grup=64", "did you mean 'group'"),
        ("gptq:group=many", "group=many is not int or none"),
        ("gptq:act_order=3", "is not true/false"),
        ("gptq:offset=zebra", "not one of symmetric, zero, minimum"),
        ("reallm:data_free", "did you mean 'data-free'"),
        ("reallm:dim=2", "give dim and index_bits together"),
        ("gptq:damp=nan", "must be a positive share"),
        ("reallm:data-free,rounds=0", "rounds must be at least 1"),
        ("rtn:grid=hessian", "needs data"),
        ("reallm:block=0", "block must be at least 1"),
        ("svd:rank=0", "rank must be at least 1"),
        ("svd:bits=3", "bits must be one of 16, 8, 4"),
        ("svd:damp=0.1", "it belongs to svd:whitened"),
        ("bolaco:rank=-4", "rank must be at least 1"),
        ("mpo:chi=0", "chi must be at least 1"),
        ("mpo:bits=4", "bits must be one of 16, 8"),
        ("mpo:sites=1", "sites must be 2 to 6"),
        ("delta-come:ranks=4", "write for example ranks=2\\+32\\+968"),
        ("delta-come:split=even", "split=even is not one of published, searched"),
        ("bitdelta:masks=9", "masks must be 0 to 4"),
        ("mpo:healed,distil_rate=2", "distil_rate must be between 0 and 1"),
    ],
)
def test_a_wrong_method_says_what_to_type(text, hint):
    with pytest.raises(ValueError, match=hint):
        parse_method(text)


def test_overrides_and_variants():
    assert parse_method("gptq:group=64,act_order=false") == dataclasses.replace(
        parse_method("gptq"), group=64, act_order=False
    )
    assert parse_method("reallm:data-free,rank=3").track == Track.DATA_FREE
    assert parse_method("reallm").variant == "calibrated" and parse_method("reallm:rank=3").variant == ""
    assert split_methods("reallm:data-free,rank=3,gptq:group=64,act_order=false,rtn") == [
        "reallm:data-free,rank=3",
        "gptq:group=64,act_order=false",
        "rtn",
    ]


@pytest.mark.parametrize("name", list(METHODS))
def test_every_method_describes_itself(name):
    default = METHODS.get(name)()
    assert default.text == name and default.version >= 1
    for variant, method in default.variants().items():
        assert parse_method(f"{name}:{variant}") == method and method.variant == variant
        assert parse_method(method.text) == method
    found = default.candidates(LayerSpec("a", "a", 192, 576, bias=False))
    assert found and len(set(found)) == len(found)
    for config in found[::7]:
        assert LayerConfig.from_json(config.to_json()) == config


def test_an_option_of_another_variant_says_where_it_belongs():
    with pytest.raises(
        ValueError, match="no option 'epochs': it belongs to reallm:blockwise, reallm:finetuned and reallm:distilled"
    ):
        parse_method("reallm:epochs=1")
    with pytest.raises(ValueError, match="no option 'band': it belongs to reallm:released"):
        parse_method("reallm:data-free,band=64")


def test_the_vector_methods_share_a_base_and_none_inherits_the_other():
    gptvq, reallm = (METHODS.get(name) for name in ("gptvq", "reallm"))
    assert not issubclass(gptvq, reallm) and not issubclass(reallm, gptvq)
    options = {field.name for field in dataclasses.fields(gptvq)}
    assert options == {
        "dim",
        "index_bits",
        "block",
        "scales",
        "scale_bits",
        "act_order",
        "damp",
        "shrink",
        "refit",
        "follow",
    }
