"""The devices of this machine, and which of them each of the cells that run at once has."""

from __future__ import annotations


def devices_of(device: str) -> list[str]:
    """Those that a name stands for: all of their type, for an accelerator without a number."""
    if device != "cuda":
        return [device]
    import torch

    return [f"cuda:{number}" for number in range(torch.cuda.device_count())] or [device]


def places(device: str, jobs: int) -> list[str]:
    """A device for each of `jobs` cells, as evenly as can be."""
    devices = devices_of(device)
    return [devices[number % len(devices)] for number in range(jobs)]


def room_bytes(device: str, jobs: int) -> float:
    """Memory that each of `jobs` cells may take: of its device, where it has one to itself or shares it."""
    from harness.measure.machine import available_bytes

    if device == "cpu":
        return available_bytes() / jobs
    devices = devices_of(device)
    return min(map(free_bytes, devices)) / -(-jobs // len(devices))


def free_bytes(device: str) -> int:
    """Of an accelerator's memory."""
    import torch

    return torch.cuda.mem_get_info(device)[0]
