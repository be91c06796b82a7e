"""Boards for tests of the report: six cells that a real run wrote (its command is in run.json), as they are, and many
more of them under other names."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from harness.report.board import Board, stored_board
from harness.report.rows import CellReport
from harness.store.results import Bench, Machine, Memory, ProductTime, PromptTiming, Spread, Timing

STORED = Path(__file__).parent / "stored"
HOSTILE = '</script><script>alert(1)</script><img src=x onerror="alert(2)">'


def stored() -> Board:
    return stored_board([STORED])


def timed() -> Board:
    """With a measurement of every cell."""
    return _with_reports({key: replace(report, bench=bench()) for key, report in stored().reports.items()})


def single() -> Board:
    """The reference alone."""
    board = stored()
    return _with_reports({board.reference: board.reports[board.reference]})


def empty() -> Board:
    return _with_reports({})


def many(count: int, layers: int = 210) -> Board:
    """`count` cells with `layers` matrices each."""
    board = timed()
    models = [report for key, report in board.reports.items() if key != board.reference]
    reports = {board.reference: board.reports[board.reference]}
    for index in range(count - 1):
        report = models[index % len(models)]
        assert report.artifact
        kept = list(report.artifact.layers.values())
        blown = {f"model.layers.{n // 7}.{kept[n % 7].role}": kept[n % len(kept)] for n in range(layers)}
        key = f"{index:016x}"
        row = report.row | {"cell": key, "budget_bpw": f"{2 + index % 25 / 10:.2f}", "seed": index // 100}
        reports[key] = replace(report, row=row, artifact=replace(report.artifact, layers=blown))
    return _with_reports(reports)


def altered(**values: Any) -> Board:
    """With other values in the row of every cell but the reference."""
    board = stored()
    rows = {key: report.row if key == board.reference else report.row | values for key, report in board.reports.items()}
    return _with_reports({key: replace(board.reports[key], row=row) for key, row in rows.items()})


def _with_reports(reports: dict[str, CellReport]) -> Board:
    return replace(stored(), reports=reports)


def bench() -> Bench:
    spread = Spread(0.01, 0.009, 0.011, 7)
    products = tuple(
        ProductTime(576, 576, "uniform bits=3", "fused", 2, 3.25, batch, spread, spread, spread, spread)
        for batch in (1, 16)
    )
    return Bench(
        machine=Machine("a processor", 2, "2.13.0", 2),
        dtype="float32",
        context=64,
        kind="fused",
        memory=Memory(1 << 28, 1 << 30, 1 << 29),
        decode_on_load_s=0.0,
        bandwidth=2e10,
        bytes_per_token=1 << 27,
        decode={batch: Timing(spread, spread, spread) for batch in ("1", "4", "16")},
        prefill=PromptTiming(spread, spread, spread, tokens=512),
        kernels=products,
        runner="native",
    )
