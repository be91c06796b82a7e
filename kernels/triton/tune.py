"""Find launch configurations for the GPU at hand and file them in launch.json.

    python -m kernels.triton.tune [--shapes 4096x4096,...] [--formats 4-bit,...] [--batches 1,16] [--seconds 480]

Every candidate is compiled, checked against the default's result and timed with weights that come from memory
(kernels.timing). What is faster than the default by more than noise is kept; a case that time ran out for keeps
what it had."""

from __future__ import annotations

import argparse
import copy
import itertools
import time
from collections.abc import Iterator
from functools import partial
from statistics import median

import torch
import triton

from kernels.formats.packed import PackedLinear
from kernels.synthetic import TYPICAL, random_layer
from kernels.timing import copies, in_succession, interleaved
from kernels.triton import fused, launch
from kernels.triton.decode import Form
from kernels.triton.view import view

SHAPES = ((28672, 8192), (11008, 4096), (4096, 4096))
NOISE = 0.98
ROUNDS = 15
DEVICE = "cuda"
# Last caches that copies of one layer take: nothing else runs in between, and a GPU's is not emptied in order.
CACHES = 4


def candidates(form: Form, batch: int) -> Iterator[launch.Launch]:
    """Tiles that give a thread 16 to 128 weights."""
    whole = triton.next_power_of_2(-(-form.columns // form.lanes))
    if batch == 1:
        for vectors, units, warps, splits in itertools.product(
            (1, 2, 4, 8, 16), (64, 128, 256, 512), (2, 4, 8), (1, 2)
        ):
            if (
                units <= whole
                and 16 <= vectors * units * form.lanes * form.dim / (32 * warps) <= 128
                and units >= 32 * warps
            ):
                yield launch.Launch("gemv", vectors, units, warps, 2, splits)
        return
    for rows, columns, warps, stages, splits in itertools.product(
        (64, 128), (32, 64, 128), (4, 8), (2, 4), (1, 2, 4, 8)
    ):
        if rows >= 16 * warps and columns >= 2 * form.lanes:
            yield launch.Launch("gemm", rows // form.dim, columns // form.lanes, warps, stages, splits)


def cold_layers(layer: PackedLinear) -> list[PackedLinear]:
    """Copies of the layer, so many that none is read from the cache when they take turns."""
    return [copy.deepcopy(layer) for _ in range(copies(layer.stored_bits().total / 8, DEVICE, CACHES))]


def best(layer: PackedLinear, batch: int, until: float) -> tuple[launch.Launch, float, float]:
    """The fastest configuration for fp16 inputs, its time and the default's, microseconds."""
    every = cold_layers(layer)
    x = torch.randn(batch, layer.in_features, device=DEVICE, dtype=torch.float16)
    form = view(layer).form
    default = launch.default(form, batch, torch.cuda.get_device_properties(0).multi_processor_count)
    expected = fused(view(every[0]), x, x, default)

    def microseconds(how: launch.Launch) -> float:
        call = in_succession([partial(fused, view(one), x, x, how) for one in every], DEVICE)
        return 1e6 * median(interleaved({"": call}, DEVICE, 0, ROUNDS, ROUNDS)[""]) / len(every)

    found, default_us = default, microseconds(default)
    found_us = NOISE * default_us
    for how in candidates(form, batch):
        if time.monotonic() > until:
            break
        try:
            result = fused(view(every[0]), x, x, how)
            assert torch.allclose(result, expected, rtol=1e-2, atol=1e-2 * expected.abs().max().item()), how
            took_us = microseconds(how)
        except triton.runtime.errors.OutOfResources:
            continue
        if took_us < found_us:
            found, found_us = how, took_us
    return found, min(found_us, default_us), default_us


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default=",".join(f"{rows}x{columns}" for rows, columns in SHAPES))
    parser.add_argument("--formats", default=",".join(TYPICAL))
    parser.add_argument("--batches", default="1,16")
    parser.add_argument("--seconds", type=float, default=480)
    asked = parser.parse_args()
    name, started = torch.cuda.get_device_name(), time.monotonic()
    shapes = [tuple(map(int, shape.split("x"))) for shape in asked.shapes.split(",")]
    cases = list(itertools.product(map(int, asked.batches.split(",")), shapes, asked.formats.split(",")))
    for number, (batch, (rows, columns), format_name) in enumerate(cases):
        left = started + asked.seconds - time.monotonic()
        if left <= 0:
            print(f"out of time: {len(cases) - number} of {len(cases)} cases keep what they have")
            break
        layer = random_layer(TYPICAL[format_name], rows, columns, bias=False).to(DEVICE)
        found, took_us, default_us = best(layer, batch, time.monotonic() + left / (len(cases) - number))
        case = f"{rows}x{columns} {format_name} batch {batch}"
        print(f"{case}: {took_us:.2f} us (default {default_us:.2f}) {found}", flush=True)
        launch.save(name, {launch.key(view(layer).form, batch): found})


if __name__ == "__main__":
    main()
