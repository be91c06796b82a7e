"""Tokens scored per second: this harness against lm-eval's own HFLM wrapper, on the same windows and threads, in
alternating rounds.

    python benchmarks/scoring.py [--model NAME] [--context 512] [--windows 8] [--rounds 5] [--device cpu]

Three models: the uncompressed one, which a user of lm-eval has as transformers loads it, and a cell in 16-bit layers;
and one packed to 3 bits, the same object for both. `divergence` is what every row of a board also has: the reference's
logits again, and the divergence from them, of which lm-eval knows nothing. Prints the median and the spread of each,
and of the ratio of each round to lm-eval's, after checking that both find the same losses."""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from harness.data.assets import DEFAULT_MODEL, resolve_model
from harness.data.checkpoint import load_tokenizer
from harness.data.protocols import parse_protocol
from harness.data.streams import evaluation_stream
from harness.evaluate.score import score
from harness.measure.end_to_end import uncompressed
from harness.model import inventory, load_reference, read_config
from methods import LayerConfig, LayerData, parse_method

PACKED = "rtn:bits=3,group=64"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=DEFAULT_MODEL)
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batch", type=int, default=4, help="batch size of HFLM; ours decides for itself")
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()

    resolved = resolve_model(arguments.model)
    tokens_NT = evaluation_stream(
        parse_protocol(f"wiki-mini@{arguments.context}/{arguments.windows}"), resolved, None
    ).tokens_NT
    dtype = torch.float32 if arguments.device == "cpu" else torch.float16
    count = tokens_NT.shape[0] * (tokens_NT.shape[1] - 1)
    print(
        f"{resolved.name}, {count} tokens in windows of {arguments.context}, {arguments.device}, "
        f"{torch.get_num_threads()} threads, {dtype}"
    )
    tokenizer = load_tokenizer(resolved.path)
    published = load_reference(resolved.path, arguments.device, dtype)
    dense = _repacked(load_reference(resolved.path, arguments.device, dtype), None)
    packed = _repacked(load_reference(resolved.path, arguments.device, dtype), PACKED)
    with tempfile.TemporaryDirectory() as folder:
        states = Path(folder) / "states.safetensors"
        score(dense, tokens_NT, keep=states)
        for title, theirs, ours in (("uncompressed", published, dense), (PACKED, packed, packed)):
            sides = {
                "lm-eval HFLM": _wrapped(theirs, tokenizer, tokens_NT, arguments),
                "harness": _scoring(ours, tokens_NT, None),
                "harness, divergence": _scoring(ours, tokens_NT, states),
            }
            print(f"\n{title}")
            _take_turns(sides, count, arguments.rounds, 1e-3 if dtype == torch.float32 else 1e-2)


def _repacked(model: Any, method: str | None) -> Any:
    """The model with packed layers in the place of its linear ones: of 16 bits, or as a method packs them."""
    packer = parse_method(method) if method else None
    dense = uncompressed(read_config(model.config.name_or_path))
    for layer in inventory(model).layers:
        linear = model.get_submodule(layer.name)
        weight_OI = linear.weight.detach().float().cpu()
        if packer is None:
            packed = dense.layout(layer, weight_OI.device)
            packed.fill(weight=weight_OI.to(packed.get_buffer("weight").dtype))
        else:
            config: LayerConfig = packer.candidates(layer)[0]
            packed = packer.compress(LayerData(weight_OI), layer, config).packed
        packed.set_bias(linear.bias)
        model.set_submodule(layer.name, packed.to(linear.weight.device))
    return model


def _scoring(model: Any, tokens_NT: Tensor, reference: Path | None) -> Callable[[], tuple[float, ...]]:
    return lambda: score(model, tokens_NT, reference).window_nll


def _wrapped(
    model: Any, tokenizer: Any, tokens_NT: Tensor, arguments: argparse.Namespace
) -> Callable[[], tuple[float, ...]]:
    from lm_eval.models.huggingface import HFLM

    wrapper = HFLM(
        pretrained=model,
        tokenizer=tokenizer,
        max_length=arguments.context,
        batch_size=arguments.batch,
        device=arguments.device,
    )
    requests = [(("", ""), window[:1], window[1:]) for window in tokens_NT.tolist()]

    def losses() -> tuple[float, ...]:
        found = wrapper._loglikelihood_tokens(requests, disable_tqdm=True)
        return tuple(-value / (arguments.context - 1) for value, _ in found)

    return losses


def _take_turns(sides: dict[str, Callable[[], tuple[float, ...]]], count: int, rounds: int, tolerance: float) -> None:
    """Every side once a round, in turning order; the first is what the others are compared with."""
    first, *others = [run() for run in sides.values()]  # also the warm-up
    worst = max(abs(a - b) for other in others for a, b in zip(first, other, strict=True))
    assert worst < tolerance, f"losses differ by {worst}"
    rates: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(rounds):
        order = list(sides.items())
        for name, run in order if turn % 2 == 0 else reversed(order):
            start = time.perf_counter()
            run()
            rates[name].append(count / (time.perf_counter() - start))
    print(f"largest difference of a window's loss: {worst:.1e}")
    base = next(iter(rates.values()))
    for name, values in rates.items():
        ratios = [ours / theirs for ours, theirs in zip(values, base, strict=True)]
        print(
            f"{name:20} {statistics.median(values):7.0f} tokens/s ({min(values):.0f} to {max(values):.0f})"
            f"   {statistics.median(ratios):.2f} times ({min(ratios):.2f} to {max(ratios):.2f})"
        )


if __name__ == "__main__":
    main()
