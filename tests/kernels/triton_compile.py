"""Compiles the Triton programs for a Hopper GPU, without one: what they ask of the compiler, and what it makes of it.

python -m tests.kernels.triton_compile"""

from __future__ import annotations

import sys

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from kernels.triton import FINISH_RANKS, FINISH_ROWS, launch, programs
from kernels.triton.decode import Stored
from kernels.triton.layer import view
from tests.kernels.layers import random_layer

HOPPER = GPUTarget("cuda", 90, 32)
TYPES = {torch.int32: "i32", torch.uint8: "u8", torch.int8: "i8", torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}
ROWS, COLUMNS = 192, 4096
LAYERS = {
    "2-bit zero": dict(format="uniform", bits=2, group=64, offset="zero"),
    "3-bit symmetric": dict(format="uniform", bits=3, group=128, offset="symmetric"),
    "4-bit minimum, ragged groups": dict(format="uniform", bits=4, group=20, offset="minimum"),
    "nf4": dict(format="codebook", dim=1, index_bits=4, block=64, scales="dynamic", table="nf"),
    "nf3, 3-bit scales, low rank": dict(
        format="codebook", dim=1, index_bits=3, block=64, scales="double", scale_bits=3, scale_group=16, scale_dtype="bfloat16", table="nf",
        rank=64,
    ),
    "4 x 256, low rank, row scales": dict(format="codebook", dim=4, index_bits=8, block=64, rank=20, adapter_bits=16, row_scales=True),
    "8 x 4096": dict(format="codebook", dim=8, index_bits=12, block=64, scales="half"),
}  # fmt: skip


def compiled(spec: dict, program: str, dtype: torch.dtype):
    """`program` for a layer of `spec` as `kernels.triton.fused` would launch it by default."""
    seen = view(random_layer(spec, ROWS, COLUMNS, bias=True))
    form, batch = seen.form, 1 if program == "gemv" else 16
    how = launch.DECODE if program == "decode" else launch.default(form, batch)
    units = COLUMNS // form.lanes
    per_split = -(-units // (how.splits * how.units)) * how.units
    staged = per_split < units or form.rank > 0
    constants = dict(
        F=form, B=batch, V=how.vectors, U=how.units, PER_SPLIT=per_split, FINISH=not staged, SPLITS=how.splits, ROWS=FINISH_ROWS,
        RANKS=FINISH_RANKS if program == "finish" else launch.RANKS,
    )  # fmt: skip
    pointer = f"*{TYPES[dtype]}"
    out = "*fp32" if staged and program.startswith("gem") else pointer
    arguments = dict(x=pointer, ordered_x=pointer, out=out, workspace="*fp32", batch="i32", first="i32", last="i32")
    arguments["stored"] = Stored(
        *("constexpr" if value is None else "i32" if isinstance(value, int) else f"*{TYPES[value.dtype]}" for value in seen.stored)
    )
    names = getattr(programs, program).arg_names
    fixed = {(names.index(name),): value for name, value in constants.items() if name in names}
    fixed |= {(names.index("stored"), place): None for place, value in enumerate(seen.stored) if value is None}
    pointers = [(names.index("stored"), place) for place, value in enumerate(seen.stored) if isinstance(value, torch.Tensor)]
    pointers += [(place,) for place, name in enumerate(names) if str(arguments.get(name, "")).startswith("*")]
    signature = {name: "constexpr" if name in constants else arguments[name] for name in names}
    source = ASTSource(getattr(programs, program), signature, fixed, {path: [["tt.divisibility", 16]] for path in pointers})
    return triton.compile(source, target=HOPPER, options=dict(num_warps=how.warps, num_stages=how.stages))


def main() -> int:
    count = 0
    for dtype in (torch.float16, torch.bfloat16):
        for name, spec in LAYERS.items():
            for program in ("gemv", "gemm", "finish", "decode"):
                found = compiled(spec, program, dtype)
                assert "ld.local" not in found.asm["ptx"] and len(found.asm["cubin"]) > 0, (name, program)
                if program == "gemm":
                    assert "wgmma" in found.asm["ptx"], name
                count += 1
    print(f"{count} programs compiled")
    return 0


if __name__ == "__main__":
    sys.exit(main())
