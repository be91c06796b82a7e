"""The kernel table: time, bytes and speed-up of the fused products on the GPU at hand. Run by gpu_kernels.sh.

Every row is timed in turn with cuBLAS on the same shape in fp16 (and gemlite where it is installed), in CUDA graphs,
with weights that come from memory. `GB/s` counts what the layer stores, `%` is of the bandwidth of a copy, measured
first. Every product is checked first."""

from __future__ import annotations

import argparse
import sys
import time

import torch

from kernels.formats.packed import PackedLinear
from kernels.synthetic import TYPICAL, random_layer
from kernels.triton import product
from kernels.triton.timing import Replay, bandwidth, copies, in_turn, layers, stored_bytes
from kernels.triton.tune import SHAPES

ROUNDS = 50
LIMIT = 2e-3  # relative error of the norm, fp16 inputs


def cublas(rows: int, columns: int, x: torch.Tensor) -> Replay:
    weights = [
        torch.randn(rows, columns, device="cuda", dtype=torch.float16) for _ in range(copies(2 * rows * columns))
    ]
    return Replay([lambda one=one: torch.nn.functional.linear(x, one) for one in weights])


def gemlite(spec: dict, rows: int, columns: int, x: torch.Tensor) -> Replay | None:
    """gemlite's product of a uniform layer of these bits and groups, where it is installed."""
    if spec["format"] != "uniform" or spec["bits"] == 3:
        return None
    try:
        from gemlite.core import DType, GemLiteLinear
    except ImportError:
        return None
    bits, group = spec["bits"], spec["group"]
    every = []
    for _ in range(copies(rows * columns * bits // 8)):
        linear = GemLiteLinear(
            bits,
            group_size=group,
            in_features=columns,
            out_features=rows,
            input_dtype=DType.FP16,
            output_dtype=DType.FP16,
        )
        codes = torch.randint(0, 2**bits, (rows, columns), device="cuda", dtype=torch.uint8)
        scales = torch.rand(rows, columns // group, device="cuda", dtype=torch.float16)
        linear.pack(codes, scales, torch.full_like(scales, 2 ** (bits - 1)), None)
        every.append(linear)
    return Replay([lambda one=one: one(x) for one in every])


def relative_error(layer: PackedLinear, x: torch.Tensor) -> float:
    """Of the norm, against an fp32 product of the decoded weights."""
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
    copy_bandwidth = bandwidth()
    print(f"{torch.cuda.get_device_name()}, copy {copy_bandwidth / 1e9:.0f} GB/s\n")
    print("| shape | batch | format | bits | us | GB/s | % | cuBLAS us | speed-up | gemlite us | relative error |")
    print("|---|---|---|---|---|---|---|---|---|---|---|")
    for batch in map(int, asked.batches.split(",")):
        for rows, columns in SHAPES:
            x = torch.randn(batch, columns, device="cuda", dtype=torch.float16)
            other = cublas(rows, columns, x)
            for name, spec in TYPICAL.items():
                if time.monotonic() - started > asked.seconds:
                    print(f"| {rows}x{columns} | {batch} | {name} | left out: out of time |")
                    continue
                layer = random_layer(spec, rows, columns, bias=False).to("cuda")
                error = relative_error(layer, x)
                wrong += not error <= LIMIT
                ours = Replay([lambda one=one, x=x: product(one, x) for one in layers(layer)])
                third = gemlite(spec, rows, columns, x)
                times_us = in_turn([ours, other] + ([third] if third else []), ROUNDS)
                rate = stored_bytes(layer) / (1e-6 * times_us[0])
                cells = [
                    f"{rows}x{columns}",
                    batch,
                    name,
                    f"{8 * stored_bytes(layer) / (rows * columns):.3f}",
                    f"{times_us[0]:.2f}",
                    f"{rate / 1e9:.0f}",
                    f"{100 * rate / copy_bandwidth:.0f}",
                    f"{times_us[1]:.2f}",
                    f"{times_us[1] / times_us[0]:.2f}",
                    f"{times_us[2]:.2f}" if third else "",
                    f"{error:.1e}",
                ]
                print("| " + " | ".join(map(str, cells)) + " |", flush=True)
            del other
    if wrong:
        print(f"\n{wrong} products are wrong")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
