"""Launch configurations: tile sizes, warps, pipeline stages and splits of a product.

`launch.json` beside this file holds, for each GPU by name, what the tuner (`python -m kernels.triton.tune`) measured to
be fastest there; shapes and GPUs that it does not know get defaults reasoned from how bytes travel (README.md)."""

from __future__ import annotations

import json
from dataclasses import astuple, dataclass
from functools import cache
from pathlib import Path

import torch
import triton

from kernels.triton.decode import Form

FILE = Path(__file__).with_name("launch.json")
RANKS = 4  # components of a low-rank part that one program multiplies
DEFAULT_CORES = 132  # streaming multiprocessors assumed where no GPU can be asked


@dataclass(frozen=True)
class Launch:
    """How one product is launched. `vectors` and `units` are the tile (powers of two), `splits` the shares of the
    columns wished for."""

    program: str  # gemv | gemm
    vectors: int
    units: int
    warps: int = 4
    stages: int = 3
    splits: int = 1


DECODE = Launch("decode", 8, 16)


def key(form: Form, batch: int) -> str:
    """What a configuration is filed under: the shape, how codes are stored, the rank, and the batch up to a power of
    two."""
    table = f"trellis{form.dim}" if form.window else f"table{form.dim}"
    codes = f"{form.bits}-bit " + (table if form.table else form.offset)
    return f"{form.rows}x{form.columns} {codes} g{form.group} r{form.rank} b{triton.next_power_of_2(batch)}"


def choose(form: Form, batch: int, dtype: torch.dtype, device: torch.device) -> Launch:
    """The configuration for inputs of this dtype on this device: what is on file, else the default."""
    name, cores = _device(device.index) if device.type == "cuda" else ("", DEFAULT_CORES)
    if dtype not in (torch.float16, torch.bfloat16):  # tensor cores would round it
        return default(form, 1, cores)
    tuned = tuned_launches().get(name, {}).get(key(form, batch))
    return Launch(*tuned) if tuned else default(form, batch, cores)


def default(form: Form, batch: int, cores: int = DEFAULT_CORES) -> Launch:
    """The configuration of a shape that was never tuned.

    One input: a warp reads 32 neighbouring units of a row, and a thread holds 64 weights, which is enough bytes in
    flight with the warps that fit on a core together. More: a tile of 64 rows and 64 columns for the tensor cores, its
    columns split until there are two programs to a core."""
    units = triton.next_power_of_2(-(-form.columns // form.lanes))
    if batch == 1:
        units = min(units, 128)
        per_thread = max(1, units // 128) * form.lanes * form.dim
        return Launch("gemv", max(1, 64 // per_thread), units, warps=4, stages=2)
    vectors, units = max(1, 64 // form.dim), max(16 // form.lanes, min(units, 64 // form.lanes))
    tiles = -(-form.rows // (vectors * form.dim))
    splits = min(max(1, 2 * cores // tiles), max(1, form.columns // 512))
    return Launch("gemm", vectors, units, warps=4, stages=3, splits=splits)


@cache
def _device(index: int) -> tuple[str, int]:
    properties = torch.cuda.get_device_properties(index)
    return properties.name, properties.multi_processor_count


@cache
def tuned_launches() -> dict[str, dict[str, list]]:
    """Launches by key, by name of the GPU, as launch.json has them."""
    return json.loads(FILE.read_text())


def save(name: str, found: dict[str, Launch]) -> None:
    """Add configurations measured on the GPU called `name` to the file; those of the same keys are replaced."""
    every = json.loads(FILE.read_text())
    every[name] = every.get(name, {}) | {k: list(astuple(launch)) for k, launch in found.items()}
    devices = []
    for device, launches in sorted(every.items()):
        lines = ",\n".join(f"  {json.dumps(k)}: {json.dumps(launch)}" for k, launch in sorted(launches.items()))
        devices.append(f"{json.dumps(device)}: {{\n{lines}\n}}")
    FILE.write_text("{\n" + ",\n".join(devices) + "\n}\n")
    tuned_launches.cache_clear()
