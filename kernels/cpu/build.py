"""Compiles fused.cpp (with its headers) and viterbi.cpp once with the system's compiler and loads them: no torch
headers, no build step at installation.

A library is cached under a name made of the source, the compiler and the instruction set. Without a compiler, or on a
CPU with neither AVX-512 nor AVX2, `library()` is None after one warning, and products take the reference path. `search`
is written for any CPU; without a compiler it is None, and trellises are searched by torch."""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
import warnings
from functools import cache
from pathlib import Path

SOURCE = Path(__file__).with_name("fused.cpp")
SEARCH = Path(__file__).with_name("viterbi.cpp")
MATRIX = Path(__file__).with_name("parts.cpp")
WIDE = ("avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512vbmi", "avx512vnni", "avx2", "fma", "f16c", "bmi2")
NARROW = ("avx2", "fma", "f16c", "bmi2")
TILES = ("amx_tile", "amx_bf16", "avx512bf16", "avx512f", "avx512bw", "avx512vl", "avx512dq")
REQUESTS = {"avx512": WIDE, "avx2": NARROW, "none": ()}

log = logging.getLogger("harness.kernels")  # one logger for the whole project, whatever this package is called


@cache
def library() -> ctypes.CDLL | None:
    """The compiled kernels; None, after a warning with the reason, where they cannot be had."""
    try:
        return _load(_built(SOURCE, _instructions(), _compiler(), "-fopenmp"))
    except OSError as error:  # RuntimeError of ours is one line already
        reason = f"the compiled kernel cannot be loaded ({error})"
    except RuntimeError as error:
        reason = str(error)
    warnings.warn(f"no fused CPU kernels: {reason}; layers are decoded by torch, which is slow", stacklevel=2)
    return None


@cache
def search() -> ctypes.CDLL | None:
    """The compiled search for the best path through a trellis; None, after a warning, where it cannot be had. It gives
    what torch gives, bit for bit (methods.codecs.trellis), a hundred times as fast, and is no kernel of a product's:
    HARNESS_CPU_KERNELS says nothing of it."""
    try:
        instructions = next((wanted for wanted in (WIDE, NARROW) if _flags().issuperset(wanted)), ())
        loaded = ctypes.CDLL(str(_built(SEARCH, instructions, _compiler(), "-ffp-contract=off")))
    except (OSError, RuntimeError) as error:
        warnings.warn(f"no compiled trellis search: {error}; torch searches, which takes hours", stacklevel=2)
        return None
    pointer, number = ctypes.c_void_p, ctypes.c_int64
    loaded.viterbi.argtypes = [pointer, pointer, *[number] * 4, *[pointer] * 4]
    loaded.viterbi.restype = None
    return loaded


@cache
def matrix_unit() -> ctypes.CDLL | None:
    """The compiled products of many inputs on a matrix unit; None where this machine has none, its system gives it to
    nobody, the compiler does not know it, or HARNESS_CPU_KERNELS asks for less: torch's product does the same."""
    if requested_instructions() is not None or not _flags().issuperset(TILES):
        return None
    try:
        loaded = ctypes.CDLL(str(_built(MATRIX, TILES, _compiler(), "-fopenmp")))
    except (OSError, RuntimeError) as error:
        log.warning("the matrix unit of this CPU is not used: %s", error)
        return None
    pointer, number = ctypes.c_void_p, ctypes.c_int64
    loaded.packed.argtypes = [number, number, number]
    loaded.count_parts.argtypes = [pointer, number, number, number]
    loaded.pack_all_inputs.argtypes = [pointer, number, number, pointer, number]
    loaded.pack_all_weights.argtypes = [pointer, number, number, number, pointer, number]
    loaded.multiply.argtypes = [pointer, number, number, pointer, number, number, pointer, number, number]
    loaded.packed.restype = loaded.count_parts.restype = loaded.ready.restype = number
    loaded.pack_all_inputs.restype = loaded.pack_all_weights.restype = loaded.multiply.restype = None
    return loaded if loaded.ready() else None


def requested_instructions() -> tuple[str, ...] | None:
    """The set that HARNESS_CPU_KERNELS asks for ("avx2", to try the narrow kernels on a wide machine; empty for
    "none"); None where nothing is asked for. Raises ValueError for a word it does not know."""
    wanted = os.environ.get("HARNESS_CPU_KERNELS")
    if not wanted:
        return None
    if wanted not in REQUESTS:
        raise ValueError(f"HARNESS_CPU_KERNELS={wanted} is not known: write {', '.join(REQUESTS)}, or nothing")
    return REQUESTS[wanted]


def _instructions() -> tuple[str, ...]:
    """The widest set of instructions that the source is written for and this machine has."""
    requested = requested_instructions()
    if requested == ():
        raise RuntimeError("switched off by HARNESS_CPU_KERNELS=none")
    if platform.machine() not in ("x86_64", "AMD64"):
        raise RuntimeError(f"they are written for x86-64, this is {platform.machine()}")
    if not (flags := _flags()):
        raise RuntimeError("the instructions of this CPU are not known")
    for wanted_set in (WIDE, NARROW) if requested is None else (requested,):
        if flags.issuperset(wanted_set):
            return wanted_set
    raise RuntimeError("this CPU lacks AVX2, FMA or F16C" if requested in (None, NARROW) else "this CPU lacks AVX-512")


def _flags() -> set[str]:
    """The instructions of this CPU, where the system tells."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return set(next(line for line in lines if line.startswith("flags")).replace("avx512_", "avx512").split())
    except (OSError, StopIteration):
        return set()


def _compiler() -> str:
    for name in filter(None, (os.environ.get("CXX"), "c++", "g++", "clang++")):
        if path := shutil.which(name):
            return path
    raise RuntimeError("no C++ compiler (install g++, or set CXX)")


def _built(source: Path, instructions: tuple[str, ...], compiler: str, *flags: str) -> Path:
    """The library, whose name ends with the checksum of its own bytes: one that is no longer what was compiled, or that
    others may write to, is not loaded but compiled again."""
    chosen = (f"-m{name.replace('_', '-')}" for name in instructions)
    command = [compiler, "-O3", "-std=c++17", *chosen, *flags, "-shared", "-fPIC"]
    sources = b"".join(path.read_bytes() for path in (source, *sorted(source.parent.glob("*.h"))))
    key = hashlib.sha256(sources + " ".join(command).encode()).hexdigest()[:24]
    root = os.environ.get("HARNESS_CACHE")
    folder = (Path(root).expanduser() if root else Path.home() / ".cache" / "ptq-harness") / "kernels"
    folder.parent.mkdir(parents=True, exist_ok=True)
    folder.mkdir(mode=0o700, exist_ok=True)  # whatever the umask lets a group do
    if not _ours_alone(folder):
        raise RuntimeError(f"{folder} belongs to, or can be written by, others: make it yours alone (chmod go-w)")
    for path in sorted(folder.glob(f"{key}-*.so")):
        if _ours_alone(path) and path.stem == f"{key}-{_sha256(path)}":
            return path
        log.warning("%s is damaged, or others may write to it; it is compiled again", path)
        path.unlink(missing_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        output = Path(scratch) / "kernels.so"
        done = subprocess.run([*command, str(source), "-o", str(output)], capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{compiler} failed: {(done.stderr.strip().splitlines() or ['no message'])[0]}")
        output.chmod(0o700)
        path = folder / f"{key}-{_sha256(output)}.so"
        os.replace(output, path)  # whole or absent, whoever else is compiling it
    return path


def _ours_alone(path: Path) -> bool:
    stat = path.stat()
    return stat.st_uid in (os.getuid(), 0) and not stat.st_mode & 0o022


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:24]


def _load(path: Path) -> ctypes.CDLL:
    loaded = ctypes.CDLL(str(path))
    pointer, number = ctypes.c_void_p, ctypes.c_int64
    loaded.product.argtypes = [pointer, pointer, number, pointer, number]
    loaded.decode.argtypes = [pointer, number, number, pointer, number]
    loaded.turn.argtypes = [pointer, pointer, number, pointer, number]
    loaded.step.argtypes = [pointer, pointer, number, number, pointer, pointer, number]
    loaded.compare.argtypes = [pointer, pointer, number, number, pointer, number]
    for function in (loaded.product, loaded.decode, loaded.turn, loaded.step, loaded.compare):
        function.restype = None
    return loaded
