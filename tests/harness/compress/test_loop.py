"""The block loop and the checkpoint, on the first blocks of the real model and on other architectures."""

from fractions import Fraction
from functools import cache

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from harness.compress.block import BlockRun
from harness.compress.forward import BlockInputs
from harness.compress.loop import compress_model
from harness.compress.states import States
from harness.compressed import CompressedModel
from harness.ledger import payload_bytes, planned
from harness.model import decoder_blocks, half_dtype, inventory, load_reference, read_config, skeleton
from harness.plan.allocation import BudgetError, uniform
from harness.plan.budgets import parse_budget
from kernels.cpu.build import library
from kernels.formats.packed import PackedLinear
from methods import parse_method
from methods.base import Compressed, LayerData

METHODS = ["fp16", "rtn", "rtn:offset=zero", "gptq", "gptq:static_groups=false", "gptvq", "reallm:data-free,rounds=2"]
RESUMED = ["gptq", "reallm:window=8"]  # behind two finished blocks: they need a third


@pytest.fixture(scope="module")
def tokens(short_tokenizer) -> torch.Tensor:
    from harness.data.protocols import parse_calibration
    from harness.data.windows import calibration_windows

    return calibration_windows(parse_calibration("c4-mini@128x4"), short_tokenizer, seed=0).tokens_NT


def compress(folder, method, tokens, path, budget=Fraction(13, 4), seed=0):
    model = load_reference(path, "cpu", torch.float32)
    parsed = parse_method(method)
    allocation = uniform(parsed, inventory(model), budget)
    return compress_model(model, inventory(model), parsed, allocation.layers, tokens, seed, folder / "blocks")[
        0
    ], allocation


@pytest.fixture(scope="module")
def whole(truncated, two_blocks, tokens, tmp_path_factory):
    """Method -> (compressed model, allocation, folder), once for all that only read them."""

    @cache
    def compressed_by(method):
        folder = tmp_path_factory.mktemp("whole")
        model = truncated if method in RESUMED else two_blocks
        return *compress(folder, method, tokens, model.path), folder

    return compressed_by


@pytest.mark.parametrize("method", METHODS)
def test_the_ledger_is_the_bytes_on_disk_and_the_reload_is_the_model(method, whole, tokens, tmp_path):
    compressed, allocation, _ = whole(method)
    compressed.save(tmp_path / "artifact")
    ledger = compressed.ledger()
    assert (
        8 * payload_bytes(tmp_path / "artifact" / "packed.safetensors")
        == ledger.stored_bits
        == allocation.ledger.stored_bits
    )
    assert method == "fp16" or ledger.fits(Fraction(13, 4))
    reloaded = CompressedModel.load(tmp_path / "artifact", "cpu", torch.float32)
    assert reloaded.ledger() == ledger and reloaded.kind == (
        "dense" if method == "fp16" else "fused" if library() else "decode-per-call"
    )
    compressed.model.to(torch.float32)
    with torch.no_grad():
        for name, layer in compressed.packed.items():
            assert torch.equal(layer.decode(), reloaded.packed[name].decode())
        assert torch.equal(compressed.model(tokens[:2, :64]).logits, reloaded.model(tokens[:2, :64]).logits)


@pytest.mark.parametrize("method", RESUMED)
def test_a_resumed_compression_stores_the_same_bytes(method, whole, truncated, tokens, tmp_path):
    expected, _, folder = whole(method)
    blocks = tmp_path / "part" / "blocks"
    blocks.mkdir(parents=True)
    for index in (0, 1):
        name = f"block_{index:04d}.safetensors"
        (blocks / name).write_bytes((folder / "blocks" / name).read_bytes())
    part, _ = compress(tmp_path / "part", method, tokens, truncated.path)
    for name, tensor in expected.model.state_dict().items():
        assert torch.equal(tensor, part.model.state_dict()[name]), name


def test_true_sequential_inputs_are_those_of_the_packed_prefix(truncated, tokens):
    """Hessians from paused passes equal those of fresh hooks on the block as it stands."""
    model = load_reference(truncated.path, "cpu", torch.float32)
    stock = inventory(model)
    inputs = BlockInputs(model, tokens)
    rtn = parse_method("rtn")
    plan = uniform(rtn, stock, Fraction(13, 4)).layers
    with BlockRun(model, stock.blocks[0], inputs.block(0), inputs.hidden) as block:
        assert [[n.rpartition(".")[2] for n in stage] for stage in block.stages()] == [
            ["q_proj", "k_proj", "v_proj"],
            ["o_proj"],
            ["gate_proj", "up_proj"],
            ["down_proj"],
        ]
        for stage in block.stages():
            got = block.hessian(stage[0])
            seen = []
            slot = model.get_submodule(stage[0])
            hook = slot.layer.register_forward_pre_hook(lambda m, a, seen=seen: seen.append(a[0]))
            with torch.no_grad():
                block._forward(inputs.hidden.whole())
            hook.remove()
            x = seen[0].reshape(-1, got.shape[0])
            assert torch.allclose(got, x.T @ x, rtol=1e-4, atol=1e-4 * got.diagonal().max())
            for name in stage:
                block.install(name, rtn.compress(LayerData(block.weight(name)), block.layers[name], plan[name]))
        behind = torch.cat([*block.outputs()])
    with torch.no_grad():
        assert torch.equal(behind, block._forward(inputs.hidden.whole()))
    assert isinstance(model.get_submodule(stage[0]), PackedLinear)


def test_a_method_that_looks_again_gets_a_fresh_pass(truncated, tokens):
    """Asking for an earlier stage, or replacing a layer the pass has gone through, restarts it."""
    model = load_reference(truncated.path, "cpu", torch.float32)
    stock = inventory(model)
    inputs = BlockInputs(model, tokens)
    with BlockRun(model, stock.blocks[0], inputs.block(0), inputs.hidden) as block:
        q, down = block.stages()[0][0], block.stages()[3][0]
        first = block.hessian(q)
        before = block.hessian(down)
        assert torch.equal(block.hessian(q), first)
        block.hessian(down)
        config = parse_method("rtn:bits=2,group=64,offset=symmetric").candidates(block.layers[q])[0]
        block.install(
            q, Compressed(parse_method("rtn").compress(LayerData(block.weight(q)), block.layers[q], config).packed)
        )
        assert not torch.allclose(block.hessian(down), before)


@torch.no_grad()
def test_passes_that_take_turns_see_what_passes_that_stand_together_see(truncated, tokens, monkeypatch, tmp_path):
    """Batches of one window, held in a file and run anew for every stage, give the same bits."""
    monkeypatch.setattr("harness.compress.block.BATCH_TOKENS", tokens.shape[1])
    rtn, found = parse_method("rtn"), []
    for most, spill in ((2**40, None), (0, tmp_path)):
        monkeypatch.setattr("harness.compress.block.PASSES_BYTES", most)
        model = load_reference(truncated.path, "cpu", torch.float32)
        stock, inputs = inventory(model), BlockInputs(model, tokens, spill)
        hidden, original, seen = inputs.hidden, States.of(0.9 * inputs.hidden.whole()), []
        with BlockRun(model, stock.blocks[0], inputs.block(0), hidden, original) as block:
            for stage in block.stages():
                seen += [block.hessian(stage[0]), block.drift(stage[0]), block.pooled(stage[0]).covariance_II]
                assert len(block._passes) == (len(tokens) if most else 0)
                for name in stage:
                    layer = block.layers[name]
                    block.install(name, rtn.compress(LayerData(block.weight(name)), layer, rtn.candidates(layer)[0]))
            original.replace(block.original_outputs())
            hidden.replace(block.outputs())
        found.append([*seen, hidden.whole(), original.whole()])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_an_error_inside_a_block_reaches_the_caller(truncated, tokens):
    model = load_reference(truncated.path, "cpu", torch.float32)
    stock = inventory(model)
    inputs = BlockInputs(model, tokens)
    module = decoder_blocks(model)[1][0]
    with (
        pytest.raises(RuntimeError, match="broken"),
        BlockRun(model, stock.blocks[0], inputs.block(0), inputs.hidden) as block,
    ):

        def broken(*_):
            raise RuntimeError("broken")

        module.mlp.act_fn.forward = broken
        block.hessian(block.stages()[3][0])


TINY = dict(
    vocab_size=512,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
)


@pytest.mark.parametrize(
    "method, bits",
    [
        ("gptq:bits=4,group=128,offset=zero", 4.156),
        ("gptq:bits=3,group=128,offset=zero", 3.148),
        ("rtn:bits=4,group=0,offset=zero", 4.004),
        ("reallm:released", 2.775),
        ("reallm:released,index_bits=6", 3.776),
        ("reallm:released,order_bits=none,adapter_bits=8", 2.522),
    ],
)
def test_published_sizes_of_llama2_7b(method, bits):
    stock = inventory(skeleton(read_config("llama2-7b")))
    assert stock.weights == 6_476_005_376
    assert uniform(parse_method(method), stock, Fraction(5)).ledger.stored_bpw == pytest.approx(bits, abs=1e-3)


def test_budgets_are_exact():
    stock = inventory(skeleton(read_config("smollm2-135m")))
    method = parse_method("gptq")
    allocation = uniform(method, stock, Fraction(13, 4))
    assert allocation.ledger.stored_bits * 4 == 13 * stock.weights  # 3.25 to the bit
    smaller = uniform(method, stock, Fraction(13, 4) - Fraction(1, stock.weights))
    assert smaller.ledger.stored_bits < allocation.ledger.stored_bits
    least = min(
        planned({x.name: c for x in stock.layers}, stock.layers, 0, stock.weights).stored_bits
        for c in method.candidates(stock.layers[0])
    )
    assert uniform(method, stock, Fraction(least, stock.weights)).ledger.stored_bits == least
    with pytest.raises(BudgetError, match=f"{least / stock.weights:.4f}"):
        uniform(method, stock, Fraction(least - 1, stock.weights))


@pytest.mark.parametrize("text", ["three", "", "0", "-1", "17", "nan", "1/0"])
def test_a_wrong_budget_is_refused(text):
    with pytest.raises(ValueError, match="bits per weight"):
        parse_budget(text)


def test_the_rest_keeps_the_checkpoints_own_sixteen_bits(tmp_path):
    """A bf16 checkpoint computed in fp32 keeps bf16 norms: 1e5 is beyond fp16."""
    config = AutoConfig.for_model("qwen2", **TINY)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    with torch.no_grad():
        model.model.norm.weight[0] = 1e5
    model.save_pretrained(tmp_path / "model")
    half = half_dtype(read_config(tmp_path / "model"))
    assert half == "bfloat16"
    loaded = load_reference(tmp_path / "model", "cpu", torch.float32)
    plan = uniform(parse_method("rtn"), inventory(loaded), Fraction(6)).layers
    tokens = torch.randint(0, 512, (1, 8))
    compressed, _ = compress_model(
        loaded, inventory(loaded), parse_method("rtn"), plan, tokens, 0, tmp_path / "blocks", half
    )
    compressed.save(tmp_path / "artifact")
    reloaded = CompressedModel.load(tmp_path / "artifact", "cpu", torch.float32)
    assert reloaded.model.model.norm.weight[0] == model.model.norm.weight[0].float()


def test_incomplete_or_broken_weights_are_refused(truncated, tokens, tmp_path):
    config = AutoConfig.for_model("llama", **TINY)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "two")
    config.num_hidden_layers = 3
    config.save_pretrained(tmp_path / "two")
    with pytest.raises(ValueError, match="incomplete"):
        load_reference(tmp_path / "two", "cpu", torch.float32)
    model = load_reference(truncated.path, "cpu", torch.float32)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 3] = torch.nan
    plan = uniform(parse_method("rtn"), inventory(model), Fraction(13, 4)).layers
    with pytest.raises(ValueError, match="layers.1.mlp.up_proj holds weights that are not finite"):
        compress_model(model, inventory(model), parse_method("rtn"), plan, tokens, 0, tmp_path / "blocks")
