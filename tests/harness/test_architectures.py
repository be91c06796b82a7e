"""Every family of models goes the whole way, tiny and of random weights: measured, allocated, packed, saved, read back,
scored against the reference, and asked questions."""

from __future__ import annotations

import copy
from collections import Counter
from contextlib import contextmanager
from fractions import Fraction
from functools import cache, partial

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from harness.cli import main
from harness.compress.block import BlockRun
from harness.compress.distil import remember_states
from harness.compress.forward import BlockInputs, stubbed_blocks
from harness.compress.loop import compress_model
from harness.compress.states import States
from harness.compress.training import finetune
from harness.compressed import CompressedModel
from harness.evaluate.branches import Text, follows_branches, log_likelihoods, longest_tree, plant
from harness.evaluate.score import noise_floor, score
from harness.ledger import underspent
from harness.measure.native import token_decoder
from harness.model import inventory, load_reference, read_config, skeleton
from harness.model.head import head_of, hidden_states
from harness.plan.allocation import BudgetError, mixed, require_mixable, uniform
from harness.plan.costs import expected_costs
from harness.plan.sensitivity import measure_fisher, measure_sensitivities, random_tokens
from methods import Method, parse_method

VOCABULARY, POSITIONS = 256, 64
TINY = dict(
    vocab_size=VOCABULARY,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=4,
    max_position_embeddings=POSITIONS,
)
GROUPED = TINY | dict(num_key_value_heads=2, head_dim=16)
WINDOWED = dict(sliding_window=16, layer_types=["sliding_attention", "full_attention"])
FEW = dict(vocab_size=VOCABULARY, hidden_size=64, num_hidden_layers=2, num_attention_heads=4)
FAMILIES = {
    "llama": ("llama", GROUPED),
    "mistral": ("mistral", GROUPED | dict(sliding_window=16)),
    "qwen2": ("qwen2", GROUPED),
    "qwen3": ("qwen3", GROUPED),
    "gemma2": ("gemma2", GROUPED | WINDOWED),
    "gemma3": ("gemma3_text", GROUPED | WINDOWED),
    "phi3": ("phi3", GROUPED | dict(pad_token_id=0)),
    "opt": ("opt", TINY | dict(ffn_dim=96, word_embed_proj_dim=32)),
    "gpt-neox": ("gpt_neox", TINY),
    "falcon-old": ("falcon", FEW | dict(alibi=True, parallel_attn=False, bias=True, new_decoder_architecture=False)),
    "falcon-new": ("falcon", FEW | dict(new_decoder_architecture=True, num_kv_heads=2)),
    "bloom": ("bloom", FEW),
    "mpt": ("mpt", dict(vocab_size=VOCABULARY, d_model=64, n_layers=2, n_heads=4, max_seq_len=POSITIONS)),
    "gpt2": ("gpt2", dict(vocab_size=VOCABULARY, n_embd=64, n_layer=2, n_head=4, n_positions=POSITIONS)),
    "starcoder2": ("starcoder2", GROUPED),
    "mixtral": ("mixtral", GROUPED | dict(num_local_experts=4, num_experts_per_tok=2)),
    "qwen3-moe": ("qwen3_moe", GROUPED | dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32)),
    "gpt-oss": ("gpt_oss", GROUPED | WINDOWED | dict(num_local_experts=4, num_experts_per_tok=2)),
}
METHODS = ["rtn", "nf", "gptq", "gptvq", "reallm", "reallm:data-free,rounds=1", "qlora"]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    @cache
    def make(family):
        """(transformers' own model, its folder, windows [5, POSITIONS], what errors cost)."""
        torch.manual_seed(0)
        name, values = FAMILIES[family]
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(name, **values), dtype=torch.float32).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                # Large enough to matter, and never what they were made as: no bias is left zero, no norm flat.
                parameter.add_(torch.randn_like(parameter), alpha=0.15)
        folder = tmp_path_factory.mktemp(family)
        model.save_pretrained(folder / "model")
        return model, folder, torch.randint(VOCABULARY, (5, POSITIONS))

    return make


def loaded(folder) -> PreTrainedModel:
    return load_reference(folder / "model", "cpu", torch.float32)


def close(found, expected, tolerance=2e-5):
    return float((found - expected).abs().max()) <= tolerance * float(expected.abs().max())


@contextmanager
def watched_inputs(model, stock):
    """The inputs [N, I] of every layer by name, of the pass inside."""
    seen = {}

    def note(name, module, args, out):
        seen[name] = args[0].reshape(-1, args[0].shape[-1])

    layers = [layer.name for layer in stock.layers]
    handles = [model.get_submodule(name).register_forward_hook(partial(note, name)) for name in layers]
    yield seen
    for handle in handles:
        handle.remove()


@contextmanager
def replayed(model, hidden, returns_tuple):
    """Whatever the blocks are given, these states come out of the last one."""
    with stubbed_blocks(model, returns_tuple) as stubs:
        stubs[-1].replay = hidden
        yield


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_block_by_block_is_the_models_own_forward(family, made):
    """The chained blocks, norm and head give the logits of transformers' untouched model, and layers see the inputs
    they see there."""
    plain, folder, tokens = made(family)
    model = loaded(folder)
    stock, inputs = inventory(model), BlockInputs(model, tokens)
    with watched_inputs(model, stock) as seen:
        whole = model(tokens, use_cache=False).logits
    expected = plain(tokens, use_cache=False).logits
    assert close(whole, expected)
    hidden = inputs.hidden
    for index, block in enumerate(stock.blocks):
        with BlockRun(model, block, inputs.block(index), hidden) as run:
            assert sorted(name for stage in run.stages() for name in stage) == sorted(x.name for x in block.layers)
            for stage in run.stages():
                x = seen[stage[0]]
                assert close(run.hessian(stage[0]), x.T @ x, 1e-4), stage
            after = torch.cat([*run.outputs()])
        assert close(inputs.block(index)(hidden.read(0, 3)), after[:3])  # of another number of windows
        hidden = States.of(after)
    with replayed(model, hidden.whole(), inputs.returns_tuple):
        states = hidden_states(model, tokens, POSITIONS)
    head = head_of(model)
    assert close(head(states).view(5, POSITIONS - 1, -1), expected[:, :-1])


@pytest.fixture(scope="module")
def prepared(made):
    @cache
    def prepare(family):
        plain, folder, tokens = made(family)
        model = loaded(folder)
        states = folder / "states.safetensors"
        measured = {True: measure_sensitivities(model, tokens, 0)}
        assert measured[True].keys() == {layer.name for layer in inventory(model).layers}
        noise = random_tokens(VOCABULARY, POSITIONS)
        measured[False] = {n: s.flat for n, s in measure_sensitivities(model, noise, 0, feedback=False).items()}
        score(model, tokens, keep=states)
        return model, folder, tokens, measured, states

    return prepare


@pytest.mark.parametrize("text", METHODS)
@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "gpt-oss"])  # as the two in front of it
def test_every_family_goes_the_whole_way_with_every_method(family, text, prepared, tmp_path, monkeypatch):
    monkeypatch.setattr(Method, "reach", 0.75)  # bits: a third of the estimates
    original, _, tokens, measured, states = prepared(family)
    model = copy.deepcopy(original)
    stock, method, budget = inventory(model), parse_method(text), Fraction(17, 4)
    costs = expected_costs(method, model, stock, budget, measured[method.needs.text], 0)
    plan = mixed(stock, budget, costs)
    compressed, _ = compress_model(model, stock, method, plan.layers, tokens, 0, tmp_path / "blocks")
    if method.adaptation:
        remember_states(original, tokens, tmp_path)
        with torch.no_grad():
            log_q, log_p = (m(tokens).logits[:, :-1].log_softmax(-1) for m in (compressed.model, original))
        # One step of all windows, so that its loss is the divergence of what was packed.
        report = finetune(compressed, method.adaptation, tokens, len(tokens), 0, tmp_path, states=tmp_path)
        expected = (log_p.exp() * (log_p - log_q)).sum(-1).mean().item()
        assert report.losses[0] == pytest.approx(expected, rel=1e-3)
    compressed.save(tmp_path / "saved")
    reloaded = CompressedModel.load(tmp_path / "saved", "cpu", torch.float32)
    assert set(reloaded.packed) == {layer.name for layer in stock.layers}
    assert reloaded.ledger() == plan.ledger and plan.ledger.fits(budget) and plan.bound <= plan.predicted * (1 + 1e-9)
    assert not underspent(plan.ledger.stored_bits, stock.weights, budget - Fraction(1, 5))
    assert len(set(plan.layers.values())) > 1  # mixed
    with torch.inference_mode():
        assert torch.equal(compressed.model(tokens).logits, reloaded.model(tokens).logits)
    divergence = score(reloaded.model, tokens, reference=states).divergence
    assert divergence.nonfinite_tokens == 0 and 0 < divergence.kld < 1.5, divergence


@pytest.mark.parametrize("family", FAMILIES)
def test_the_reference_has_a_noise_floor_and_questions_are_trees(family, prepared):
    model, _, tokens, _, states = prepared(family)
    floor = noise_floor(model, tokens, states)
    assert 1e-10 < floor.kld < 1e-2, floor
    assert set(measure_fisher(model, tokens[:2])) == {layer.name for layer in inventory(model).layers}
    trunk, *branches = (tuple(part.tolist()) for part in tokens[0, :32].split(8))
    texts = [Text((*trunk, *branch), len(branch)) for branch in branches]
    longest = longest_tree(model) or POSITIONS
    together = follows_branches(model) and all(len(text.tokens) <= longest for text in texts)
    trees = [plant(texts)] if together else [plant([text]) for text in texts]
    found = [scored for tree in log_likelihoods(model, trees) for scored in tree]
    for text, (value, _) in zip(texts, found, strict=True):
        with torch.no_grad():
            log_p = model(torch.tensor([text.tokens])).logits[0, :-1].log_softmax(-1)[-text.count :]
        expected = log_p.gather(1, torch.tensor(text.tokens[-text.count :])[:, None]).sum().item()
        assert value == pytest.approx(expected, abs=1e-3)


def test_transposed_weights_are_linear_layers(made):
    """GPT-2 keeps [in, out]; what is packed, and counted, is [out, in]."""
    plain, folder, _ = made("gpt2")
    model = loaded(folder)
    stock = inventory(model)
    assert not stock.uncovered
    assert [(layer.role, layer.out_features, layer.in_features, layer.bias) for layer in stock.blocks[0].layers] == [
        ("attn.c_attn", 192, 64, True),
        ("attn.c_proj", 64, 64, True),
        ("mlp.c_fc", 256, 64, True),
        ("mlp.c_proj", 64, 256, True),
    ]
    for layer in stock.layers:
        assert torch.equal(model.get_parameter(f"{layer.name}.weight"), plain.get_parameter(f"{layer.name}.weight").T)
    assert inventory(skeleton(read_config(folder / "model"))) == stock


@pytest.mark.parametrize("family, experts, inner", [("mixtral", 4, 96), ("qwen3-moe", 4, 32), ("gpt-oss", 4, 96)])
def test_experts_are_packed_one_by_one_and_only_routers_count_at_sixteen_bits(family, experts, inner, made):
    plain, folder, tokens = made(family)
    stock = inventory(skeleton(read_config(folder / "model")))
    shapes = Counter((x.role, x.out_features, x.in_features) for x in stock.layers if ".experts." in x.role)
    assert shapes == {
        ("mlp.experts.gate_up_proj", 2 * inner, 64): 2 * experts,
        ("mlp.experts.down_proj", 64, inner): 2 * experts,
    }
    kept = {name.replace("model.layers.", "") for name in stock.uncovered}
    assert kept == {f"{index}.mlp.{'router' if family == 'gpt-oss' else 'gate'}.weight" for index in (0, 1)}
    inside = [p for name, p in plain.named_parameters() if ".layers." in name and name.endswith(("weight", "proj"))]
    assert stock.weights == sum(p.numel() for p in inside if p.ndim > 1)
    assert "router" in stock.uncovered_note or "mlp.gate.weight" in stock.uncovered_note
    inputs = BlockInputs(loaded(folder), tokens)
    original = States.of(0.9 * inputs.hidden.whole())
    with BlockRun(inputs.model, stock.blocks[0], inputs.block(0), inputs.hidden, original) as block:
        for layer in stock.blocks[0].layers:  # what a router sends elsewhere has no drift
            assert bool(block.drift(layer.name).any()) != (".experts." in layer.name), layer.name


def test_experts_that_are_no_linear_layers_count_at_sixteen_bits_and_are_named():
    config = AutoConfig.for_model("jetmoe", **GROUPED, kv_channels=16, num_local_experts=4, num_experts_per_tok=2)
    stock = inventory(skeleton(config))
    assert stock.uncovered_bits == 16 * sum(stock.uncovered.values()) > 12 * stock.weights
    for refuse in (uniform, require_mixable):
        with pytest.raises(BudgetError, match="at least .* 16 bits .*self_attention.experts.input_linear.weight"):
            refuse(parse_method("gptq"), stock, Fraction(4))


def saved_config(folder, model_type, **values):
    """A folder that looks like a model of this type."""
    AutoConfig.for_model(model_type, **values).save_pretrained(folder)
    save_file({"nothing": torch.zeros(1)}, folder / "model.safetensors")
    return folder


@pytest.mark.parametrize(
    "model_type, reason",
    [
        ("mamba", "recurrent state"),
        ("rwkv", "recurrent state"),
        ("jamba", "recurrent state"),
        ("t5", "an encoder and a decoder"),
        ("bart", "an encoder and a decoder"),
        ("whisper", "an encoder and a decoder"),
        ("bert", "encoders"),
        ("roberta", "encoders"),
        ("vit", "no causal language models"),
    ],
)
def test_what_cannot_run_is_refused_by_its_type_in_one_line(model_type, reason, tmp_path, capsys):
    folder = saved_config(tmp_path / "model", model_type)
    for verb in ("plan", "run"):
        assert main([verb, "--model", str(folder)]) == 2
        (line,) = capsys.readouterr().err.strip().splitlines()
        assert f"models of type {model_type} " in line and reason in line


@pytest.mark.parametrize("model_type", ["gpt2", "llama"])  # positions that are looked up, or turned by
@pytest.mark.parametrize(
    "arguments, advice",
    [
        ([], "--protocols wiki-mini@64,c4-mini@64 --calibration c4-mini@64x24"),
        (["--protocols", "wiki-mini@64,c4-mini:tuning@65/3"], "--protocols wiki-mini@64,c4-mini:tuning@64/3 --cal"),
        (["--protocols", "wiki-mini@64", "--methods", "rtn,qlora"], "write --calibration c4-mini@64x24 --training"),
        (["--protocols", "wiki-mini@64", "--methods", "rtn,gptq", "--calibration", "c4-mini@99x4"], "c4-mini@64x4"),
    ],
)
def test_windows_longer_than_a_models_positions_are_refused_in_one_line(
    model_type, arguments, advice, tmp_path, capsys
):
    folder = saved_config(tmp_path / "model", model_type, max_position_embeddings=POSITIONS)
    for verb in ("plan", "run"):
        assert main([verb, "--model", str(folder), *arguments]) == 2
        (line,) = capsys.readouterr().err.strip().splitlines()
        assert "knows 64 positions" in line and advice in line


def test_blocks_that_are_told_of_tokens_are_refused(made):
    """Their arguments are found once for every size of batch, whatever the tokens."""
    _, folder, tokens = made("llama")
    model = loaded(folder)
    rotate = model.model.rotary_emb.forward
    model.model.rotary_emb.forward = lambda x, position_ids: [part + x.mean() for part in rotate(x, position_ids)]
    with pytest.raises(ValueError, match="models of type llama tell their blocks something of every token"):
        BlockInputs(model, tokens)


def test_a_model_of_another_family_is_not_decoded_natively(made):
    for family in ("gpt2", "opt", "qwen3-moe"):
        model = made(family)[0]
        assert f"type {model.config.model_type} are run by transformers" in token_decoder(model, None, POSITIONS)


@pytest.mark.parametrize("text", ["gptq", "gptvq", "reallm"])
def test_an_expert_no_token_is_sent_to_is_packed_too(text, made, tmp_path):
    _, folder, tokens = made("mixtral")
    model, method, few = loaded(folder), parse_method(text), tokens[:1, :1]
    stock = inventory(model)
    reached = measure_sensitivities(model, few, 0)
    assert 0 < len(reached) < len(stock.layers)
    plan = mixed(stock, Fraction(5), expected_costs(method, model, stock, Fraction(5), reached, 0))
    compressed, _ = compress_model(model, stock, method, plan.layers, few, 0, tmp_path / "blocks")
    assert compressed.ledger() == plan.ledger
    assert torch.isfinite(compressed.model(tokens).logits).all()
