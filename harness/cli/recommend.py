"""`recommend`: the rows of a finished run that are worth having within limits of memory, stored bits and speed; exit 1
when there is none."""

from __future__ import annotations

import argparse
import math
import re
from pathlib import Path

from harness.cli.sheets import add_json_option, print_json, print_sheet

UNITS = {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40, "KB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12}  # bytes


def register(verbs: argparse._SubParsersAction) -> None:
    parser = verbs.add_parser("recommend", description=__doc__)
    parser.add_argument("--memory", metavar="SIZE", help="what the loaded model may take, as 4GiB or 500MB")
    parser.add_argument("--bits", metavar="N", help="stored bits per weight, at most")
    parser.add_argument("--tokens-per-second", metavar="N", help="decoded one by one on the run's machine, at least")
    parser.add_argument("--folder", type=Path, help="the folder a run wrote (default: the newest under results/)")
    parser.add_argument("--protocol", default="", help="whose numbers count (default: the run's first)")
    parser.add_argument(
        "--by", default="", choices=("kld", "ppl"), help="what quality is (default: kld, where all rows have one)"
    )
    add_json_option(parser)
    parser.set_defaults(main=main)


def main(arguments: argparse.Namespace) -> int:
    memory = memory_gib(arguments.memory) if arguments.memory is not None else None
    bits = _positive(arguments.bits, "--bits 3.25")
    speed = _positive(arguments.tokens_per_second, "--tokens-per-second 20")
    from harness.report.board import newest
    from harness.report.recommend import Limits, recommend

    folder = arguments.folder or newest(Path("results"))
    found = recommend(folder, Limits(memory, bits, speed), arguments.protocol, arguments.by)
    if arguments.json:
        print_json({"folder": folder, **found.to_json()})
    else:
        print(f"{found.sentence}\n")
        if found.choices:
            print_sheet(found.sheet())
        for note in found.notes():
            print(note)
    return 0 if found.choices else 1


def memory_gib(text: str) -> float:
    """GiB of a size with its unit. Raises ValueError."""
    parts = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*([KMGT]I?B)\s*", text, flags=re.IGNORECASE)
    if not parts or not float(parts[1]):
        raise ValueError(f"'{text}' is no size: write for example --memory 4GiB")
    return float(parts[1]) * UNITS[parts[2].upper()] / 2**30


def _positive(text: str | None, example: str) -> float | None:
    if text is None:
        return None
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise ValueError(f"'{text}' is no number above 0: write for example {example}")
    return value
