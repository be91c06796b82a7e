"""Every family of models goes the whole way, tiny and of random weights: measured, allocated, packed, saved, read back,
scored against the reference, and asked questions."""

from __future__ import annotations

import copy
from contextlib import contextmanager
from fractions import Fraction
from functools import cache, partial

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from harness.compress.block import BlockRun
from harness.compress.forward import BlockInputs, stubbed_blocks
from harness.compress.loop import compress_model
from harness.compress.training import finetune
from harness.compressed import CompressedModel
from harness.evaluate.branches import Text, follows_branches, log_likelihoods, longest_tree, plant
from harness.evaluate.score import head_of, hidden_states, noise_floor, score
from harness.model import inventory, load_reference
from harness.plan.allocation import mixed
from harness.plan.costs import expected_costs
from harness.plan.sensitivity import measure_fisher, measure_sensitivities, random_tokens
from methods import parse_method

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
    "qwen3-moe": ("qwen3_moe", GROUPED | dict(num_experts=6, num_experts_per_tok=2, moe_intermediate_size=32)),
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
    hidden = inputs.hidden_NTH
    for index, block in enumerate(stock.blocks):
        with BlockRun(model, block, inputs.block(index), hidden) as run:
            assert sorted(name for stage in run.stages() for name in stage) == sorted(x.name for x in block.layers)
            for stage in run.stages():
                x = seen[stage[0]]
                assert close(run.hessian(stage[0]), x.T @ x, 1e-4), stage
            after = run.outputs()
        assert close(inputs.block(index)(hidden[:3]), after[:3])  # of another number of windows
        hidden = after
    with replayed(model, hidden, inputs.returns_tuple):
        states = hidden_states(model, tokens, POSITIONS)
    with head_of(model) as head:
        assert close(head(states).view(5, POSITIONS - 1, -1), expected[:, :-1])


@pytest.fixture(scope="module")
def prepared(made):
    @cache
    def prepare(family):
        plain, folder, tokens = made(family)
        model = loaded(folder)
        states = folder / "states.safetensors"
        measured = {True: measure_sensitivities(model, tokens, 0)}
        noise = random_tokens(VOCABULARY, POSITIONS)
        measured[False] = {n: s.flat for n, s in measure_sensitivities(model, noise, 0, feedback=False).items()}
        assert all(measured[True].keys() == {x.name for x in inventory(model).layers} for _ in (0,))
        score(model, tokens, keep=states)
        return model, folder, tokens, measured, states

    return prepare


@pytest.mark.parametrize("text", METHODS)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_goes_the_whole_way_with_every_method(family, text, prepared, tmp_path):
    original, _, tokens, measured, states = prepared(family)
    model = copy.deepcopy(original)
    stock, method, budget = inventory(model), parse_method(text), Fraction(6)
    costs = expected_costs(method, model, stock, budget, measured[method.needs.text], 0)
    plan = mixed(stock, budget, costs)
    compressed, _ = compress_model(model, stock, method, plan.layers, tokens, 0, tmp_path / "blocks")
    if method.adaptation:
        finetune(compressed, method.adaptation, tokens, 1, 0, tmp_path)
    compressed.save(tmp_path / "saved")
    reloaded = CompressedModel.load(tmp_path / "saved", "cpu", torch.float32)
    assert set(reloaded.packed) == {layer.name for layer in stock.layers}
    assert reloaded.ledger() == plan.ledger and plan.ledger.fits(budget)
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
