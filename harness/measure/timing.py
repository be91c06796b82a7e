"""Rounds of the things compared, in turn: what disturbs one disturbs the other, and a ratio is taken inside a round."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from statistics import median
from typing import Any

import torch

Call = Callable[[], object]


def interleaved(
    calls: Mapping[str, Call], device: str, seconds: float, fewest: int, most: int, before: Call | None = None
) -> dict[str, list[float]]:
    """Seconds of every call in every round, the order turned round from one to the next; `before` runs, untimed, in
    front of each. As many rounds as `seconds` allow."""
    taken: dict[str, list[float]] = {name: [] for name in calls}
    names, end = list(calls), time.perf_counter() + seconds
    for done in range(most):
        if done >= fewest and time.perf_counter() > end:
            break
        for name in names if done % 2 == 0 else reversed(names):
            if before is not None:
                before()
            taken[name].append(_seconds(calls[name], device))
    return taken


def _seconds(call: Call, device: str) -> float:
    """On a GPU between two events in its own stream: how long the host takes to notice the end is left out."""
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


def spread(values: list[float]) -> dict[str, Any]:
    """Median, tenth and ninetieth percentile."""
    ordered = sorted(values)
    last = len(ordered) - 1
    return {
        "median": median(ordered),
        "p10": ordered[round(0.1 * last)],
        "p90": ordered[round(0.9 * last)],
        "rounds": len(ordered),
    }


def speed_up(seconds: list[float], of_other: list[float]) -> dict[str, Any]:
    """How many times faster than the other, per round."""
    return spread([other / own for own, other in zip(seconds, of_other, strict=True)])


def graphed(call: Call, device: str) -> Call:
    """On a GPU the call as a CUDA graph, replayed without the cost of its launches; elsewhere the call. It must read
    and write the same tensors every time. Call it a few times before: what is made at first use must be there."""
    if torch.device(device).type != "cuda":
        return call
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay
