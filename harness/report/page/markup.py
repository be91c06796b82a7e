"""The parts of a report that are markup: cards of winners, and what the numbers stand on. All text is escaped here."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from html import escape

from harness.report.board import Board
from harness.report.page import figures
from harness.report.page.verdict import Verdict
from harness.report.rows import CellReport


def cards(found: Sequence[Verdict]) -> list[str]:
    """One card per budget and track."""
    groups: dict[tuple[str, str], list[Verdict]] = {}
    for verdict in found:
        groups.setdefault((verdict.budget, verdict.track), []).append(verdict)
    return [_card(*key, members) for key, members in groups.items()]


def _card(budget: str, track: str, members: Sequence[Verdict]) -> str:
    by_winner: dict[tuple[str, tuple[str, ...]], list[Verdict]] = {}
    for verdict in members:
        by_winner.setdefault((verdict.winner, verdict.ties), []).append(verdict)
    lines = []
    for (winner, ties), same in by_winner.items():
        first = same[0]
        badges = "".join(f' <span class="badge">{escape(note)}</span>' for note in first.notes)
        against = "the only row" if first.rows == 1 else f"ahead of {first.rows - 1} other{'s' * (first.rows > 2)}"
        standing = f'<span class="tie">tie with {escape(", ".join(ties))}</span>' if ties else against
        numbers = "; ".join(escape(f"{verdict.numbers} on {verdict.protocol}") for verdict in same)
        lines.append(f'<p class="winner">{escape(winner)}{badges}</p><p>{standing}</p><p>{numbers}</p>')
    hue = figures.colour(members[0].method)
    title = f"<h3>{escape(budget)} {'bit' if budget == '1' else 'bits'} · {escape(track)}</h3>"
    return f'<div class="card" style="--hue:{hue}">{title}{"".join(lines)}</div>'


def provenance(board: Board) -> str:
    """Commands, texts, tasks, model, calibration, versions and machines."""
    lines: dict[str, dict[str, None]] = {"made by": {f"<code>{escape(text)}</code>": None for text in board.commands}}
    for report in board.reports.values():
        for name, text in _standing(report):
            lines.setdefault(name, {})[text] = None
    parts = (f"<dt>{escape(name)}</dt><dd>{'<br>'.join(texts)}</dd>" for name, texts in lines.items() if texts)
    return f"<dl>{''.join(parts)}</dl>"


def _standing(report: CellReport) -> Iterator[tuple[str, str]]:
    """(what, markup) of what one row stands on."""
    for name, score in report.done.items():
        size = f"{score.scored_tokens:,} tokens, context {score.protocol.context}"
        yield f"text {name}", f"{size}, sha256 <code>{escape(score.tokens_sha256)}</code>"
    for name, result in report.tasks.items():
        if result:
            yield f"task {name}", escape(f"{result.items} of {result.of_items} items, lm-eval {result.lm_eval}")
    if artifact := report.artifact:
        spec, made = artifact.spec, artifact.environment
        yield "model", f"<code>{escape(str(spec.model.fingerprint))}</code>"
        if spec.calibration:
            text = escape(f"{spec.calibration.text}, seed {spec.seed}")
            yield "calibration", f"{text}, sha256 <code>{escape(str(artifact.calibration_sha256))}</code>"
        versions = f"harness {made.harness}, torch {made.torch}, transformers {made.transformers}, Python {made.python}"
        yield "compressed with", escape(f"{versions}, {made.machine}, {made.cores} cores")
    if report.bench:
        machine = report.bench.machine
        yield "timed on", escape(f"{machine.gpu or machine.processor}, {machine.threads} threads")
