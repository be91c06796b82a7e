"""A model that is half of a pair, made without a network: the default model, its blocks fully tuned on programs.

    python -m benchmarks.tuned_pair --out models/smollm2-135m-code
    python -m harness run --model models/smollm2-135m-code --base smollm2-135m-instruct --methods delta-come --bits 1

All weights and norms of the decoder blocks are trained (no adapters), embeddings and head are left as they are. The
text is the part `training` of code-mini, which shares no document with what `--protocols code-mini@512` scores; every
window is seen once, in an order drawn by the seed. The recipe was written down before anything was compressed: nothing
of it was chosen by what a delta of it scores. The same command on the same machine, with the same threads, writes the
same weights; a folder that is complete is left alone. On one core, beside other work, it
took 19 minutes.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from harness.compress.distil import backward_from_next_token
from harness.data.assets import DEFAULT_MODEL, resolve_model
from harness.data.checkpoint import load_tokenizer
from harness.data.protocols import parse_protocol
from harness.data.texts import mini_documents
from harness.data.windows import evaluation_windows
from harness.evaluate.score import score
from harness.model import decoder_blocks, load_reference
from methods.schedule import warm_cosine

TEXT, CONTEXT, SEED = "code-mini", 256, 0
RATE = 2e-4  # of AdamW
BETAS, CLIP = (0.9, 0.95), 1.0
HELD_OUT = ("code-mini@512", "c4-mini@512")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder of the tuned model")
    parser.add_argument(
        "--steps", type=int, default=160, help="windows of 256 tokens, one a step (default: %(default)s)"
    )
    parser.add_argument(
        "--threads", type=int, default=1, help="part of the recipe: sums of more are others (default: 1)"
    )
    arguments = parser.parse_args()
    report = arguments.out / "tuned.json"
    if report.exists():
        print(report.read_text(encoding="utf-8"))
        return
    torch.set_num_threads(arguments.threads)
    base = resolve_model(DEFAULT_MODEL, say=partial(print, flush=True))
    tokenizer = load_tokenizer(base.path)
    text = "\n\n".join(mini_documents(TEXT, "training"))
    ids_N = torch.tensor(tokenizer(text, add_special_tokens=False).input_ids)
    tokens_NT = ids_N[: len(ids_N) // CONTEXT * CONTEXT].view(-1, CONTEXT)
    order_N = torch.randperm(len(tokens_NT), generator=torch.Generator().manual_seed(SEED))[: arguments.steps]
    scored = {name: evaluation_windows(parse_protocol(name), tokenizer).tokens_NT for name in HELD_OUT}
    model = load_reference(base.path, "cpu", torch.float32, base.fingerprint)
    before = {name: score(model, windows_NT).ppl for name, windows_NT in scored.items()}
    print(f"perplexity before: {before}", flush=True)
    start = time.perf_counter()
    losses = tune(model, tokens_NT[order_N])
    after = {name: score(model, windows_NT).ppl for name, windows_NT in scored.items()}
    model.save_pretrained(arguments.out)
    tokenizer.save_pretrained(arguments.out)
    found = {
        "base": base.fingerprint,
        "text": f"{TEXT}:training, {len(order_N)} windows of {CONTEXT} of {len(tokens_NT)}",
        "first_losses": losses[:10],
        "last_losses": losses[-10:],
        "perplexity_before": before,
        "perplexity_after": after,
        "seconds": time.perf_counter() - start,
        "threads": arguments.threads,
    }
    report.write_text(json.dumps(found, indent=1), encoding="utf-8")  # last: it marks the folder as complete
    print(json.dumps(found, indent=1))


def tune(model: PreTrainedModel, tokens_NT: Tensor) -> list[float]:
    """Train the decoder blocks on the next token, a window [T] a step, in this order; the loss of every step before
    it, in nats per token. Raises ValueError when it is no longer a number."""
    model.requires_grad_(False)
    blocks = decoder_blocks(model)[1].requires_grad_(True)
    parameters = list(blocks.parameters())
    optimiser = torch.optim.AdamW(parameters, lr=RATE, betas=BETAS, weight_decay=0.0)
    losses = []
    for index, window_T in enumerate(tokens_NT):
        optimiser.param_groups[0]["lr"] = RATE * warm_cosine(index, len(tokens_NT))
        optimiser.zero_grad()
        losses.append(backward_from_next_token(model, window_T, 1))
        if not math.isfinite(losses[-1]):
            raise ValueError(f"the loss became {losses[-1]} at step {index}")
        torch.nn.utils.clip_grad_norm_(parameters, CLIP)
        optimiser.step()
        if index % 10 == 0:
            print(f"step {index}: {losses[-1]:.3f}", flush=True)
    model.requires_grad_(False)
    return losses


if __name__ == "__main__":
    main()
