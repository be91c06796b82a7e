"""What a measurement of memory and latency (harness.measure.measurement) says in the leaderboard and in kernels.csv."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from harness.report.sheet import Row, Sheet, Value
from harness.store.results import Bench, Machine, ProductTime

COLUMNS = (
    "decode_ms_b1",
    "decode_tok_s_b1",
    "decode_speedup_b1",
    "decode_speedup_b1_p10",
    "decode_speedup_b1_p90",
    "roofline_pct_b1",
    "decode_ms_b4",
    "decode_speedup_b4",
    "decode_ms_b16",
    "decode_speedup_b16",
    "prefill_tok_s",
    "prefill_speedup",
    "resident_gib",
    "peak_gib",
    "bandwidth_gb_s",
    "bench_threads",
    "runner",
    "ppl_decode_gap",
)
END_TO_END_COLUMNS = (
    "model",
    "row",
    "stored_bpw",
    "kind",
    *(column for column in COLUMNS if column not in ("peak_gib", "ppl_decode_gap")),
    "bytes_per_token",
    "blocks_held",
    "processor",
)
KERNEL_COLUMNS = (
    "model",
    "row",
    "cell",
    "rows",
    "columns",
    "config",
    "kind",
    "stored_bpw",
    "layers",
    "batch",
    "us",
    "us_p10",
    "us_p90",
    "gb_s",
    "bandwidth_pct",
    "vendor_us",
    "speedup",
    "speedup_p10",
    "speedup_p90",
    "bandwidth_gb_s",
    "processor",
    "threads",
    "rounds",
)


def best_bandwidth(benches: Iterable[Bench | None]) -> float:
    """Bytes per second that the machine of these measurements can read. On a shared one the memory's speed halves and
    doubles from one minute to the next; the limit is the best it was ever seen at, the same for every row. 0 where
    nothing was measured."""
    return max((bench.bandwidth for bench in benches if bench), default=0.0)


def bench_values(bench: Bench, bandwidth: float) -> Row:
    """Row values by column. Times are medians over rounds, speed-ups medians of ratios inside rounds to the
    uncompressed model in the same runner (1 for that model itself)."""
    row: Row = {"kind": bench.kind}  # of what was timed; a score may be older than a kernel
    for batch, decode in bench.decode.items():
        row[f"decode_ms_b{batch}"] = 1e3 * decode.seconds.median
        row[f"decode_speedup_b{batch}"] = decode.speed_up.median if decode.speed_up else 1.0
    first, prefill = bench.decode["1"], bench.prefill
    row["decode_tok_s_b1"] = 1 / first.seconds.median
    row["decode_speedup_b1_p10"] = first.speed_up.p10 if first.speed_up else 1.0
    row["decode_speedup_b1_p90"] = first.speed_up.p90 if first.speed_up else 1.0
    row["roofline_pct_b1"] = 100 * bench.bytes_per_token / bandwidth / first.seconds.median
    row["prefill_tok_s"] = prefill.tokens / prefill.seconds.median
    row["prefill_speedup"] = prefill.speed_up.median if prefill.speed_up else 1.0
    row["resident_gib"] = bench.memory.resident_bytes / 2**30
    row["peak_gib"] = bench.memory.peak_bytes / 2**30
    row["bandwidth_gb_s"], row["bench_threads"] = bandwidth / 1e9, bench.machine.threads
    row["runner"] = bench.runner
    row["ppl_decode_gap"] = "" if bench.decode_gap is None else 100 * bench.decode_gap
    return row


def kernel_rows(
    times: Sequence[ProductTime], bandwidth: float, machine: Machine, model: str, row: str, cell: str
) -> list[Row]:
    """One line of kernels.csv per shape, configuration and batch size. `row` is the leaderboard's label."""
    found: list[Row] = []
    for time in times:
        speed_up, vendor = time.speed_up, time.vendor_microseconds
        found.append(
            {
                "model": model,
                "row": row,
                "cell": cell,
                "rows": time.rows,
                "columns": time.columns,
                "config": time.config,
                "kind": time.kind,
                "stored_bpw": time.stored_bpw,
                "layers": time.layers,
                "batch": time.batch,
                "us": time.microseconds.median,
                "us_p10": time.microseconds.p10,
                "us_p90": time.microseconds.p90,
                "gb_s": time.gb_per_s.median,
                "bandwidth_pct": 1e11 * time.gb_per_s.median / bandwidth,
                "vendor_us": vendor.median if vendor else "",
                "speedup": speed_up.median if speed_up else "",
                "speedup_p10": speed_up.p10 if speed_up else "",
                "speedup_p90": speed_up.p90 if speed_up else "",
                "bandwidth_gb_s": bandwidth / 1e9,
                "processor": machine.gpu or machine.processor,
                "threads": machine.threads,
                "rounds": time.microseconds.rounds,
            }
        )
    return found


def _ratio(row: Mapping[str, Value], column: str) -> str:
    """A median with its percentiles."""
    return f"{row[column]:.2f} [{row[f'{column}_p10']:.2f}, {row[f'{column}_p90']:.2f}]"


def kernel_sheet(rows: Sequence[Mapping[str, Value]]) -> Sheet:
    """What people see of kernels.csv."""
    header = ["model", "row", "shape", "configuration", "stored", "batch", "us", "GB/s", "% of bandwidth", "speed-up"]
    lines = [
        [
            str(row["model"]),
            str(row["row"]),
            f"{row['rows']}x{row['columns']}",
            str(row["config"]),
            f"{row['stored_bpw']:.3f}",
            str(row["batch"]),
            f"{row['us']:.0f}",
            f"{row['gb_s']:.1f}",
            f"{row['bandwidth_pct']:.0f}",
            _ratio(row, "speedup") if row["speedup"] != "" else "",
        ]
        for row in rows
    ]
    return Sheet(header, lines)


def end_to_end_sheet(rows: Sequence[Mapping[str, Value]]) -> Sheet:
    """What people see of end_to_end.csv."""
    header = [
        "model",
        "row",
        "stored",
        "runner",
        "resident GiB",
        "tok/s",
        "speed-up",
        "roofline %",
        "b4",
        "b16",
        "prompt tok/s",
    ]
    lines = [
        [
            str(row["model"]),
            str(row["row"]),
            f"{row['stored_bpw']:.3f}",
            str(row["runner"]),
            f"{row['resident_gib']:.3f}",
            f"{row['decode_tok_s_b1']:.1f}",
            _ratio(row, "decode_speedup_b1"),
            f"{row['roofline_pct_b1']:.0f}",
            f"{row['decode_speedup_b4']:.2f}",
            f"{row['decode_speedup_b16']:.2f}",
            f"{row['prefill_tok_s']:.0f}",
        ]
        for row in rows
    ]
    return Sheet(header, lines)
