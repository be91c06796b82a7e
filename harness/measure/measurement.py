"""One cell, in a process of its own: what its model takes, and how fast it is beside the uncompressed one.

Memory is read before the uncompressed model is loaded. Before anything is timed, the products that will be are held
against those of the decoded weights, and a token decoded from the cache against the same token scored in a window."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from harness.compressed import CompressedModel
from harness.measure import machine
from harness.measure.layers import BATCHES, groups_of, layer_times
from harness.measure.runner import (
    CONTEXT,
    PROMPT,
    Runner,
    bytes_per_token,
    prompt,
    read_prompt,
    resident_bytes,
    scored_logits,
    timed_model,
)
from harness.measure.timing import Call, interleaved, speed_up, spread
from harness.store.cells import CellStore
from kernels.dispatch import fused, linear

PRODUCT_LIMITS = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 4e-3}  # relative norms
LOGIT_LIMITS = {
    torch.float32: 1e-3,
    torch.float16: 3e-2,
    torch.bfloat16: 2e-1,
}  # those, after as many layers as a model has
FEWEST, FEWEST_PROMPTS, MOST_PROMPTS = 7, 3, 20  # rounds
Progress = Callable[[str, int, int], None]


def work(spec: dict[str, Any], speak: Progress) -> None:
    """`spec` is a cell's, with `bench`: {"identity", "seconds", "threads"} of the measurement."""
    store, reference, how = CellStore(spec["key"]), CellStore(spec["reference"]), spec["bench"]
    torch.set_num_threads(how["threads"])
    found = measure(
        store.folder, reference.folder, spec["device"], getattr(torch, spec["dtype"]), how["seconds"], speak
    )
    store.put_bench(how["identity"], found)


def measure(
    folder: Path, reference_folder: Path, device: str, dtype: torch.dtype, seconds: float, speak: Progress
) -> dict[str, Any]:
    """Everything the leaderboard says of memory and latency; about `seconds` of rounds for each thing that is timed.
    Raises ValueError when what would be timed is not what was scored."""
    speak("load", 0, 1)
    before = machine.peak_process_bytes()
    loaded = CompressedModel.load(folder, device, dtype)
    packed = loaded.packed
    _compare_products(loaded, device, dtype, speak)
    model = timed_model(loaded)
    runners = _runners(model)
    _compare_logits(model)
    found: dict[str, Any] = {
        "machine": machine.identity(device)
        | machine.clocks(device)
        | {"threads": torch.get_num_threads(), "loadavg": _load()},
        "dtype": str(dtype).removeprefix("torch."),
        "context": CONTEXT,
        "kind": loaded.kind if loaded.packed else "dense",
        "memory": _memory(model, before, device),
        "decode_on_load_s": sum(getattr(layer, "decode_seconds", None) or 0.0 for layer in packed.values()),
    }
    speak("bandwidth", 0, 1)
    found["bandwidth"] = machine.bandwidth(device)
    found["bytes_per_token"] = bytes_per_token(loaded)
    alone = folder == reference_folder
    beside = None if alone else timed_model(CompressedModel.load(reference_folder, device, dtype))
    found["decode"] = _decode(runners, None if beside is None else _runners(beside), device, seconds, speak)
    found["prefill"] = _prefill(model, beside, device, seconds, speak)
    if beside is not None:
        found["kernels"] = _kernels(loaded, beside, device, dtype, seconds, speak)
    found["bandwidth"] = max(found["bandwidth"], machine.bandwidth(device))  # others may have used it a moment ago
    return found


def _runners(model: PreTrainedModel) -> dict[int, Runner]:
    runners = {batch: Runner(model, prompt(model, batch, CONTEXT)) for batch in BATCHES}
    for runner in runners.values():
        runner.warm()
    return runners


def _compare_products(loaded: CompressedModel, device: str, dtype: torch.dtype, speak: Progress) -> None:
    """Fused products at every batch size against the decoded weights'."""
    for done, (name, layer) in enumerate(loaded.packed.items()):
        if fused(layer, torch.device(device).type) is None:
            continue
        weight_OI = layer.decode()
        for batch in BATCHES:
            x = torch.randn(batch, layer.in_features, generator=torch.Generator().manual_seed(batch)).to(device, dtype)
            expected = torch.nn.functional.linear(
                x.float(), weight_OI, None if layer.bias is None else layer.bias.float()
            )
            off = ((linear(layer, x).float() - expected).norm() / expected.norm()).item()
            if not off <= PRODUCT_LIMITS[dtype]:
                raise ValueError(f"not timed: the fused product of {name} is off by {off:.1e} at batch {batch}")
        speak("compare", done + 1, len(loaded.packed))


def _compare_logits(model: PreTrainedModel) -> None:
    """A token decoded from the cache against the same token scored in a window."""
    window = prompt(model, 1, CONTEXT)
    runner = Runner(model, window)
    runner.step()
    assert runner.logits_BV is not None
    scored = scored_logits(model, window).float()
    off = ((runner.logits_BV.float() - scored).norm() / scored.norm()).item()
    if not off <= LOGIT_LIMITS[model.dtype]:
        raise ValueError(f"not timed: logits of a decoded token are off by {off:.1e} from those that were scored")


def _memory(model: PreTrainedModel, before: int, device: str) -> dict[str, float]:
    """After the model was loaded and has decoded at every batch size and read a prompt, alone in this process."""
    read_prompt(model, prompt(model, 1, PROMPT))
    found = {
        "resident_bytes": resident_bytes(model),
        "process_peak_bytes": machine.peak_process_bytes(),
        "process_start_bytes": before,
    }
    if torch.device(device).type == "cuda":
        found["allocator_peak_bytes"] = torch.cuda.max_memory_allocated(device)
        found["allocator_reserved_bytes"] = torch.cuda.max_memory_reserved(device)
    return found


def _decode(
    runners: dict[int, Runner], beside: dict[int, Runner] | None, device: str, seconds: float, speak: Progress
) -> dict[str, Any]:
    found = {}
    for done, (batch, runner) in enumerate(runners.items()):
        calls: dict[str, Call] = {"own": runner.step} | ({"reference": beside[batch].step} if beside else {})
        taken = interleaved(calls, device, seconds, FEWEST, runner.left)
        found[str(batch)] = _record(taken)
        speak("decode", done + 1, len(runners))
    return found


def _prefill(
    model: PreTrainedModel, beside: PreTrainedModel | None, device: str, seconds: float, speak: Progress
) -> dict[str, Any]:
    ids = prompt(model, 1, PROMPT)
    calls: dict[str, Call] = {"own": lambda: read_prompt(model, ids)}
    if beside is not None:
        calls["reference"] = lambda: read_prompt(beside, ids)
    speak("read a prompt", 0, 1)
    return {"tokens": ids.shape[1], **_record(interleaved(calls, device, seconds, FEWEST_PROMPTS, MOST_PROMPTS))}


def _record(taken: dict[str, list[float]]) -> dict[str, Any]:
    record: dict[str, Any] = {"seconds": spread(taken["own"])}
    if "reference" in taken:
        record |= {
            "reference_seconds": spread(taken["reference"]),
            "speed_up": speed_up(taken["own"], taken["reference"]),
        }
    return record


def _kernels(
    loaded: CompressedModel, beside: PreTrainedModel, device: str, dtype: torch.dtype, seconds: float, speak: Progress
) -> list[dict[str, Any]]:
    """Nothing for layers that have become linear ones."""
    names = list(loaded.packed)
    vendor: dict[tuple[int, int], list[nn.Linear]] = {}
    for name in names:
        other = beside.get_submodule(name)
        vendor.setdefault((other.out_features, other.in_features), []).append(other)
    told = lambda done, total: speak("single products", done, total)  # noqa: E731
    return layer_times(groups_of(list(loaded.packed.values())), vendor, device, dtype, seconds, told) if names else []


def _load() -> float:
    """Of the last minute: other work on this machine shows."""
    return os.getloadavg()[0]
