"""The kernel table of a CPU: fused products of one shape in every typical format, in turn with that of 16-bit
weights.

    python benchmarks/cpu_kernels.py [--shape 4096x4096] [--threads 2] [--seconds 20]

Weights have left the last cache before they are read again, and nothing else of ours runs meanwhile; `speed-up` is the
median of ratios inside rounds, with tenth and ninetieth percentile. Lines are those of kernels/cpu/README.md."""

from __future__ import annotations

import argparse

import torch

from harness.measure import machine
from harness.measure.layers import BATCHES, product_times, random_group, vendor_group
from harness.report.sheet import Sheet
from kernels import timing
from kernels.synthetic import TYPICAL

FORMATS = TYPICAL | {
    "8-bit": dict(format="uniform", bits=8, group=128, offset="symmetric"),
    "3-bit, columns permuted": dict(format="uniform", bits=3, group=128, offset="symmetric", permuted=True),
    "3-bit, groups of 40": dict(format="uniform", bits=3, group=40, offset="zero"),
    "2x16 (2 bits)": dict(format="codebook", dim=2, index_bits=4, block=64),
    "8x256 (1 bit)": dict(format="codebook", dim=8, index_bits=8, block=64),
    "4x4096 (3 bits)": dict(format="codebook", dim=4, index_bits=12, block=64),
    "trellis, 3 bits": dict(format="trellis", bits=3, dim=1, window=12, rotated=True),
    "trellis, 3.5 bits": dict(format="trellis", bits=7, dim=2, window=12, rotated=True),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="4096x4096", help="rows x columns")
    parser.add_argument("--threads", type=int, default=machine.cores())
    parser.add_argument("--seconds", type=float, default=20, help="of rounds, for every batch size")
    arguments = parser.parse_args()
    rows, columns = map(int, arguments.shape.split("x"))
    torch.set_num_threads(arguments.threads)
    groups = [random_group(spec, rows, columns, "cpu") for spec in FORMATS.values()]
    vendor = {(rows, columns): vendor_group(rows, columns, "cpu", torch.float32)}
    with machine.quiet(lambda: print("waiting until nothing else of ours runs on this machine")):
        before = timing.bandwidth("cpu")
        records = product_times(groups, vendor, "cpu", torch.float32, arguments.seconds)
        bandwidth = max(before, timing.bandwidth("cpu"))
    processor = machine.identity("cpu", arguments.threads).processor
    print(f"{rows}x{columns}, {processor}, {arguments.threads} threads, {bandwidth / 1e9:.0f} GB/s; 16 bits take")
    for batch, record in zip(BATCHES, records[:: len(groups)], strict=True):
        assert record.vendor_microseconds is not None
        print(f"* {record.vendor_microseconds.median:.0f} us for {batch} inputs at once")
    header = [
        "format",
        "stored bits",
        "us",
        "GB/s",
        "% of bandwidth",
        *(f"speed-up, {batch} at once" for batch in BATCHES),
    ]
    cells = []
    for index, name in enumerate(FORMATS):
        first, *_ = every = records[index :: len(groups)]
        rate = first.gb_per_s.median
        time = [f"{first.microseconds.median:.0f}", f"{rate:.1f}", f"{1e11 * rate / bandwidth:.0f}"]
        ratios = [f"{s.median:.1f} [{s.p10:.1f}, {s.p90:.1f}]" for s in (record.speed_up for record in every) if s]
        cells.append([name, f"{first.stored_bpw:.3f}", *time, *ratios])
    print("\n" + Sheet(header, cells).markdown())


if __name__ == "__main__":
    main()
