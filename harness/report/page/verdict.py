"""Who wins: a sentence for every budget and track, from the leaderboard's ranks alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from harness.report.sheet import GOOD, act_bits, label
from kernels.formats.bits import FULL


@dataclass(frozen=True)
class Verdict:
    """The best row of a budget and track under one protocol, and those that cannot be told from it."""

    budget: str
    track: str  # with the width of activations where these are rounded
    protocol: str
    method: str  # of the winner
    winner: str  # its label without the budget
    ppl: float
    kld: float | None
    ties: tuple[str, ...]
    rows: int  # that were ranked together
    notes: tuple[str, ...]  # what is to be known of the winner: underspent, decode-on-load

    @property
    def numbers(self) -> str:
        return f"perplexity {self.ppl:.4g}" + (f", divergence {self.kld:.3g}" if self.kld is not None else "")


def verdicts(rows: Sequence[Mapping[str, Any]], protocols: Sequence[str]) -> list[Verdict]:
    """`rows` of a leaderboard (or of its means over seeds), ranked; in order of budget, track and protocol."""
    groups: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for row in rows:
        if row.get("budget_bpw") and row["status"] in GOOD:
            groups.setdefault((str(row["budget_bpw"]), _track(row)), []).append(row)
    found = []
    for (budget, track), members in sorted(groups.items(), key=lambda item: (Fraction(item[0][0]), item[0][1])):
        seed = min(row["seed"] for row in members)
        members = [row for row in members if row["seed"] == seed]
        for name in protocols:
            ranked = [row for row in members if isinstance(row.get(f"rank_{name}"), int)]
            ranked.sort(key=lambda row: (row[f"rank_{name}"], row[f"ppl_{name}"]))
            if not ranked:
                continue
            first, *others = ranked
            ties = [_name(row) for row in others if row[f"rank_{name}"] == first[f"rank_{name}"]]
            kld = first.get(f"kld_{name}")
            notes = [str(first["status"])] if first["status"] != "ok" else []
            notes += [str(first["kind"])] if str(first.get("kind", "")).startswith("decode") else []
            found.append(
                Verdict(
                    budget,
                    track,
                    name,
                    str(first["method"]),
                    _name(first),
                    first[f"ppl_{name}"],
                    kld if isinstance(kld, float) else None,
                    tuple(ties),
                    len(ranked),
                    tuple(notes),
                )
            )
    return found


def _track(row: Mapping[str, Any]) -> str:
    bits = act_bits(row)
    return str(row["track"]) if bits == FULL else f"{row['track']}, activations of {bits} bits"


def _name(row: Mapping[str, Any]) -> str:
    return label({**row, "variant": row.get("variant", ""), "budget_bpw": "", "seed": ""})


def headlines(found: Sequence[Verdict]) -> list[str]:
    """For every track: who is first, or tied with the first, under every protocol at which of its budgets, and with
    whom; whoever leads at most of them first, then who leads at those that are left."""
    sentences = []
    for track in dict.fromkeys(verdict.track for verdict in found):
        of_track = [verdict for verdict in found if verdict.track == track]
        budgets = list(dict.fromkeys(verdict.budget for verdict in of_track))
        wins = Counter(verdict.winner for verdict in of_track)
        leading: dict[str, list[str]] = {}
        for budget in budgets:
            first = [{verdict.winner, *verdict.ties} for verdict in of_track if verdict.budget == budget]
            for name in set.intersection(*first):
                leading.setdefault(name, []).append(budget)
        left, parts = set(budgets), []
        # Of those that lead equally often, the one with more first places.
        for name, at in sorted(leading.items(), key=lambda item: (-len(item[1]), -wins[item[0]], item[0])):
            if left & set(at):
                where = "every budget" if len(at) == len(budgets) > 1 else f"{_listed(at)} bits"
                tied = [(other, [b for b in at if b in its]) for other, its in leading.items() if other != name]
                ties = [f"{other} at {_listed(both)}" for other, both in tied if both]
                parts.append(f"{name} leads at {where}" + (f", in a tie with {'; '.join(ties)}" if ties else ""))
                left -= set(at)
        sentences.append(f"{track}: {'; '.join(parts) or 'no row leads under every protocol'}")
    return sentences


def _listed(names: Sequence[str]) -> str:
    return " and ".join(filter(None, [", ".join(names[:-1]), names[-1]]))
