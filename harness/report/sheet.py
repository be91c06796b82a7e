"""The sheet people read; every column that is not here is in the CSV."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

from harness.store.records import LayerRecord
from kernels.formats.bits import FULL

Value = str | int | float
Row = dict[str, Value]  # column -> value, "" for none

HEAD = {"method": "method", "budget_bpw": "budget", "stored_bpw": "stored"}
TAIL = {
    "kind": "kind",
    "track": "track",
    "weights_gib": "GiB",
    "resident_gib": "resident GiB",
    "decode_ms_b1": "ms/token",
    "decode_speedup_b1": "speed-up",
    "roofline_pct_b1": "roofline %",
    "prefill_tok_s": "prompt tok/s",
    "compress_s": "compress s",
    "status": "status",
}
FORMATS = {
    "stored_bpw": "{:.4f}",
    "weights_gib": "{:.3f}",
    "resident_gib": "{:.3f}",
    "decode_ms_b1": "{:.1f}",
    "roofline_pct_b1": "{:.0f}",
    "prefill_tok_s": "{:.0f}",
    "compress_s": "{:.0f}",
}
GOOD = ("ok", "underspent")  # statuses of rows whose numbers count
WIDTH = 100  # characters of a terminal's line that the columns that decide may take
SHORTEST = 12  # characters of a method's name, before the table is left as wide as it is
LARGE = 10_000.0  # perplexities from here on have a power of ten
SHORT = {  # on a terminal
    "decode-per-call": "call",
    "decode-on-load": "load",
    "data-free": "free",
    "calibrated": "calib",
    "fine-tuned": "tuned",
    "out-of-memory": "memory",
}
SHORT_SOURCES = {"wiki-mini": "wiki", "c4-mini": "c4", "wikitext2": "wiki2", "wikitext2-words": "words"}


SEPARATOR = "  "  # between columns of plain lines


@dataclass(frozen=True)
class Sheet:
    """A header and lines of cells, as text."""

    header: Sequence[str]
    lines: Sequence[Sequence[str]]

    def markdown(self) -> str:
        text = ["| " + " | ".join(self.header) + " |", "|" + "|".join(" --- " for _ in self.header) + "|"]
        text += ["| " + " | ".join(map(escaped, line)) + " |" for line in self.lines]
        return "\n".join(text) + "\n"

    def plain(self) -> str:
        """Lines of columns padded to one width."""
        lines = [self.header, *self.lines]
        widths = [max(len(line[i]) for line in lines) for i in range(len(self.header))]
        padded = (
            SEPARATOR.join(value.ljust(width) for value, width in zip(line, widths, strict=True)) for line in lines
        )
        return "\n".join(line.rstrip() for line in padded) + "\n"


def escaped(value: str) -> str:
    """Text that is no markup."""
    value = value.replace("&", "&amp;").replace("<", "&lt;").replace("`", "&#96;").replace("](", "]&#40;")
    return " ".join(value.replace("|", "\\|").split())


def number(row: Mapping[str, Value], column: str) -> float:
    """The number in a column that has one."""
    value = row[column]
    assert not isinstance(value, str), f"{column} is '{value}'"
    return value


def label(row: Mapping[str, Value]) -> str:
    """What tells a row from the others of its table: method, variant, budget, bits of activations where these are
    rounded, and seed. A row may come from a CSV, all text."""
    name = f"{row['method']}:{row['variant']}" if row["variant"] else str(row["method"])
    seed = f"seed {row['seed']}" if str(row["seed"]) not in ("", "0") else ""
    rounded = f"a{bits}" if (bits := act_bits(row)) != FULL else ""
    return " ".join(part for part in (name, str(row["budget_bpw"]), rounded, seed) if part)


def act_bits(row: Mapping[str, Value]) -> int:
    """Of the inputs of a row's layers; a row from before there was a column has inputs that are not rounded."""
    return int(row.get("act_bits") or FULL)


def leaderboard_sheet(
    rows: Sequence[Row], names: Sequence[str], more: Mapping[str, Callable[[Row], str]] | None = None
) -> Sheet:
    """The rows with the columns of the protocols `names`, and `more` behind them: title -> text of a row."""
    more = more or {}
    protocols = [(what, name) for name in names for what in PER_PROTOCOL]
    tail = {column: title for column, title in TAIL.items() if column in rows[0]}
    titles = [f"{what} {name}" if what == "ppl" else what for what, name in protocols]
    lines = []
    for row in rows:
        middle = [*(PER_PROTOCOL[what](row, name) for what, name in protocols), *(text(row) for text in more.values())]
        lines.append([*(_text(row, column) for column in HEAD), *middle, *(_text(row, column) for column in tail)])
    return Sheet([*HEAD.values(), *titles, *more, *tail.values()], lines)


def decisive_sheet(rows: Sequence[Row], names: Sequence[str], width: int = WIDTH) -> Sheet:
    """The columns that decide, in `width` characters: what a method stores, perplexity with its rank (#1, #1= for a
    tie) and divergence under every protocol, accuracy, latency, how it ran and how it ended.

    Where they would be wider, the least telling are left out, then names of methods are cut."""
    short = short_names(names)
    columns = [
        ("method", [_text(row, "method") for row in rows]),
        ("bits", [_text(row, "budget_bpw") for row in rows]),
        ("stored", [_text(row, "stored_bpw") for row in rows]),
    ]
    for name in names:
        columns.append((f"ppl {short[name]}", [_ranked(_brief(row, f"ppl_{name}"), row, name) for row in rows]))
        columns.append((f"kld {short[name]}", [_divergence(row, name) for row in rows]))
    if "acc_average" in rows[0]:
        accuracies = [f"{v:.3f}" if isinstance(v := row["acc_average"], float) else str(v) for row in rows]
        columns.append(("acc", [_ranked(text, row, "average") for text, row in zip(accuracies, rows, strict=True)]))
    columns.append(("ms/tok", [_text(row, "decode_ms_b1") for row in rows]))
    for title in ("kind", "track", "status"):
        columns.append((title, [SHORT.get(str(row[title]), str(row[title])) for row in rows]))
    spare = [*(f"kld {short[name]}" for name in reversed(names[1:])), "kind", "track", "ms/tok"]
    while spare and _width(columns) > width:
        columns = [column for column in columns if column[0] != spare[0]]
        del spare[0]
    (title, methods), *others = columns
    room = max(SHORTEST, width - _width(others) - len(SEPARATOR))
    columns = [(title, [text if len(text) <= room else text[: room - 1] + "…" for text in methods]), *others]
    return Sheet([title for title, _ in columns], list(zip(*(texts for _, texts in columns), strict=True)))


def _brief(row: Row, column: str) -> str:
    """A number in as many digits as decide."""
    value = row.get(column, "")
    return f"{value:.2e}" if isinstance(value, float) and LARGE <= value < math.inf else _text(row, column)


def _width(columns: Sequence[tuple[str, Sequence[str]]]) -> int:
    """Of a line, in characters."""
    return sum(max(map(len, (title, *texts))) + len(SEPARATOR) for title, texts in columns) - len(SEPARATOR)


def _ranked(text: str, row: Row, name: str) -> str:
    rank = row.get(f"rank_{name}", "")
    return f"{text} #{rank}{'=' if row.get(f'tie_{name}') else ''}" if rank != "" else text


def short_names(names: Sequence[str]) -> dict[str, str]:
    """A short name for every protocol, no two alike: of its text, with its context where that is not enough, or its
    own."""
    texts = {name: name.partition("@") for name in names}
    brief = {name: SHORT_SOURCES.get(text, text) for name, (text, _, _) in texts.items()}
    longer = {name: f"{brief[name]}@{rest.partition('/')[0]}" for name, (_, _, rest) in texts.items()}
    own = {name: name for name in names}
    return next((found for found in (brief, longer) if len(set(found.values())) == len(names)), own)


def notes_below(rows: Sequence[Row], names: Sequence[str]) -> list[str]:
    """What stands under that table: whole names of protocols, and why rows have no numbers."""
    short = short_names(names)
    legend = ", ".join(f"{short[name]}: {name}" for name in names if short[name] != name)
    reasons = [f"{label(row)}: {row['status']}: {row['reason']}" for row in rows if row["reason"]]
    return [legend, *reasons] if legend else reasons


def _perplexity(row: Row, name: str) -> str:
    """Value with its spread over seeds (a summary), else with its 95 % interval."""
    text = _text(row, f"ppl_{name}")
    if row.get(f"ppl_{name}_sd"):
        return f"{text} ± {row[f'ppl_{name}_sd']:.2f}"
    low, high = row.get(f"ppl_{name}_lo"), row.get(f"ppl_{name}_hi")
    return f"{text} [{low:.1f}, {high:.1f}]" if isinstance(low, float) else text


def _rank(row: Row, name: str) -> str:
    return f"{_text(row, f'rank_{name}')} {row.get(f'tie_{name}', '')}".strip()


def _divergence(row: Row, name: str) -> str:
    return _text(row, f"kld_{name}")


def _text(row: Row, column: str) -> str:
    value = row.get(column, "")
    if column == "method":
        return label({**row, "budget_bpw": ""})  # the budget has a column of its own
    if column == "status" and row["reason"]:
        return f"{value}: {row['reason']}"
    if isinstance(value, float):
        pattern = (
            ("{:.4f}" if value >= 0.001 else "{:.1e}") if column.startswith("kld") else FORMATS.get(column, "{:.2f}")
        )
        return pattern.format(value) if math.isfinite(value) else str(value)
    return str(value)


# Columns of a protocol, in this order.
PER_PROTOCOL: dict[str, Callable[[Row, str], str]] = {"ppl": _perplexity, "rank": _rank, "kld": _divergence}


def allocation_sheet(stored: Mapping[str, Mapping[str, LayerRecord]]) -> Sheet:
    """What the allocation gave the matrices of each role; `stored` is label -> layer -> its record in an artifact."""
    roles = list(dict.fromkeys(layer.role for layers in stored.values() for layer in layers.values()))
    lines = []
    for row, layers in stored.items():
        of_role = {role: [layer.stored_bpw for layer in layers.values() if layer.role == role] for role in roles}
        lines.append([row, *(f"{fmean(v):.2f} ({min(v):.2f} to {max(v):.2f})" if v else "" for v in of_role.values())])
    return Sheet(["stored bits per weight", *roles], lines)
