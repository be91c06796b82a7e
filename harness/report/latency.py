"""What a measurement of memory and latency (harness.measure.measurement) says in the leaderboard and in kernels.csv."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from harness.report.sheet import Shown

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


def best_bandwidth(benches: Iterable[Mapping[str, Any] | None]) -> float:
    """Bytes per second that the machine of these measurements can read. On a shared one the memory's speed halves and
    doubles from one minute to the next; the limit is the best it was ever seen at, the same for every row. 0 where
    nothing was measured."""
    return max((bench["bandwidth"] for bench in benches if bench), default=0.0)


def bench_values(bench: Mapping[str, Any], bandwidth: float) -> dict[str, Any]:
    """Row values by column. Times are medians over rounds, speed-ups medians of ratios inside rounds to the
    uncompressed model in the same runner (1 for that model itself)."""
    row: dict[str, Any] = {"kind": bench["kind"]}  # of what was timed; a score may be older than a kernel
    for batch, decode in bench["decode"].items():
        row[f"decode_ms_b{batch}"] = 1e3 * decode["seconds"]["median"]
        row[f"decode_speedup_b{batch}"] = decode["speed_up"]["median"] if "speed_up" in decode else 1.0
    first, prefill, memory = bench["decode"]["1"], bench["prefill"], bench["memory"]
    row["decode_tok_s_b1"] = 1 / first["seconds"]["median"]
    for end in ("p10", "p90"):
        row[f"decode_speedup_b1_{end}"] = first["speed_up"][end] if "speed_up" in first else 1.0
    row["roofline_pct_b1"] = 100 * bench["bytes_per_token"] / bandwidth / first["seconds"]["median"]
    row["prefill_tok_s"] = prefill["tokens"] / prefill["seconds"]["median"]
    row["prefill_speedup"] = prefill["speed_up"]["median"] if "speed_up" in prefill else 1.0
    row["resident_gib"] = memory["resident_bytes"] / 2**30
    row["peak_gib"] = memory.get("allocator_peak_bytes", memory["process_peak_bytes"]) / 2**30
    row["bandwidth_gb_s"], row["bench_threads"] = bandwidth / 1e9, bench["machine"]["threads"]
    return row


def kernel_rows(
    records: Sequence[Mapping[str, Any]], bandwidth: float, machine: Mapping[str, Any], model: str, row: str, cell: str
) -> list[dict[str, Any]]:
    """One line of kernels.csv per shape, configuration and batch size. `row` is the leaderboard's label."""
    found = []
    for record in records:
        time, speed = record["microseconds"], record.get("speed_up", {})
        found.append(
            {
                "model": model,
                "row": row,
                "cell": cell,
                "us": time["median"],
                "us_p10": time["p10"],
                "us_p90": time["p90"],
                "gb_s": record["gb_per_s"]["median"],
                "bandwidth_pct": 1e11 * record["gb_per_s"]["median"] / bandwidth,
                "vendor_us": record.get("vendor_microseconds", {}).get("median", ""),
                "speedup": speed.get("median", ""),
                "speedup_p10": speed.get("p10", ""),
                "speedup_p90": speed.get("p90", ""),
                "bandwidth_gb_s": bandwidth / 1e9,
                "processor": machine.get("gpu", machine["processor"]),
                "threads": machine["threads"],
                "rounds": time["rounds"],
                **{name: record[name] for name in KERNEL_COLUMNS if name in record},
            }
        )
    return found


def kernel_table(rows: Sequence[Mapping[str, Any]]) -> Shown:
    """What people see of kernels.csv."""
    header = ["model", "row", "shape", "configuration", "stored", "batch", "us", "GB/s", "% of bandwidth", "speed-up"]
    cells = [
        [
            row["model"],
            row["row"],
            f"{row['rows']}x{row['columns']}",
            row["config"],
            f"{row['stored_bpw']:.3f}",
            str(row["batch"]),
            f"{row['us']:.0f}",
            f"{row['gb_s']:.1f}",
            f"{row['bandwidth_pct']:.0f}",
            f"{row['speedup']:.2f} [{row['speedup_p10']:.2f}, {row['speedup_p90']:.2f}]"
            if row["speedup"] != ""
            else "",
        ]
        for row in rows
    ]
    return header, cells
