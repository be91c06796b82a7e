"""The ruler: seconds of calls that take turns, with weights that come from memory.

What is compared runs in rounds: what disturbs one disturbs the other, and a ratio is taken inside a round. As in a
model, weights have left the last cache before they are read again: a product is timed over so many copies of its layer
that all together are `BEYOND` times as large.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch

Call = Callable[[], object]
BEYOND = 2  # last caches that lie between two reads of a weight
COPIES_PER_CACHE = 16  # at most: in a model, too, a weight smaller than a sixteenth of the cache may come from it
STREAM_BYTES = 1 << 28  # read to measure the bandwidth: many times any last-level cache of a CPU
GPU_STREAM_BYTES = 1 << 31
DEFAULT_CACHE = 32 << 20  # bytes, where the system does not say how large its last-level cache is


def interleaved(
    calls: Mapping[str, Call], device: str, seconds: float, fewest: int, most: int, before: Call | None = None
) -> dict[str, list[float]]:
    """Seconds of every call in every round, the order turned round from one to the next; `before` runs, untimed, in
    front of each. As many rounds as `seconds` allow, but no fewer than `fewest` and no more than `most`."""
    taken: dict[str, list[float]] = {name: [] for name in calls}
    names, end = list(calls), time.perf_counter() + seconds
    for done in range(most):
        if done >= fewest and time.perf_counter() > end:
            break
        for name in names if done % 2 == 0 else reversed(names):
            if before is not None:
                before()
            taken[name].append(seconds_of(calls[name], device))
    return taken


def seconds_of(call: Call, device: str) -> float:
    """Seconds that one call takes. On a GPU between two events in its own stream: how long the host takes to notice the
    end is left out."""
    if torch.device(device).type != "cuda":
        start = time.perf_counter()
        call()
        return time.perf_counter() - start
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize(device)
    begin.record()
    call()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3


def spread(values: Sequence[float]) -> dict[str, Any]:
    """Median, tenth and ninetieth percentile, and the number of rounds."""
    ordered = sorted(values)
    last = len(ordered) - 1
    return {
        "median": median(ordered),
        "p10": ordered[round(0.1 * last)],
        "p90": ordered[round(0.9 * last)],
        "rounds": len(ordered),
    }


def speed_up(seconds: Sequence[float], of_other: Sequence[float]) -> dict[str, Any]:
    """The spread of how many times faster than the other a call is, round by round."""
    return spread([other / own for own, other in zip(seconds, of_other, strict=True)])


def graphed(call: Call, device: str) -> Call:
    """On a GPU the call as a CUDA graph, replayed without the cost of its launches; elsewhere the call. It must read
    and write the same tensors every time. Call it a few times before: what is prepared at first use must be there."""
    if torch.device(device).type != "cuda":
        return call
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def in_succession(calls: Sequence[Call], device: str) -> Call:
    """The calls, one after the other, as a single one without gradients, graphed on a GPU. Each is run once here, which
    compiles it and prepares its layer."""

    @torch.inference_mode()
    def every() -> None:
        for call in calls:
            call()

    every()
    return graphed(every, device)


def copies(bytes_each: float, device: str, caches: int = BEYOND) -> int:
    """How many layers of this size, used in turn, lie `caches` last caches apart; see COPIES_PER_CACHE."""
    return min(COPIES_PER_CACHE * caches, max(1, -(-caches * last_cache_bytes(device) // int(bytes_each))))


def last_cache_bytes(device: str) -> int:
    """The size of the last cache in front of memory; of a CPU what HARNESS_LAST_CACHE says, in MiB, where it is set: a
    virtual machine may tell of a cache that it has a small part of. Raises ValueError where that is no number."""
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_properties(device).L2_cache_size
    if given := os.environ.get("HARNESS_LAST_CACHE"):
        if not given.isdecimal() or not int(given):
            raise ValueError(f"HARNESS_LAST_CACHE={given} is no number of MiB: write for example 32, or nothing")
        return int(given) << 20
    sizes = [DEFAULT_CACHE]
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = path.read_text().strip()
        sizes.append(int(text.rstrip("KMG")) << {"K": 10, "M": 20, "G": 30}.get(text[-1:], 0))
    return max(sizes)


def bandwidth(device: str, seconds: float = 0.5) -> float:
    """Bytes per second that can be read from memory: the best of repeated reads of a buffer far beyond the last cache,
    on a GPU (where a reduction is not always the faster) of copies within it, each byte of which is read and
    written."""
    if torch.device(device).type == "cuda":
        source = torch.empty(GPU_STREAM_BYTES // 4, device=device)
        target = torch.empty_like(source)
        copied = 2 * source.nbytes / _best(lambda: target.copy_(source), seconds, device)
        return max(copied, source.nbytes / _best(source.sum, seconds, device))
    stream = torch.ones(STREAM_BYTES // 4)
    return stream.nbytes / min(_best(stream.sum, seconds, device), _best(stream.amax, seconds, device))


def _best(call: Call, seconds: float, device: str) -> float:
    """The fewest seconds of a call among as many as are done in `seconds`; the first warms up."""
    call()
    least, end = seconds_of(call, device), time.perf_counter() + seconds
    while time.perf_counter() < end:
        least = min(least, seconds_of(call, device))
    return least


def synchronize(device: str | torch.device) -> None:
    """Wait until a GPU has done what it was asked; elsewhere nothing is left to wait for."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
