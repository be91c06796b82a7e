"""The correctness grid of the Triton kernels: every format by every program on ragged shapes, against an fp64 product
of the decoded weights.

    TRITON_INTERPRET=1 python -m tests.kernels.triton_grid          on a CPU, in Triton's interpreter
    TRITON_INTERPRET=1 python -m tests.kernels.triton_grid half     every other run: what the tests have time for
    python -m tests.kernels.triton_grid                             on a GPU

Needs torch and triton alone. Exit code 1 and a line for every failure. bf16 runs as fp16 in the interpreter, whose bf16
is wrong."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from kernels.formats.packed import PackedLinear
from kernels.synthetic import random_layer
from kernels.triton import fused, launch, product
from kernels.triton.view import view
from tests.kernels.served import ADDED, SCALAR, TRELLIS, UNIFORM, VECTOR

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
SPECS = UNIFORM + SCALAR + VECTOR + TRELLIS[1:5:2] + ADDED
SHAPES = [(96, 160), (65, 131), (7, 13), (101, 97), (1, 1), (66, 288)]
LIMITS = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 4e-3}  # relative, of the norm
# program, batch, dtype, shares of the columns; "product" is what a layer calls
RUNS = [
    ("product", 1, torch.float16, 0),
    ("gemv", 2, torch.float32, 2),
    ("gemm", 5, torch.bfloat16, 1),
    ("gemm", 17, torch.float16, 3),
    ("product", 33, torch.bfloat16, 0),
]


@dataclass(frozen=True)
class Case:
    spec: dict
    program: str
    batch: int
    dtype: torch.dtype
    splits: int
    shape: tuple[int, int]

    def __str__(self) -> str:
        name = "-".join(str(value) for value in self.spec.values())
        rows, columns = self.shape
        return f"{name} {rows}x{columns} {self.program} batch {self.batch} splits {self.splits} {self.dtype}"


def cases() -> Iterator[Case]:
    for number, spec in enumerate(SPECS):
        for step, (program, batch, dtype, splits) in enumerate(RUNS):
            if (number + step) % 2 and "half" in sys.argv:  # each program meets every other configuration
                continue
            shape = next(
                s
                for s in (SHAPES[(number + step + more) % len(SHAPES)] for more in range(6))
                if spec.get("rank", 0) < min(s)
            )
            yield Case(
                spec, program, batch, torch.float16 if INTERPRETED and dtype == torch.bfloat16 else dtype, splits, shape
            )


def run(case: Case, layer: PackedLinear, x: torch.Tensor) -> torch.Tensor:
    if case.program == "product":
        return product(layer, x)
    seen = view(layer)
    how = launch.Launch(case.program, 64 // seen.form.dim, 64 // seen.form.lanes, warps=4, stages=2, splits=case.splits)
    return fused(seen, x, seen.arranged(x), how)


def failure(case: Case) -> str:
    """What is wrong with a case, or nothing."""
    layer = random_layer(case.spec, *case.shape, bias=case.shape[0] % 2 == 1)
    x = torch.randn(case.batch, case.shape[1], generator=torch.Generator().manual_seed(case.batch)).to(case.dtype)
    expected = x.double() @ layer.decode().double().t() + (0 if layer.bias is None else layer.bias.double())
    layer, x = layer.to(DEVICE), x.to(DEVICE)
    found = run(case, layer, x)
    if found.shape != expected.shape or found.dtype != case.dtype:
        return f"{tuple(found.shape)} {found.dtype}"
    error = ((found.double().cpu() - expected).norm() / expected.norm()).item()
    if not error <= LIMITS[case.dtype]:
        return f"relative error {error:.2e}"
    if INTERPRETED:  # one program after the other
        return ""
    return "" if torch.equal(found, run(case, layer, x)) else "another result when repeated"


def main() -> int:
    torch.set_num_threads(1)
    started, failed, every = time.perf_counter(), 0, list(cases())
    for case in every:
        wrong = failure(case)
        if wrong:
            failed += 1
            print(f"FAILED {case}: {wrong}", flush=True)
    where = "interpreter" if INTERPRETED else torch.cuda.get_device_name()
    print(f"{len(every) - failed} of {len(every)} correct, {where}, {time.perf_counter() - started:.0f} s")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
