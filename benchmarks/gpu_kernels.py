"""The kernel table: time, bytes and speed-up of the fused products on the GPU at hand. Run by gpu_kernels.sh.

Every row is timed in turn with cuBLAS on the same shape in fp16 (and gemlite where it is installed), in CUDA graphs,
with weights that come from memory. `GB/s` counts what the layer stores, `%` is of the bandwidth of the memory (the best
of copies and reads), measured first. Every product is checked first."""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import dataclass
from functools import partial
from statistics import median

import torch

from kernels.formats.packed import PackedLinear
from kernels.synthetic import TYPICAL, random_layer
from kernels.timing import Call, bandwidth, copies, in_succession, interleaved, speed_up
from kernels.triton import product
from kernels.triton.tune import CACHES, DEVICE, SHAPES, cold_layers

ROUNDS = 50
LIMIT = 2e-3  # relative error of the norm, fp16 inputs


@dataclass(frozen=True)
class Contestant:
    """One product on each of so many copies of a weight."""

    call: Call
    count: int


def contestant(calls: list[Call]) -> Contestant:
    return Contestant(in_succession(calls, DEVICE), len(calls))


def cublas(rows: int, columns: int, x: torch.Tensor) -> Contestant:
    """The vendor's product of fp16 weights."""
    count = copies(2 * rows * columns, DEVICE, CACHES)
    weights = [torch.randn(rows, columns, device=DEVICE, dtype=torch.float16) for _ in range(count)]
    return contestant([partial(torch.nn.functional.linear, x, one) for one in weights])


def gemlite(spec: dict, rows: int, columns: int, x: torch.Tensor) -> Contestant | None:
    """gemlite's product of a uniform layer of these bits and groups, where it is installed."""
    if spec["format"] != "uniform" or spec["bits"] == 3:
        return None
    try:
        from gemlite.core import DType, GemLiteLinear
    except ImportError:
        return None
    bits, group = spec["bits"], spec["group"]
    every = []
    for _ in range(copies(rows * columns * bits / 8, DEVICE, CACHES)):
        linear = GemLiteLinear(
            bits,
            group_size=group,
            in_features=columns,
            out_features=rows,
            input_dtype=DType.FP16,
            output_dtype=DType.FP16,
        )
        codes = torch.randint(0, 2**bits, (rows, columns), device=DEVICE, dtype=torch.uint8)
        scales = torch.rand(rows, columns // group, device=DEVICE, dtype=torch.float16)
        linear.pack(codes, scales, torch.full_like(scales, 2 ** (bits - 1)), None)
        every.append(linear)
    return contestant([partial(one, x) for one in every])


def relative_error(layer: PackedLinear, x: torch.Tensor) -> float:
    """The error of the product against that of the decoded weights in fp32, relative to the norm."""
    expected = x.float() @ layer.decode().t()
    return ((product(layer, x).float() - expected).norm() / expected.norm()).item()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", default="1,4,16")
    parser.add_argument(
        "--seconds", type=float, default=240, help="rows that would begin later are left out, and said to be"
    )
    asked = parser.parse_args()
    torch.backends.cuda.matmul.allow_tf32 = False
    started, wrong = time.monotonic(), 0
    fastest = bandwidth(DEVICE)
    print(f"{torch.cuda.get_device_name()}, memory {fastest / 1e9:.0f} GB/s\n")
    print("| shape | batch | format | bits | us | GB/s | % | cuBLAS us | speed-up | gemlite us | relative error |")
    print("|---|---|---|---|---|---|---|---|---|---|---|")
    for batch in map(int, asked.batches.split(",")):
        for rows, columns in SHAPES:
            x = torch.randn(batch, columns, device=DEVICE, dtype=torch.float16)
            other = cublas(rows, columns, x)
            for name, spec in TYPICAL.items():
                if time.monotonic() - started > asked.seconds:
                    print(f"| {rows}x{columns} | {batch} | {name} | left out: out of time |")
                    continue
                layer = random_layer(spec, rows, columns, bias=False).to(DEVICE)
                error = relative_error(layer, x)
                wrong += not error <= LIMIT
                contestants = {"ours": contestant([partial(product, one, x) for one in cold_layers(layer)])}
                contestants["cublas"] = other
                if third := gemlite(spec, rows, columns, x):
                    contestants["gemlite"] = third
                calls = {name: one.call for name, one in contestants.items()}
                taken = interleaved(calls, DEVICE, 0, ROUNDS, ROUNDS)
                each_us = {name: [1e6 * s / one.count for s in taken[name]] for name, one in contestants.items()}
                times_us = {name: median(values) for name, values in each_us.items()}
                stored = layer.stored_bits().total
                rate = stored / 8 / (1e-6 * times_us["ours"])
                cells = [
                    f"{rows}x{columns}",
                    batch,
                    name,
                    f"{stored / (rows * columns):.3f}",
                    f"{times_us['ours']:.2f}",
                    f"{rate / 1e9:.0f}",
                    f"{100 * rate / fastest:.0f}",
                    f"{times_us['cublas']:.2f}",
                    f"{speed_up(each_us['ours'], each_us['cublas'])['median']:.2f}",
                    f"{times_us['gemlite']:.2f}" if third else "",
                    f"{error:.1e}",
                ]
                print("| " + " | ".join(map(str, cells)) + " |", flush=True)
            del other
    if wrong:
        print(f"\n{wrong} products are wrong")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
