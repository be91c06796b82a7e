"""The report's pictures as files, from the specifications and data of its page: SVG and PNG, in the style of the page
or of a paper."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from harness.data.files import atomic_path, write_text
from harness.plan.budgets import MIXED
from harness.report.board import Board
from harness.report.page import contents, figures, paretos
from harness.report.sheet import Row

WIDTHS = {"light": 720, "paper": 360}  # pixels; a paper's is that of a column
HEIGHTS = {"light": figures.HEIGHT, "paper": 220}  # of what could have any
SCALE = 2.0  # of PNG


def write_pictures(board: Board, rows: Sequence[Row], folder: Path, style: str) -> list[Path]:
    """Write plots/<name>.svg and .png; returns their paths. `style`: light or paper."""
    import vl_convert

    written = []
    for name, spec, lines in _pictures(board, rows):
        height = HEIGHTS[style] if spec["height"] == figures.HEIGHT else spec["height"]
        whole = {**spec, "height": height, "width": WIDTHS[style], "datasets": {spec["data"]["name"]: lines}}
        config = figures.theme(style) | ({} if style == "paper" else {"background": "#ffffff"})
        svg, png = (folder / "plots" / f"{name}.{end}" for end in ("svg", "png"))
        write_text(svg, vl_convert.vegalite_to_svg(whole, config=config))
        with atomic_path(png) as temporary:
            temporary.write_bytes(vl_convert.vegalite_to_png(whole, config=config, scale=SCALE))
        written += [svg, png]
    return written


def _pictures(board: Board, rows: Sequence[Row]) -> Iterator[tuple[str, figures.Spec, contents.Lines]]:
    """(name, specification, its data) of every picture that has something to show."""
    lines = contents.page_rows(rows)
    by_cell = {line["cell"]: line for line in lines}
    series = figures.series_of(lines)

    def named(found: contents.Lines) -> contents.Lines:
        return [
            {**{key: by_cell[line["cell"]][key] for key in ("label", "series", "budget")}, **line} for line in found
        ]

    for quality, against, spec in paretos(board, lines):
        yield _file(f"{quality.column}-{against.column}"), spec, lines
    if found := contents.parts(board, lines):
        yield "stored-bits", figures.stored_parts(len({line["cell"] for line in found})), found
    matrices = contents.layers(board, lines)
    roles = list(dict.fromkeys(line["role"] for line in matrices))
    for cell in dict.fromkeys(line["cell"] for line in matrices):
        if by_cell[cell].get("allocate") in MIXED:
            of_row = [line for line in matrices if line["cell"] == cell]
            yield _file(f"matrices-{by_cell[cell]['label']}"), figures.heat_map(roles, "bits"), of_row
    for name, make, found in (
        ("tokens", figures.histogram(series), named(contents.tokens(board, lines))),
        ("positions", figures.over_positions(series), named(contents.positions(board, lines))),
    ):
        for protocol, budget in dict.fromkeys((line["protocol"], line["budget"]) for line in found):
            chosen = [line for line in found if (line["protocol"], line["budget"]) == (protocol, budget)]
            yield _file(f"{name}-{protocol}-{budget:g}"), make, chosen
    if found := named(contents.training(board, lines)):
        yield "training", figures.training(series), found
    if found := named(contents.kernels(board)):
        yield "products", figures.roofline(series, board.bandwidth / 1e9), found


def _file(name: str) -> str:
    """A name that any file system takes."""
    return "".join(c if c.isalnum() or c in "-_." else "-" for c in name)
