"""`report.html`: one file that needs no network, made of a board alone.

The script that draws is that of the installed vl-convert (Vega, Vega-Lite and vega-embed, 0.9 MB), inlined once; data
are inlined once, as columns, and pictures are specifications that name them (harness.report.page.figures). Whatever
comes from outside (names, reasons, notes) is data or escaped text, never markup, and a policy in the page forbids it to
load anything."""

from __future__ import annotations

import html
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from fractions import Fraction
from functools import cache
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import Any

from harness.data.files import cache_dir, write_text
from harness.data.sealed import believed, read_sealed, write_sealed
from harness.data.tasks import Task
from harness.report.board import Board
from harness.report.page import contents, figures
from harness.report.page.markup import cards, provenance
from harness.report.page.verdict import Verdict, headlines, verdicts
from harness.report.sheet import HEAD, TAIL, Row

SHOWN = ("label", "track", "kind", "status", "stored_bpw")  # and, of each protocol, perplexity, rank, divergence
SHOWN_BEHIND = ("acc_average", "retention_average", "resident_gib", "decode_ms_b1", "decode_speedup_b1", "compress_s")
TEXT = (
    "label",
    "method",
    "variant",
    "track",
    "kind",
    "status",
    "reason",
    "model",
    "allocate",
    "device",
    "cell",
    "runner",
)
TITLES = HEAD | TAIL | {"label": "row", "acc_average": "mean acc", "retention_average": "retention"}


def write_page(board: Board, rows: Sequence[Row], means: Sequence[Row], folder: Path) -> Path:
    """Write report.html. `rows` as the leaderboard has them, `means` those over seeds where there are several."""
    path = folder / "report.html"
    write_text(path, page_of(board, rows, means))
    return path


def page_of(board: Board, rows: Sequence[Row], means: Sequence[Row]) -> str:
    """The page as text."""
    lines = contents.page_rows(rows)
    found = verdicts(means or lines, board.protocols)
    model = str(rows[0]["model"]) if rows else "no model"
    note = str(rows[0]["model_note"]) if rows else ""
    values = {
        "title": html.escape(f"{model}: quantisation methods at equal stored bits"),
        "model": html.escape(model),
        "count": str(len(rows)),
        "headlines": "\n".join(f'<p class="headline">{html.escape(line)}.</p>' for line in headlines(found)),
        "note": f'<p class="note">{html.escape(note)}.</p>' if note else "",
        "verdicts": "\n".join(cards(found)) or "<p>No row has a budget and numbers.</p>",
        "provenance": provenance(board),
        "data": _safe_json(_data(board, lines, found)),
        "css": _asset("page.css"),
        "script": _asset("page.js"),
        "library": _library(),
    }
    return Template(_asset("page.html")).substitute(values)


def _data(board: Board, rows: contents.Lines, found: Sequence[Verdict]) -> dict[str, Any]:
    series = figures.series_of(row for row in rows if row["budget"])
    data = {
        "rows": rows,
        "layers": contents.layers(board, rows),
        "parts": contents.parts(board, rows),
        "tokens": contents.tokens(board, rows),
        "positions": contents.positions(board, rows),
        "training": contents.training(board, rows),
        "kernels": contents.kernels(board),
        "accuracies": contents.accuracies(board, rows),
    }
    roles = list(dict.fromkeys(line["role"] for line in data["layers"]))
    every = figures.series_of(rows)
    return {
        "data": {name: contents.columnar(lines) for name, lines in data.items()},
        "themes": {name: figures.theme(name) for name in ("light", "dark")},
        "colours": {row["method"]: figures.colour(row["method"]) for row in rows},
        "protocols": [name for name in board.protocols if any(line["protocol"] == name for line in data["tokens"])],
        "pareto": [{"quality": asdict(q), "against": asdict(a), "spec": s} for q, a, s in paretos(board, rows)],
        "table": _table(board, rows),
        "packed": list(dict.fromkeys(line["cell"] for line in data["layers"])),
        "best": _best(rows, found),
        "layers": {
            "quantities": {name: title for name, (title, _) in figures.LAYER_QUANTITIES.items()},
            "specs": {name: figures.heat_map(roles, name) for name in figures.LAYER_QUANTITIES},
        },
        "specs": {
            "parts": figures.stored_parts(len({line["cell"] for line in data["parts"]})),
            "tokens": figures.histogram(series),
            "positions": figures.over_positions(series),
            "kernels": figures.roofline(every, board.bandwidth / 1e9),
            "training": figures.training(every),
        },
        "tasks": [_task(board, rows, data["accuracies"], every, task) for task in board.tasks],
    }


def _task(
    board: Board, rows: contents.Lines, accuracies: contents.Lines, series: Mapping[str, str], task: Task
) -> dict[str, Any]:
    lines = sum(line["task"] == task.name for line in accuracies)
    base = _of_reference(board, rows, f"{task.headline}_{task.name}")
    return {"name": task.name, "spec": figures.accuracies(series, lines, base)}


def paretos(board: Board, rows: contents.Lines) -> list[tuple[figures.Measure, figures.Measure, figures.Spec]]:
    """(quality, against, specification) of every pair of which a row with a budget has both."""
    compared = [row for row in rows if row["budget"]]
    found = []
    for quality in figures.qualities(board.protocols, bool(board.tasks)):
        for against in figures.AGAINST:
            both = [row for row in compared if quality.column in row and against.column in row]
            if both:
                # Of a divergence the reference's own is a noise floor, decades below.
                base = None if quality.column.startswith("kld") else _of_reference(board, rows, quality.column)
                found.append((quality, against, figures.pareto(both, quality, against, base)))
    return found


def _of_reference(board: Board, rows: contents.Lines, column: str) -> float | None:
    """The reference's value of a column."""
    value = next((row.get(column) for row in rows if row["cell"] == board.reference), None)
    return value if isinstance(value, float) else None


def _table(board: Board, rows: contents.Lines) -> dict[str, Any]:
    """What the table shows: columns that any row has a value in, and those that are shown at first."""
    columns = ["label", *(name for name in board.columns if any(name in row for row in rows))]
    of_protocol = [f"{what}_{name}" for name in board.protocols for what in ("ppl", "rank", "kld")]
    titles = TITLES | {f"{w}_{n}": f"{w} {n}" for n in board.protocols for w in ("ppl", "rank", "kld")}
    shown = [*SHOWN, *of_protocol, *SHOWN_BEHIND, *(["provisional"] if any("provisional" in r for r in rows) else [])]
    flagged = ["reason"] if any(row["status"] != "ok" for row in rows) else []
    return {
        "columns": columns,
        "shown": [name for name in (*shown, *flagged) if name in columns],
        "titles": {name: title for name, title in titles.items() if name in columns},
        "text": [name for name in TEXT if name in columns],
    }


def _best(rows: contents.Lines, found: Sequence[Verdict]) -> str:
    """The cell whose matrices are shown first: the winner nearest three bits."""
    if not found:
        return ""
    verdict = min(found, key=lambda one: (abs(float(Fraction(one.budget)) - 3.25), one.track != "calibrated"))
    return next((r["cell"] for r in rows if r["series"] == verdict.winner and r["budget_bpw"] == verdict.budget), "")


def _safe_json(value: Mapping[str, Any]) -> str:
    """JSON that ends no script element, whatever text is in it."""
    text = json.dumps(value, separators=(",", ":"), allow_nan=False)
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


def _asset(name: str) -> str:
    return files(__package__).joinpath(name).read_text(encoding="utf-8")


@cache
def _library() -> str:
    """Vega, Vega-Lite and vega-embed in one script. Bundling takes two seconds, so the cache keeps it."""
    path = cache_dir("scripts", f"vl-convert-{version('vl-convert-python')}.json")
    kept = believed(path, read_sealed)
    if kept is None:
        import vl_convert  # takes a third of a gigabyte of memory once it is used

        script = vl_convert.javascript_bundle()  # type: ignore[call-arg]  # what is optional there is not in its stub
        kept = {"script": script.replace("</script", "<\\/script")}
        write_sealed(path, kept)
    return str(kept["script"])
