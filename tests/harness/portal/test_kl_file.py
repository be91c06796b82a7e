"""llama.cpp's file of log-probabilities: written as its program does, read as its program does."""

import math
import re
import shutil
import struct
import subprocess

import numpy as np
import pytest
import torch

from harness.data.texts import mini_documents
from harness.portal import kl_file
from tests.harness.portal.conftest import exported, load
from tests.helpers import run_harness

RTN4 = "rtn:bits=4,group=32,offset=symmetric"
RTN8 = "rtn:bits=8,group=32,offset=symmetric"


def written(logits: list[float]) -> bytes:
    """A prediction, number by number, by the words of kl_file's docstring."""
    highest = max(logits)
    lowest = max(min(logits), highest - 16)
    lse = math.log(sum(math.exp(x - highest) for x in logits))
    scale = (highest - lowest) / 65535
    numbers = [round((x - lowest) / scale) if x > lowest else 0 for x in logits]
    return struct.pack("<ff", scale, lowest - highest - lse) + struct.pack(f"<{len(logits)}H", *numbers)


def test_a_prediction_is_rounded_as_llama_cpp_rounds_it():
    logits_NV = torch.randn(5, 65, generator=torch.Generator().manual_seed(0)) * 6
    rows = kl_file.rounded(logits_NV)
    assert rows.shape == (5, 4 + 66) and not rows[:, -1].any()  # an odd vocabulary has one more number
    for row, logits_V in zip(rows, logits_NV.tolist(), strict=True):
        expected = np.frombuffer(written(logits_V), dtype=np.uint16)
        assert np.array_equal(row[:4].view(np.float32), np.float32(expected[:4].view(np.float32))) or np.allclose(
            row[:4].view(np.float32), expected[:4].view(np.float32), rtol=1e-6
        )
        assert np.abs(row[4:-1].astype(int) - expected[4:]).max() <= 1  # of 65535: llama.cpp divides in fp32
    same = kl_file.rounded(torch.zeros(1, 4))
    assert not same[0, 4:].any() and same[0, 2:4].view(np.float32) == np.float32(-math.log(4))


def test_both_ends_agree_on_the_same_logits(cell, tmp_path):
    """The divergence of one cell from another, through a file, is that of their logits; a few windows of 64 tokens."""
    models = [load(cell(method)).model for method in (RTN8, RTN4)]
    tokens_NT = torch.randint(1000, 8000, (2, 64), generator=torch.Generator().manual_seed(1))
    path = tmp_path / "base.kld"
    kl_file.write(models[0], tokens_NT, path)
    base = kl_file.Base.open(path)
    assert torch.equal(base.tokens_NT, tokens_NT)
    found, itself = (kl_file.compare(model, base) for model in (models[1], models[0]))
    with torch.inference_mode():
        p, q = (model(tokens_NT).logits[:, 32:63].log_softmax(-1).double().flatten(0, 1) for model in models)
    assert found.predictions == 2 * 31
    assert found.kld == pytest.approx((p.exp() * (p - q)).sum(1).mean().item(), rel=2e-2)
    assert 0 <= abs(itself.kld) < 1e-4 < found.kld and itself.top1 == 1.0
    target_N1 = tokens_NT[:, 33:64].reshape(-1, 1)
    assert found.ppl == pytest.approx(math.exp(-q.gather(1, target_N1).mean().item()), rel=1e-3)
    path.write_bytes(path.read_bytes()[:-2])
    with pytest.raises(ValueError, match="it is cut off"):
        kl_file.Base.open(path)
    path.write_bytes(b"GGUF" * 8)
    with pytest.raises(ValueError, match="is no file of llama-perplexity"):
        kl_file.Base.open(path)


def test_a_token_in_front_of_texts_takes_the_place_of_every_first_one(cell, tokenizer, tmp_path):
    """As llama.cpp runs a model whose vocabulary says so; the file keeps the tokens of the text."""
    model = load(cell(RTN8)).model
    tokens_NT = torch.randint(1000, 8000, (2, 16), generator=torch.Generator().manual_seed(1))
    begun_NT = torch.cat([torch.full((2, 1), 7), tokens_NT[:, 1:]], dim=1)
    for name, tokens, bos in (("given", tokens_NT, 7), ("there", begun_NT, None)):
        kl_file.write(model, tokens, tmp_path / name, bos)
    bases = [kl_file.Base.open(tmp_path / name) for name in ("given", "there")]
    assert torch.equal(bases[0].tokens_NT, tokens_NT) and torch.equal(bases[1].tokens_NT, begun_NT)
    assert torch.equal(*(base.log_probabilities(1) for base in bases))
    assert abs(kl_file.compare(model, bases[0], 7).kld) < 1e-4 < kl_file.compare(model, bases[0]).kld
    assert kl_file.beginning(tokenizer) is None


PROGRAM = shutil.which("llama-perplexity")


@pytest.mark.skipif(PROGRAM is None, reason="llama-perplexity is not on the PATH")
def test_llama_cpp_agrees(cell, tmp_path):
    """Its program writes and we read, and the other way round. It rounds inputs of products to 8 bits, we do not."""
    paths = {method: exported(cell(method), "gguf", tmp_path / method[:10]) for method in (RTN8, RTN4)}
    text, file = tmp_path / "text.txt", tmp_path / "theirs.kld"
    text.write_text("\n\n".join(mini_documents("wiki-mini", "evaluation"))[:4000])
    told(paths[RTN8], "-f", text, "-c", 64, "--chunks", 8, "--kl-divergence-base", file)
    base = kl_file.Base.open(file)
    ours = kl_file.compare(load(cell(RTN4)).model, base)
    theirs = told(paths[RTN4], "--kl-divergence-base", file, "--kl-divergence")
    assert ours.predictions == 8 * 31 and ours.kld == pytest.approx(said("Mean +KLD", theirs), rel=0.05)
    assert ours.ppl == pytest.approx(said("Mean PPL.Q.", theirs), rel=0.05)
    assert 100 * ours.top1 == pytest.approx(said("Same top p", theirs), abs=3)
    kl_file.write(load(cell(RTN8)).model, base.tokens_NT, tmp_path / "ours.kld")
    again = told(paths[RTN4], "--kl-divergence-base", tmp_path / "ours.kld", "--kl-divergence")
    assert said("Mean +KLD", again) == pytest.approx(said("Mean +KLD", theirs), rel=0.05)


def told(model, *arguments) -> str:
    command = [PROGRAM, "-m", model, *arguments, "-t", 1, "-ub", 64, "-b", 64, "--no-repack"]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


def said(name: str, text: str) -> float:
    return float(re.search(rf"{name} *: +([\d.]+)", text)[1])


def test_the_command_line_writes_and_reads(finished, finished_cache, tmp_path):
    run, file = str(finished / "out"), str(tmp_path / "fp16.kld")
    done = run_harness("kld", run, "--row", "fp16", "--write", file)
    assert done.returncode == 0 and "4 windows of 128 tokens of wiki-mini@128" in done.stdout, done.stderr
    done = run_harness("kld", run, "--row", "gptq 2.25", "--base", file)
    assert done.returncode == 0 and "over 252 predictions" in done.stdout, done.stderr
    done = run_harness("kld", run, "--row", "gptq 2.25", "--write", file, "--protocol", "wiki-mini@64/3")
    assert done.returncode == 0 and "3 windows of 64 tokens of wiki-mini@64/3" in done.stdout, done.stderr
    done = run_harness("kld", run, "--row", "gptq 2.25", "--write", file, "--protocol", "wiki-mini64")
    assert done.returncode == 2 and "unknown protocol 'wiki-mini64'" in done.stderr
