"""What a latency stands on: the machine, the speed of its memory, and that nothing else of ours runs meanwhile."""

from __future__ import annotations

import ctypes
import fcntl
import os
import platform
import resource
import stat
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import cache
from hashlib import sha256
from pathlib import Path
from typing import IO

import kernels
from harness.data.files import digest
from harness.progress import wait_in_silence
from harness.store.results import Machine

CODE = (Path(kernels.__path__[0]), Path(__file__).parent)  # a latency measured on other code than this is not shown
CODE_SUFFIXES = (".py", ".cpp", ".h", ".json")

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of malloc.h
RETURNED_BYTES = 1 << 18


@contextmanager
def working(waiting: Callable[[], None] = wait_in_silence) -> Iterator[None]:
    """Inside, work of ours runs on this machine that would disturb a measurement. Waits (and says so once) while one is
    taken."""
    with _lock(fcntl.LOCK_SH, waiting):
        yield


@contextmanager
def quiet(waiting: Callable[[], None] = wait_in_silence) -> Iterator[None]:
    """Inside, this process alone measures; waits (and says so once) until no work of ours, of any run of this user, is
    left."""
    with _lock(fcntl.LOCK_EX, waiting):
        yield


@contextmanager
def _lock(how: int, waiting: Callable[[], None] = wait_in_silence) -> Iterator[None]:
    with _opened(lock_path()) as handle:  # freed by the kernel when the process ends, however it ends
        try:
            fcntl.flock(handle, how | fcntl.LOCK_NB)
        except BlockingIOError:
            waiting()
            fcntl.flock(handle, how)
        yield


def _opened(path: Path) -> IO[bytes]:
    """The lock's file, in a folder that anyone may write to: never what somebody else put in its place, and nothing of
    it is changed."""
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
    try:
        handle = os.fdopen(os.open(path, flags, 0o600), "r+b", buffering=0)
    except OSError as error:
        raise ValueError(
            f"{path} is no lock of ours ({error.strerror}): remove it, or set TMPDIR to a folder of your own"
        ) from None
    found = os.fstat(handle.fileno())
    if not stat.S_ISREG(found.st_mode) or found.st_uid != os.getuid():
        handle.close()
        raise ValueError(
            f"{path} is no lock of ours (another user's, or no plain file): remove it, or set TMPDIR to a folder of "
            "your own"
        )
    return handle


def lock_path() -> Path:
    return Path(tempfile.gettempdir()) / f"ptq-harness-{os.getuid()}.lock"


def cores() -> int:
    return len(os.sched_getaffinity(0))


def identity(device: str, threads: int) -> Machine:
    """The machine that a latency belongs to: the same one, the same numbers up to noise."""
    import torch

    found = Machine(_processor(), cores(), torch.__version__, threads)
    if torch.device(device).type != "cuda":
        return found
    properties = torch.cuda.get_device_properties(device)
    gib = round(properties.total_memory / 2**30, 1)
    return replace(found, gpu=properties.name, gpu_gib=gib, cuda=torch.version.cuda)


def describe(device: str, threads: int) -> Machine:
    """The machine with its clocks as they are now."""
    import torch

    cpu_mhz, gpu_mhz = None, None
    with suppress(OSError, ValueError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu_mhz = max(float(line.partition(":")[2]) for line in lines if line.startswith("cpu MHz"))
    if torch.device(device).type == "cuda":
        with suppress(Exception):  # needs a library of the driver's that is not everywhere
            gpu_mhz = float(torch.cuda.clock_rate(device))
    return replace(identity(device, threads), cpu_mhz=cpu_mhz, gpu_mhz=gpu_mhz)


def identity_key(device: str, threads: int, reference: str) -> str:
    """The key of a measurement: machine, code and the uncompressed model that cells are compared with."""
    return digest([identity(device, threads).to_json(), _code(), reference])[:16]


@cache
def _code() -> str:
    files = sorted(path for folder in CODE for path in folder.rglob("*") if path.suffix in CODE_SUFFIXES)
    return sha256(b"".join(path.read_bytes() for path in files)).hexdigest()


@cache
def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def available_bytes() -> int:
    """Memory that processes can have in all without swapping: what the machine has left, and no more than the group of
    processes, or a process, is granted."""
    import psutil  # comes with accelerate

    granted = [int(psutil.virtual_memory().available)]
    for limit in (resource.RLIMIT_AS, resource.RLIMIT_DATA):
        soft = resource.getrlimit(limit)[0]
        granted += [] if soft == resource.RLIM_INFINITY else [soft]
    for folder in _groups():
        with suppress(OSError, ValueError, KeyError):  # "max": no limit
            limit = int((folder / "memory.max").read_text())
            used = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
            granted.append(limit - int(used["anon"]))  # what is kept of files is given back when it is needed
    return max(0, min(granted))


def _groups() -> list[Path]:
    """The folders of the control groups (version 2) that this process is in, the outer ones too."""
    with suppress(OSError):
        for line in Path("/proc/self/cgroup").read_text().splitlines():
            if line.startswith("0::"):
                root = Path("/sys/fs/cgroup")
                own = root / line[3:].lstrip("/")
                return [folder for folder in (own, *own.parents) if folder == root or root in folder.parents]
    return []


def return_what_is_freed() -> None:
    """Have the memory of tensors that are let go of go back to the system at once. Where blocks come and go, a heap
    that keeps their memory grows by the holes between what stays. Of glibc; other allocators are left as they are."""
    with suppress(OSError, AttributeError):
        for setting in (M_MMAP_THRESHOLD, M_TRIM_THRESHOLD):
            ctypes.CDLL(None).mallopt(setting, RETURNED_BYTES)


def peak_process_bytes() -> int:
    """The most memory this process has held (Linux counts it in KiB)."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
