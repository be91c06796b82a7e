"""The pictures of a report as Vega-Lite specifications: plain dictionaries, drawn by the page's script and, from the
same dictionaries, into SVG and PNG (harness.report.page.pictures).

A method has one colour everywhere, variants of it another dash; the shape of a point is the row's track, and it is
hollow where weights are not decoded inside the product. Names of data are those of harness.report.page.contents."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Spec = dict[str, Any]

# Okabe and Ito's palette first (told apart by the colour-blind, on white and on black), the rest between its hues.
COLOURS = {
    "reallm": "#d55e00",
    "trellis": "#0072b2",
    "gptq": "#009e73",
    "gptvq": "#cc79a7",
    "nf": "#e69f00",
    "hqq": "#56b4e9",
    "rtn": "#8c8c8c",
    "awq": "#8a6d3b",
    "lq-lora": "#a07be0",
    "qlora": "#b5557a",
    "gptq-lora": "#7fb800",
    "svd": "#5b6abf",
    "mpo": "#93a31d",
    "bolaco": "#c23b66",
    "qllm": "#3f8fa8",
    "delta-come": "#d55e00",  # of differences, which no ReALLM and no HQQ stands beside
    "bitdelta": "#56b4e9",
    "fp16": "#767676",
    "fp16-lora": "#767676",
}
OTHERS = ("#3f8fa8", "#93a31d", "#7d6bc2", "#c0673f", "#2fa39a", "#a85fb0", "#6f8f4e")
DASHES = ([1, 0], [6, 3], [2, 2], [8, 2, 2, 2], [10, 4], [4, 1])
TRACKS = {"data-free": "circle", "calibrated": "square", "fine-tuned": "triangle-up", "delta": "diamond"}
PARTS = {"codes": "#0072b2", "scales": "#e69f00", "tables": "#cc79a7", "adapters": "#009e73"}
FILLED = "datum.kind == 'fused' || datum.kind == 'dense'"
FLAGGED = "datum.status != 'ok'"
HEIGHT = 340  # pixels, of pictures that could have any; others have one for every line


@dataclass(frozen=True)
class Measure:
    """A column that may stand on an axis."""

    column: str
    title: str
    log: bool = False
    zero: bool = False
    interval: bool = False  # whether there are columns with the endings _lo and _hi
    least: float = 0.0  # what the axis spans at least: rows of one budget differ by what it left over, and by no more


# What a point stands against; the last two exist where memory and latency were measured.
AGAINST = (
    Measure("stored_bpw", "stored bits per weight", least=0.5),
    Measure("resident_gib", "resident GiB", zero=True),
    Measure("decode_tok_s_b1", "tokens per second, one sequence", zero=True),
)


def qualities(protocols: Sequence[str], tasks: bool) -> list[Measure]:
    """Divergences first: they tell rows apart where perplexities of one text hardly do."""
    found = [
        Measure(f"kld_{name}", f"KL divergence on {name}, nats per token", True, interval=True) for name in protocols
    ]
    found += [Measure(f"ppl_{name}", f"perplexity on {name}", True, interval=True) for name in protocols]
    return [*found, Measure("acc_average", "mean accuracy of the tasks", interval=True)] if tasks else found


def colour(method: str) -> str:
    """The same in every report, for methods of other packages too."""
    return COLOURS.get(method) or OTHERS[zlib.crc32(method.encode()) % len(OTHERS)]


def _scales(series: Mapping[str, str]) -> tuple[Spec, Spec]:
    """(colour, dash) of series: label -> method."""
    count: dict[str, int] = {}
    dashes = []
    for method in series.values():
        dashes.append(DASHES[count.get(method, 0) % len(DASHES)])
        count[method] = count.get(method, 0) + 1
    colours = {"domain": list(series), "range": [colour(method) for method in series.values()]}
    return colours, {"domain": list(series), "range": dashes}


def _axis(measure: Measure, rows: Sequence[Mapping[str, Any]] = ()) -> Spec:
    scale: Spec = {"type": "log"} if measure.log else {"zero": measure.zero}
    numbers = [number for row in rows if isinstance(number := row.get(measure.column), (int, float))]
    if numbers and max(numbers) - min(numbers) < measure.least:
        middle = (max(numbers) + min(numbers)) / 2
        scale |= {"domain": [middle - measure.least / 2, middle + measure.least / 2]}
    return {"field": measure.column, "type": "quantitative", "title": measure.title, "scale": scale | {"padding": 12}}


def pareto(rows: Sequence[Mapping[str, Any]], quality: Measure, against: Measure, reference: float | None) -> Spec:
    """`quality` of every one of `rows` with its interval, those of a series joined by a line over its budgets;
    `reference` is the uncompressed model's, where that is worth a line. Data `rows`."""
    colours, dashes = _scales(series_of(rows))
    x, y = _axis(against, rows), _axis(quality)
    tooltip = [
        {"field": name, "title": title, "type": kind, **({"format": ".4g"} if kind == "quantitative" else {})}
        for name, title, kind in (
            ("label", "row", "nominal"),
            ("status", "status", "nominal"),
            ("track", "track", "nominal"),
            ("kind", "kind", "nominal"),
            ("stored_bpw", "stored bits", "quantitative"),
            (quality.column, quality.title, "quantitative"),
            *(
                (f"{quality.column}{end}", f"95 % {word}", "quantitative")
                for end, word in (("_lo", "from"), ("_hi", "to"))
            ),
            ("resident_gib", "resident GiB", "quantitative"),
            ("decode_tok_s_b1", "tokens/s", "quantitative"),
            ("allocate", "allocation", "nominal"),
        )
        if any(name in row for row in rows)
    ]
    hue = {"field": "series", "scale": colours, "title": None}
    line = {
        "mark": {"type": "line", "strokeWidth": 1.5},
        "encoding": {
            "x": x,
            "y": y,
            "order": {"field": "budget"},
            "detail": [{"field": "series"}, {"field": "seed"}],
            "color": hue,
            "strokeDash": {"field": "series", "scale": dashes, "title": None},
            "opacity": {"condition": {"param": "picked", "value": 0.9}, "value": 0.08},
        },
        "params": [{"name": "picked", "select": {"type": "point", "fields": ["series"]}, "bind": "legend"}],
    }
    bars = {
        "mark": {"type": "rule", "strokeWidth": 1},
        "encoding": {
            "x": x,
            "y": {**y, "field": f"{quality.column}_lo"},
            "y2": {"field": f"{quality.column}_hi"},
            "color": hue,
            "opacity": {"condition": {"param": "picked", "value": 0.45}, "value": 0.05},
        },
    }
    tracks = {name: mark for name, mark in TRACKS.items() if any(row["track"] == name for row in rows)}
    shape = {"field": "track", "scale": {"domain": list(tracks), "range": list(tracks.values())}, "title": None}
    pale = {"condition": [{"test": FLAGGED, "value": 0.4}, {"param": "picked", "value": 0.95}], "value": 0.1}
    points = [
        {
            "transform": [{"filter": FILLED if filled else f"!({FILLED})"}],
            "mark": {"type": "point", "filled": filled, "size": 75, "strokeWidth": 1.7},
            "encoding": {"x": x, "y": y, "color": hue, "shape": shape, "opacity": pale, "tooltip": tooltip},
        }
        for filled in sorted({row.get("kind") in ("fused", "dense") for row in rows})
    ]
    numbers = " && ".join(f"isNumber(datum['{name}'])" for name in (quality.column, against.column))
    layers: list[Spec] = [line, *([bars] if quality.interval else []), *points]
    if reference is not None:
        floor = {"values": [{"value": reference, "text": "uncompressed"}]}
        at = {"field": "value", "type": "quantitative"}
        layers.append(
            {"data": floor, "mark": {"type": "rule", "strokeDash": [4, 4], "opacity": 0.6}, "encoding": {"y": at}}
        )
        layers.append(
            {
                "data": floor,
                "mark": {"type": "text", "align": "right", "dy": -6, "dx": -4, "opacity": 0.8},
                "encoding": {"y": at, "x": {"value": "width"}, "text": {"field": "text"}},
            }
        )
    return {
        "width": "container",
        "height": HEIGHT,
        "data": {"name": "rows"},
        "transform": [{"filter": f"{numbers} && datum.budget > 0"}],
        "layer": layers,
    }


def heat_map(roles: Sequence[str], quantity: str) -> Spec:
    """Every matrix of one row, role by block. Data `layers` of one cell; quantities of LAYER_QUANTITIES."""
    title, scale = LAYER_QUANTITIES[quantity]
    nominal = quantity in ("configuration", "format")
    return {
        "width": "container",
        "height": 24 * len(roles),
        "data": {"name": "layers"},
        "transform": [] if nominal else [{"filter": f"isNumber(datum['{quantity}'])"}],
        "mark": {"type": "rect", "stroke": None},
        "encoding": {
            "x": {
                "field": "block",
                "type": "ordinal",
                "title": "block",
                "axis": {"labelAngle": 0, "labelOverlap": True},
            },
            "y": {"field": "role", "type": "nominal", "title": None, "sort": list(roles)},
            "color": {
                "field": quantity,
                "type": "nominal" if nominal else "quantitative",
                "title": title,
                "scale": scale,
                "legend": {"orient": "top", "columns": 3, "symbolType": "square", "labelLimit": 260},
            },
            "tooltip": [
                {"field": "layer", "title": "matrix"},
                {"field": "bits", "title": "stored bits", "format": ".4f"},
                {"field": "configuration", "title": "configuration"},
                {"field": "predicted", "title": LAYER_QUANTITIES["predicted"][0], "format": ".3g"},
                {"field": "output_error", "title": LAYER_QUANTITIES["output_error"][0], "format": ".3g"},
                {"field": "weight_error", "title": LAYER_QUANTITIES["weight_error"][0], "format": ".3g"},
            ],
        },
    }


# Of a matrix: column of `layers` -> title, colour scale.
LAYER_QUANTITIES: dict[str, tuple[str, Spec]] = {
    "bits": ("stored bits per weight", {"scheme": "viridis"}),
    "predicted": ("predicted divergence, nats per token", {"scheme": "magma", "type": "log"}),
    "output_error": ("share of squared outputs lost", {"scheme": "magma", "type": "log"}),
    "weight_error": ("share of squared weights lost", {"scheme": "magma", "type": "log"}),
    "format": ("stored as", {"scheme": "tableau10"}),
    "configuration": ("configuration", {"scheme": "tableau20"}),
}


def stored_parts(lines: int) -> Spec:
    """What the stored bits of every row are made of, `lines` of them. Data `parts`."""
    return {
        "width": "container",
        "height": 20 * lines,
        "data": {"name": "parts"},
        "mark": {"type": "bar", "height": {"band": 0.75}},
        "encoding": {
            "y": {"field": "label", "type": "nominal", "title": None, "sort": None, "axis": {"labelLimit": 220}},
            "x": {"field": "bits", "type": "quantitative", "title": "stored bits per weight", "stack": "zero"},
            "color": {
                "field": "part",
                "title": None,
                "scale": {"domain": list(PARTS), "range": list(PARTS.values())},
                "legend": {"orient": "top"},
            },
            "order": {"field": "at"},
            "tooltip": [
                {"field": "label", "title": "row"},
                {"field": "part"},
                {"field": "bits", "format": ".4f", "title": "bits per weight"},
            ],
        },
    }


def _curves(series: Mapping[str, str], data: str, mark: Spec, x: Spec, y: Spec, tooltip: list[Spec]) -> Spec:
    """One line a cell, in its series' colour and dash."""
    colours, dashes = _scales(series)
    return {
        "width": "container",
        "height": HEIGHT,
        "data": {"name": data},
        "mark": {"type": "line", "strokeWidth": 1.5, **mark},
        "encoding": {
            "x": {"type": "quantitative", **x},
            "y": {"type": "quantitative", **y},
            "color": {"field": "series", "scale": colours, "title": None},
            "strokeDash": {"field": "series", "scale": dashes, "title": None},
            "detail": {"field": "cell"},
            "tooltip": [{"field": "label", "title": "row"}, *tooltip],
        },
    }


def histogram(series: Mapping[str, str]) -> Spec:
    """How divergences of tokens are spread, one line a row. Data `tokens` of one protocol and budget."""
    return _curves(
        series,
        "tokens",
        {"interpolate": "step-after"},
        {
            "field": "from",
            "scale": {"type": "log"},
            "title": "KL divergence of a token, nats",
            "axis": {"format": "~g"},
        },
        {"field": "share", "title": "share of tokens", "axis": {"format": "%"}},
        [
            {"field": "from", "format": ".2g"},
            {"field": "to", "format": ".2g"},
            {"field": "share", "format": ".2%", "title": "share of tokens"},
        ],
    )


def over_positions(series: Mapping[str, str]) -> Spec:
    """Mean divergence by place in the window. Data `positions` of one protocol and budget."""
    return _curves(
        series,
        "positions",
        {"point": {"size": 20}},
        {"field": "position", "title": "token of the window", "scale": {"zero": False}},
        {"field": "kld", "scale": {"type": "log"}, "title": "mean KL divergence, nats"},
        [{"field": "position", "title": "around token", "format": ".0f"}, {"field": "kld", "format": ".3g"}],
    )


def roofline(series: Mapping[str, str], bandwidth_gb_s: float) -> Spec:
    """Products of single matrices: operations per second against operations per stored byte, below the slope that the
    machine's memory allows. Data `kernels`."""
    colours, _ = _scales(series)
    x = {"type": "quantitative", "scale": {"type": "log"}, "title": "operations per stored byte"}
    y = {"type": "quantitative", "scale": {"type": "log"}, "title": "thousand million operations per second"}
    slope = [{"x": at, "y": at * bandwidth_gb_s} for at in (1, 512)]
    return {
        "width": "container",
        "height": HEIGHT,
        "data": {"name": "kernels"},
        "layer": [
            {
                "data": {"values": slope},
                "mark": {"type": "line", "strokeDash": [5, 4], "color": "#888", "clip": True},
                "encoding": {"x": {"field": "x", **x}, "y": {"field": "y", **y}},
            },
            {
                "mark": {"type": "point", "filled": True, "size": 45, "opacity": 0.75},
                "encoding": {
                    "x": {"field": "intensity", **x},
                    "y": {"field": "gflop_s", **y},
                    "color": {"field": "series", "scale": colours, "title": None},
                    "shape": {"field": "batch", "type": "nominal", "title": "inputs"},
                    "tooltip": [
                        {"field": "row"},
                        {"field": "shape"},
                        {"field": "config", "title": "configuration"},
                        {"field": "batch", "title": "inputs"},
                        {"field": "us", "title": "microseconds", "format": ".1f"},
                        {"field": "bandwidth_pct", "title": "% of bandwidth", "format": ".0f"},
                        {"field": "speedup", "title": "speed-up over 16 bits", "format": ".2f"},
                    ],
                },
            },
        ],
    }


def training(series: Mapping[str, str]) -> Spec:
    """Losses step by step of rows that were trained. Data `training`."""
    return _curves(
        series,
        "training",
        {},
        {"field": "step", "title": "step"},
        {"field": "loss", "title": "loss, nats per token", "scale": {"zero": False}},
        [{"field": "step"}, {"field": "loss", "format": ".4f"}, {"field": "of", "title": "loss is"}],
    )


def accuracies(series: Mapping[str, str], lines: int, reference: float | None) -> Spec:
    """The accuracy of one task with its interval, of `lines` rows. Data `accuracies` of one task."""
    colours, _ = _scales(series)
    y = {"field": "label", "type": "nominal", "title": None, "sort": None, "axis": {"labelLimit": 220}}
    x = {"type": "quantitative", "title": "accuracy", "scale": {"zero": False}}
    hue = {"field": "series", "scale": colours, "legend": None}
    layers: list[Spec] = [
        {"mark": "rule", "encoding": {"y": y, "x": {"field": "low", **x}, "x2": {"field": "high"}, "color": hue}},
        {
            "mark": {"type": "point", "filled": True, "size": 60},
            "encoding": {
                "y": y,
                "x": {"field": "accuracy", **x},
                "color": hue,
                "tooltip": [
                    {"field": "label", "title": "row"},
                    {"field": "accuracy", "format": ".3f"},
                    {"field": "low", "format": ".3f", "title": "95 % from"},
                    {"field": "high", "format": ".3f", "title": "95 % to"},
                    {"field": "flips", "format": ".3f"},
                ],
            },
        },
    ]
    if reference is not None:
        layers.append(
            {
                "data": {"values": [{"value": reference}]},
                "mark": {"type": "rule", "strokeDash": [4, 4], "opacity": 0.6},
                "encoding": {"x": {"field": "value", "type": "quantitative"}},
            }
        )
    return {
        "width": "container",
        "height": 20 * lines,
        "data": {"name": "accuracies"},
        "layer": layers,
    }


def theme(name: str) -> Spec:
    """Vega's configuration of a style: `light`, `dark`, `paper`."""
    ink, grid, paper = {
        "light": ("#222222", "#e4e4e4", None),
        "dark": ("#dddddd", "#383838", None),
        "paper": ("#000000", "#e9e9e9", "#ffffff"),
    }[name]
    font = "serif" if name == "paper" else "system-ui, sans-serif"
    axis = {
        "labelColor": ink,
        "titleColor": ink,
        "gridColor": grid,
        "domainColor": ink,
        "tickColor": ink,
        "titleFontWeight": "normal",
    }
    return {
        "background": paper,
        "font": font,
        "axis": axis,
        "legend": {"labelColor": ink, "titleColor": ink, "labelLimit": 220, "symbolStrokeWidth": 2},
        "title": {"color": ink},
        "header": {"labelColor": ink, "titleColor": ink},
        "text": {"color": ink},
        "rule": {"color": ink},
        "view": {"stroke": None},
    }


def series_of(rows: Iterable[Mapping[str, Any]]) -> dict[str, str]:
    """series -> method of every row, in order of first appearance."""
    return {str(row["series"]): str(row["method"]) for row in rows}
