"""Tokens scored per second: this harness against lm-eval's own HFLM wrapper, on the same model, windows and threads,
interleaved.

    python benchmarks/scoring.py [--model NAME] [--context 512] [--windows 8] [--rounds 5] [--device cpu]

Prints the median and the spread of each, and of the ratio of each round, after checking that both find the same losses.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch

from harness.data.assets import DEFAULT_MODEL, resolve_model
from harness.data.checkpoint import load_tokenizer
from harness.data.protocols import parse_protocol
from harness.data.streams import evaluation_stream
from harness.evaluate.score import score
from harness.model import load_reference


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=DEFAULT_MODEL)
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batch", type=int, default=4, help="batch size of HFLM; ours decides for itself")
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()

    from lm_eval.models.huggingface import HFLM

    resolved = resolve_model(arguments.model)
    tokens_NT = evaluation_stream(
        parse_protocol(f"wiki-mini@{arguments.context}/{arguments.windows}"), resolved, None
    ).tokens_NT
    dtype = torch.float32 if arguments.device == "cpu" else torch.float16
    model = load_reference(resolved.path, arguments.device, dtype)
    wrapper = HFLM(
        pretrained=model,
        tokenizer=load_tokenizer(resolved.path),
        max_length=arguments.context,
        batch_size=arguments.batch,
        device=arguments.device,
    )
    requests = [(("", ""), window[:1], window[1:]) for window in tokens_NT.tolist()]

    def ours() -> list[float]:
        return score(model, tokens_NT).window_nll

    def theirs() -> list[float]:
        found = wrapper._loglikelihood_tokens(requests, disable_tqdm=True)
        return [-value / (arguments.context - 1) for value, _ in found]

    worst = max(abs(a - b) for a, b in zip(ours(), theirs(), strict=True))  # also the warm-up
    assert worst < (1e-4 if dtype == torch.float32 else 1e-2), f"losses differ by {worst}"
    count = tokens_NT.shape[0] * (tokens_NT.shape[1] - 1)
    rates = {"harness": [], "lm-eval HFLM": []}
    for turn in range(arguments.rounds):
        order: list[tuple[str, Callable[[], list[float]]]] = [("harness", ours), ("lm-eval HFLM", theirs)]
        for name, run in order if turn % 2 == 0 else reversed(order):
            start = time.perf_counter()
            run()
            rates[name].append(count / (time.perf_counter() - start))
    print(
        f"{resolved.name}, {count} tokens in windows of {arguments.context}, {arguments.device}, "
        f"{torch.get_num_threads()} threads, {dtype}"
    )
    print(f"largest difference of a window's loss: {worst:.1e}")
    for name, values in rates.items():
        print(f"{name:14} {statistics.median(values):8.0f} tokens/s  ({min(values):.0f} to {max(values):.0f})")
    ratios = [a / b for a, b in zip(*rates.values(), strict=True)]
    print(
        f"ratio          {statistics.median(ratios):8.2f}           "
        f"({min(ratios):.2f} to {max(ratios):.2f} over {len(ratios)} rounds)"
    )


if __name__ == "__main__":
    main()
