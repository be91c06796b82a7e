"""What a latency stands on: the machine, the speed of its memory, and that nothing else of ours runs meanwhile."""

from __future__ import annotations

import fcntl
import os
import platform
import resource
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch

from harness.store.files import digest

STREAM_BYTES = 1 << 28  # read to measure the bandwidth: many times any last-level cache of a CPU
GPU_STREAM_BYTES = 1 << 31
DEFAULT_CACHE = 32 << 20  # where the system does not tell the size of its last-level cache
CODE = ("kernels", "harness/measure")  # a latency measured on other code than this is not shown
CODE_SUFFIXES = (".py", ".cpp", ".h", ".json")


@contextmanager
def working() -> Iterator[None]:
    """Inside, work of ours runs on this machine that would disturb a measurement. Waits while one is taken."""
    with _lock(fcntl.LOCK_SH):
        yield


@contextmanager
def quiet(waiting: Callable[[], None] = lambda: None) -> Iterator[None]:
    """Inside, this process alone measures; waits (and says so once) until no work of ours, of any run of this user, is
    left."""
    with _lock(fcntl.LOCK_EX, waiting):
        yield


@contextmanager
def _lock(how: int, waiting: Callable[[], None] = lambda: None) -> Iterator[None]:
    with open(lock_path(), "w") as handle:  # freed by the kernel when the process ends, however it ends
        try:
            fcntl.flock(handle, how | fcntl.LOCK_NB)
        except BlockingIOError:
            waiting()
            fcntl.flock(handle, how)
        yield


def lock_path() -> Path:
    return Path(tempfile.gettempdir()) / f"ptq-harness-{os.getuid()}.lock"


def cores() -> int:
    return len(os.sched_getaffinity(0))


def identity(device: str) -> dict[str, Any]:
    """What a latency belongs to: the same identity, the same numbers up to noise."""
    found: dict[str, Any] = {"processor": _processor(), "cores": cores(), "torch": torch.__version__}
    if torch.device(device).type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found |= {
            "gpu": properties.name,
            "gpu_gib": round(properties.total_memory / 2**30, 1),
            "cuda": torch.version.cuda,
        }
    return found


def identity_key(device: str, threads: int, reference: str) -> str:
    """Of a measurement: machine, code and the uncompressed model that the cells are timed beside."""
    return digest([identity(device), threads, _code(), reference])[:16]


@cache
def _code() -> str:
    root = Path(__file__).parents[2]
    files = sorted(path for folder in CODE for path in (root / folder).rglob("*") if path.suffix in CODE_SUFFIXES)
    return sha256(b"".join(path.read_bytes() for path in files)).hexdigest()


@cache
def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def clocks(device: str) -> dict[str, Any]:
    """As they are now, in MHz; empty where nothing tells."""
    found: dict[str, Any] = {}
    with suppress(OSError, ValueError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        found["cpu_mhz"] = max(float(line.partition(":")[2]) for line in lines if line.startswith("cpu MHz"))
    if torch.device(device).type == "cuda":
        with suppress(Exception):  # needs a library of the driver's that is not everywhere
            found["gpu_mhz"] = torch.cuda.clock_rate(device)
    return found


def last_cache_bytes(device: str) -> int:
    """Of the last cache in front of memory."""
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_properties(device).L2_cache_size
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
        return max(
            2 * source.nbytes / _best(lambda: target.copy_(source), seconds, device),
            source.nbytes / _best(lambda: source.sum(), seconds, device),
        )
    stream = torch.ones(STREAM_BYTES // 4)
    return stream.nbytes / min(
        _best(lambda: stream.sum(), seconds, device), _best(lambda: stream.amax(), seconds, device)
    )


def _best(call: Callable[[], object], seconds: float, device: str) -> float:
    call()
    least, end = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < end or least == float("inf"):
        synchronize(device)
        start = time.perf_counter()
        call()
        synchronize(device)
        least = min(least, time.perf_counter() - start)
    return least


def synchronize(device: str) -> None:
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


def peak_process_bytes() -> int:
    """The most memory this process has held (Linux counts it in KiB)."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
