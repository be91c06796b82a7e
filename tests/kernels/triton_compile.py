"""Compiles for a Hopper GPU, without one, what products of these layers would launch: the interpreter takes more than
the compiler does.

python -m tests.kernels.triton_compile [every]      every: the whole correctness grid"""

from __future__ import annotations

import sys

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from kernels.synthetic import random_layer
from kernels.triton import product
from tests.kernels import triton_grid

LAYERS = {
    "2-bit zero": dict(format="uniform", bits=2, group=64, offset="zero"),
    "3-bit symmetric": dict(format="uniform", bits=3, group=128, offset="symmetric"),
    "4-bit minimum, ragged groups": dict(format="uniform", bits=4, group=20, offset="minimum"),
    "nf4": dict(format="codebook", dim=1, index_bits=4, block=64, scales="dynamic", table="nf"),
    "nf3, 3-bit scales, low rank": dict(
        format="codebook",
        dim=1,
        index_bits=3,
        block=64,
        scales="double",
        scale_bits=3,
        scale_group=16,
        scale_dtype="bfloat16",
        table="nf",
        rank=64,
    ),
    "4 x 256, low rank, row scales": dict(
        format="codebook", dim=4, index_bits=8, block=64, rank=20, adapter_bits=16, row_scales=True
    ),
    "trellis of 2 bits, rotated": dict(format="trellis", bits=2, dim=1, rotated=True, rank=20),
    "trellis of 2.5 bits": dict(format="trellis", bits=5, dim=2),
    "8 x 4096": dict(format="codebook", dim=8, index_bits=12, block=64, scales="half"),
}


class Hopper:
    """As much of a driver as compiling asks for."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def main() -> int:
    programs = []
    launch = JITFunction.run

    def compile_only(self, *args, grid, warmup, **options):
        programs.append(launch(self, *args, grid=grid, warmup=True, **options))

    triton.runtime.driver.set_active(Hopper())
    JITFunction.run = compile_only
    first, second = torch.float16, torch.bfloat16
    for name, spec in LAYERS.items():
        layer = random_layer(spec, 192, 4096, bias=True)
        first, second = second, first  # each program meets both, and the matrix units' one those of every layer
        for batch, dtype in ((1, first), (16, first), (16, second), (33, second)):
            programs.clear()
            product(layer, torch.zeros(batch, 4096, dtype=dtype))
            assert batch != 16 or any("wgmma" in program.asm["ptx"] for program in programs), name
    if sys.argv[1:] == ["every"]:
        for case in triton_grid.cases():
            triton_grid.run(
                case,
                random_layer(case.spec, *case.shape, bias=True),
                torch.zeros(case.batch, case.shape[1], dtype=case.dtype),
            )
    print("compiled")
    return 0


if __name__ == "__main__":
    sys.exit(main())
