"""The native runner against transformers' own forward, on tiny random models of every family it knows."""

import pytest
import torch
from transformers import AutoConfig

from harness.measure.end_to_end import borrowed_bytes, random_model, uncompressed
from harness.measure.runner import Runner, bytes_per_token, decode_gap, resident_bytes, timed_model
from harness.model import inventory, skeleton
from kernels.cpu import available
from kernels.formats.layer import LayerConfig

pytestmark = pytest.mark.skipif(not available(), reason="no compiler, or not a CPU that the kernels are written for")

SHAPES = dict(
    hidden_size=96,
    intermediate_size=160,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=32,
    vocab_size=130,
    max_position_embeddings=128,
)
FAMILIES = {
    "llama": {},
    "llama, untied": dict(tie_word_embeddings=False, attention_bias=True, mlp_bias=True),
    "mistral": dict(sliding_window=None),
    "qwen2": {},
    "qwen3": {},
    "gemma3_text": dict(sliding_window=128, layer_types=["sliding_attention", "full_attention"]),
}
PACKED = {
    "dense": None,
    "uniform": LayerConfig.of("uniform", bits=3, group=32, offset="zero"),
    "permuted": LayerConfig.of("uniform", bits=4, group=0, offset="symmetric", permuted=True),
    "scaled": LayerConfig.of("uniform", bits=4, group=64, offset="zero", column_scales=True),
    "shared": LayerConfig.of("codebook", dim=4, index_bits=9, block=0, table="plain", share="all", rank=3),
}


def tiny(family: str, packed: str = "uniform", held: int | None = None, **more):
    config = AutoConfig.for_model(family.partition(",")[0], **{**SHAPES, **FAMILIES.get(family, {}), **more})
    layers = {layer.name: PACKED[packed] or uncompressed(config) for layer in inventory(skeleton(config)).layers}
    return random_model(config, layers, "cpu", torch.float32, held)


@pytest.mark.parametrize("family", FAMILIES)
def test_tokens_are_those_of_transformers(family):
    model = timed_model(tiny(family))
    prompts = torch.randint(130, (2, 20), generator=torch.Generator().manual_seed(0))
    native, plain = Runner(model, prompts), Runner(model, prompts, native=False)
    assert (native.name, plain.name) == ("native", "transformers"), native.reason
    for _ in range(40):
        plain.ids_B1.copy_(native.ids_B1)
        native.step()
        plain.step()
        assert (native.logits_BV - plain.logits_BV).norm() <= 1e-3 * plain.logits_BV.norm()
        assert torch.equal(native.ids_B1, native.logits_BV.argmax(dim=-1, keepdim=True))


@pytest.mark.parametrize("packed", PACKED)
def test_every_form_is_decoded_natively_and_loses_nothing(packed):
    model = timed_model(tiny("llama", packed))
    assert Runner(model, torch.tensor([[1, 2]])).name == "native"
    windows = torch.randint(130, (2, 24), generator=torch.Generator().manual_seed(1))
    assert abs(decode_gap(model, windows)) < 1e-3


def test_an_uncompressed_model_takes_its_checkpoint():
    loaded = tiny("llama", "dense", hidden_size=256, intermediate_size=512, vocab_size=2048)
    stored = 2 * (loaded.inventory.weights + loaded.inventory.rest_weights)
    assert stored <= resident_bytes(timed_model(loaded)) <= 1.03 * stored


@pytest.mark.parametrize("packed", PACKED)
def test_blocks_that_read_the_bits_of_others_take_what_their_own_would(packed):
    whole, short = (tiny("llama, untied", packed, held, num_hidden_layers=5) for held in (None, 2))
    assert short.ledger() == whole.ledger()
    assert bytes_per_token(short) == bytes_per_token(whole)
    first, third = (short.packed[f"model.layers.{index}.mlp.up_proj"] for index in (0, 2))
    assert all(first.get_buffer(name) is third.get_buffer(name) for name in first.stored_parts())
    of_both = [timed_model(loaded) for loaded in (short, whole)]
    borrowed = borrowed_bytes(short)
    assert borrowed_bytes(whole) == 0 < borrowed and resident_bytes(of_both[0]) + borrowed == pytest.approx(
        resident_bytes(of_both[1]), rel=0.05
    )
    runner, plain = (Runner(of_both[0], torch.tensor([[1, 2, 3]]), native=native) for native in (True, False))
    assert runner.name == "native"
    for _ in range(3):
        plain.ids_B1.copy_(runner.ids_B1)
        runner.step()
        plain.step()
        assert (runner.logits_BV - plain.logits_BV).norm() <= 1e-3 * plain.logits_BV.norm()


@pytest.mark.parametrize(
    "family, more, reason",
    [
        ("gpt_neox", dict(head_dim=None), "models of type gpt_neox are run by transformers"),
        ("llama", dict(hidden_act="relu"), "the activation relu"),
        ("llama", dict(head_dim=24), "heads of 24"),
        ("mistral", dict(sliding_window=64), "a sliding window"),
    ],
)
def test_what_is_not_decoded_natively_says_why(family, more, reason):
    model = timed_model(tiny(family, "dense", **more))
    runner = Runner(model, torch.randint(130, (1, 30)))
    assert runner.name == "transformers" and reason in runner.reason
    runner.step()
