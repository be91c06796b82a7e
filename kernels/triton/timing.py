"""Time of a product on a GPU whose weights come from memory: graph replays over copies that no cache holds, contestants
in turn."""

from __future__ import annotations

import copy
from collections.abc import Callable
from statistics import median

import torch
from torch import Tensor

from kernels.formats.packed import PackedLinear

COLD = 4  # times the second-level cache: what copies of a weight take together
MOST = 64  # copies; a weight so small that these fit the cache would come from it in a model, too
COPY_BYTES = 1 << 31


def stored_bytes(layer: PackedLinear) -> int:
    return layer.stored_bits().total // 8


def copies(one_bytes: int) -> int:
    return min(MOST, max(2, -(-COLD * torch.cuda.get_device_properties(0).L2_cache_size // one_bytes)))


def layers(layer: PackedLinear) -> list[PackedLinear]:
    return [copy.deepcopy(layer) for _ in range(copies(stored_bytes(layer)))]


class Replay:
    """`calls`, one after the other, in a graph; `time_us` is the time of one call."""

    def __init__(self, calls: list[Callable[[], Tensor]]) -> None:
        self.calls, self.graph, self.times_us = len(calls), torch.cuda.CUDAGraph(), []
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for call in calls:  # compiles, and prepares every copy
                call()
        torch.cuda.current_stream().wait_stream(stream)
        with torch.cuda.graph(self.graph):
            for call in calls:
                call()

    def once(self) -> None:
        before, after = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        before.record()
        self.graph.replay()
        after.record()
        after.synchronize()
        self.times_us.append(1e3 * before.elapsed_time(after) / self.calls)


def in_turn(replays: list[Replay], rounds: int) -> list[float]:
    """Median time of a call of each, microseconds; a first tenth of the rounds warms up."""
    for _ in range(rounds + rounds // 10 + 1):
        for replay in replays:
            replay.once()
    return [median(replay.times_us[-rounds:]) for replay in replays]


def bandwidth() -> float:
    """Bytes a second that a copy on the device reads and writes."""
    source = torch.empty(COPY_BYTES, dtype=torch.uint8, device="cuda").random_()
    target = torch.empty_like(source)
    replay = Replay([lambda: target.copy_(source)])
    return 2 * COPY_BYTES / (1e-6 * in_turn([replay], 30)[0])
