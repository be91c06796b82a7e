"""`export`: a compressed model as a folder or file that other programs load."""

from __future__ import annotations

import argparse
from pathlib import Path

from harness.cli.sheets import add_cell_options, add_json_option, print_json
from harness.portal import EXPORTS


def register(verbs: argparse._SubParsersAction) -> None:
    parser = verbs.add_parser("export", description=__doc__)
    add_cell_options(parser)
    parser.add_argument("--to", type=Path, required=True, metavar="DIR", help="a new folder")
    parser.add_argument(
        "--format",
        default="hf",
        help=f"one of {', '.join(EXPORTS)}; docs/formats.md says which holds what (default: %(default)s)",
    )
    parser.add_argument("--variant", default="", help="of the format, where it has several (default: its first)")
    add_json_option(parser)
    parser.set_defaults(main=main)


def main(arguments: argparse.Namespace) -> int:
    EXPORTS.require(arguments.format)
    from harness.portal.cells import stored_cell
    from harness.portal.folder import Request

    cell = stored_cell(arguments.cell, arguments.row)
    exporter = EXPORTS.get(arguments.format)
    if (base := cell.artifact.spec.base) and not exporter.holds_pairs:
        raise ValueError(
            f"{cell.label} is the difference to {base.name}, which {arguments.format} has no form for: "
            "write --format hf"
        )
    variant = arguments.variant or next(iter(exporter.options), "")
    if arguments.variant and variant not in exporter.options:
        raise ValueError(f"{arguments.format} has no variant '{variant}': {_choice(exporter.options)}")
    exporter.write(Request(cell, arguments.to, variant))
    if arguments.json:
        print_json({"cell": cell.store.key, "format": arguments.format, "variant": variant, "folder": arguments.to})
    else:
        print(f"{arguments.to}: {cell.label} as {arguments.format}")
    return 0


def _choice(options: tuple[str, ...]) -> str:
    return f"choose from {', '.join(options)}" if options else "leave --variant out"
