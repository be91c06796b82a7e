"""`kld`: a stored cell against llama.cpp's file of another model's log-probabilities, or such a file of the cell."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path

from harness.cli.sheets import add_cell_options, add_json_option, print_json


def register(verbs: argparse._SubParsersAction) -> None:
    parser = verbs.add_parser("kld", description=__doc__)
    add_cell_options(parser)
    way = parser.add_mutually_exclusive_group(required=True)
    way.add_argument("--base", type=Path, metavar="FILE", help="what llama-perplexity --kl-divergence-base wrote")
    way.add_argument("--write", type=Path, metavar="FILE", help="for llama-perplexity --kl-divergence to read")
    parser.add_argument(
        "--protocol",
        help="with --write, whose windows: TEXT@CONTEXT[/WINDOWS] (default: the first the cell was scored by)",
    )
    add_json_option(parser)
    parser.set_defaults(main=main)


def main(arguments: argparse.Namespace) -> int:
    if arguments.base and arguments.protocol:
        raise ValueError("--base has its own tokens: leave --protocol out")
    import torch

    from harness.compressed import CompressedModel
    from harness.data.checkpoint import load_tokenizer
    from harness.data.protocols import parse_protocol
    from harness.data.streams import evaluation_stream
    from harness.portal import kl_file
    from harness.portal.cells import stored_cell

    base = kl_file.Base.open(arguments.base) if arguments.base else None
    cell = stored_cell(arguments.cell, arguments.row)
    spec = cell.artifact.spec
    known = {protocol.name: protocol for protocol in spec.protocols.values()}
    name = arguments.protocol or next(iter(known), "")
    if base is None and not name:
        raise ValueError(f"{cell.label} was scored by no protocol: name one with --protocol")
    bos = kl_file.beginning(load_tokenizer(spec.model.path))
    model = CompressedModel.load(cell.store.folder, spec.device, getattr(torch, spec.dtype), spec.base).model
    if base is None:
        protocol = known.get(name) or parse_protocol(name, spec.bos)
        tokens_NT = evaluation_stream(protocol, spec.model, spec.data).tokens_NT
        kl_file.write(model, tokens_NT, arguments.write, bos)
        found: dict[str, object] = {"cell": cell.store.key, "protocol": name, "file": arguments.write}
        text = f"{arguments.write}: {len(tokens_NT)} windows of {tokens_NT.shape[1]} tokens of {name}"
    else:
        agreement = kl_file.compare(model, base, bos)
        found = {"cell": cell.store.key, "base": arguments.base, **asdict(agreement)}
        text = (
            f"{cell.label}: kld {agreement.kld:.6f} +- {agreement.stderr:.6f} nats over {agreement.predictions} "
            f"predictions, ppl {agreement.ppl:.4f} (base {agreement.base_ppl:.4f}), top-1 {agreement.top1:.4f}"
        )
    print_json(found) if arguments.json else print(text)
    return 0
