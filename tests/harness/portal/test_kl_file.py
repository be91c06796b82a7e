"""llama.cpp's file of log-probabilities: written as its program does, read as its program does."""

import math
import struct

import numpy as np
import pytest
import torch

from harness.compressed import CompressedModel
from harness.portal import kl_file
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
    models = [CompressedModel.load(cell(method).store.folder, "cpu", torch.float32).model for method in (RTN8, RTN4)]
    tokens_NT = torch.randint(1000, 9000, (2, 64), generator=torch.Generator().manual_seed(1))
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


def test_the_command_line_writes_and_reads(finished, finished_cache, tmp_path):
    run, file = str(finished / "out"), str(tmp_path / "fp16.kld")
    done = run_harness("kld", run, "--row", "fp16", "--write", file)
    assert done.returncode == 0 and "4 windows of 128 tokens of wiki-mini@128" in done.stdout, done.stderr
    done = run_harness("kld", run, "--row", "gptq 2.25", "--base", file)
    assert done.returncode == 0 and "over 252 predictions" in done.stdout, done.stderr
    done = run_harness("kld", run, "--row", "gptq 2.25", "--write", file, "--protocol", "wiki-mini@64")
    assert done.returncode == 2 and "was not scored by 'wiki-mini@64'" in done.stderr
