"""`ls`: what there is: methods and their options, models, protocols, and the cells this machine has run."""

from __future__ import annotations

import argparse
import dataclasses
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from harness.cli.sheets import add_json_option, print_json
from harness.data.assets import DEFAULT_MODEL, MODELS
from harness.data.files import cache_dir
from harness.data.protocols import PROFILES, SOURCES
from harness.data.tasks import GROUPS, PINNED_SPLITS
from harness.model import PRESETS, laid_out
from harness.store.cells import CellStore
from methods import METHODS

if TYPE_CHECKING:
    from methods.base import Method

Found = Any  # what is listed, as JSON


def register(verbs: argparse._SubParsersAction) -> None:
    parser = verbs.add_parser("ls", description=__doc__)
    parser.add_argument("what", choices=sorted(LISTS), help="what to list")
    add_json_option(parser)
    parser.set_defaults(main=main)


def main(arguments: argparse.Namespace) -> int:
    listed = LISTS[arguments.what]
    found = listed.find()
    if arguments.json:
        print_json(found)
        return 0
    for line in listed.lines(found):
        print(line)
    return 0


def _methods() -> list[Found]:
    found = []
    for name in METHODS:
        default = METHODS.get(name)()
        variants = default.variants()
        algorithms = {type(method): f"{name}:{variant}" for variant, method in variants.items() if method.algorithm}
        found.append(
            {
                "name": name,
                "track": str(default.track),
                "summary": _summary(type(default)),
                "variants": list(variants),
                "default_variant": default.variant or None,
                "options": _options(default),
                "options_of_variants": {label: _options(algorithm()) for algorithm, label in algorithms.items()},
            }
        )
    return found


def _method_lines(found: Found) -> Iterator[str]:
    for method in found:
        yield f"{method['name']}  {method['summary']}"
        if method["variants"]:
            default = method["default_variant"]
            shown = (f"{variant} (default)" if variant == default else variant for variant in method["variants"])
            yield f"    variants: {', '.join(shown)}"
        of_variants = {f"{label} options": options for label, options in method["options_of_variants"].items()}
        for label, options in {"options": method["options"], **of_variants}.items():
            if options:
                yield f"    {label}: {', '.join(f'{option}={value}' for option, value in options.items())}"


def _summary(method: type[Method]) -> str:
    """The first paragraph of the docstring of a method's file, or of its folder."""
    package = method.__module__.rpartition(".")[0]
    module = package if package not in ("", "methods") else method.__module__
    return " ".join((sys.modules[module].__doc__ or "").partition("\n\n")[0].split())


def _options(method: Method) -> dict[str, str]:
    """Options with their defaults, as they are typed."""
    from methods.base import spelling

    return {field.name: spelling(getattr(method, field.name)) for field in dataclasses.fields(method)}


def _models() -> Found:
    pinned = {
        name: {"licence": model.licence, "package": model.file.package, "note": model.note}
        for name, model in MODELS.items()
    }
    presets = {}
    for name in PRESETS:
        stock = laid_out(name)
        presets[name] = {"blocks": len(stock.blocks), "weights": stock.weights, "other_weights": stock.rest_weights}
    return {"default": DEFAULT_MODEL, "models": pinned, "presets": presets}


def _model_lines(found: Found) -> Iterator[str]:
    for name, model in found["models"].items():
        default = "  (default)" if name == found["default"] else ""
        yield f"{name}{default}  {model['licence']}; from {model['package']}; {model['note']}"
    yield "any local folder written by save_pretrained(), any hub id (owner/name)"
    yield "presets, for `plan` (configurations without weights):"
    for name, preset in found["presets"].items():
        weights = f"{preset['weights']:,} weights in linear layers, {preset['other_weights']:,} others"
        yield f"    {name}: {preset['blocks']} blocks, {weights}"


def _protocols() -> Found:
    profiles = {
        name: {"protocols": list(profile.protocols), "calibration": profile.calibration.text}
        for name, profile in PROFILES.items()
    }
    return {"texts": SOURCES, "profiles": profiles}


def _protocol_lines(found: Found) -> Iterator[str]:
    yield "TEXT@CONTEXT or TEXT@CONTEXT/WINDOWS, TEXT one of"
    for name, text in found["texts"].items():
        yield f"    {name}: {text}"
    yield "profiles (--profile):"
    for name, profile in found["profiles"].items():
        yield f"    {name}: {', '.join(profile['protocols'])}; calibration {profile['calibration']}"


def _tasks() -> Found:
    return {"splits": PINNED_SPLITS, "groups": {name: list(members) for name, members in GROUPS.items()}}


def _task_lines(found: Found) -> Iterator[str]:
    yield "zero-shot tasks of lm-eval (--tasks), and the split that is pinned here:"
    for name, split in found["splits"].items():
        yield f"    {name}: {split}{' (lm-eval itself: test, with --task-source hub)' if name == 'sciq' else ''}"
    yield "groups:"
    for name, members in found["groups"].items():
        yield f"    {name}: {', '.join(members)}"


def _runs() -> Found:
    folder = cache_dir("cells")
    paths = sorted(folder.glob("*/spec.json"), key=lambda path: path.stat().st_mtime) if folder.exists() else []
    found: list[Mapping[str, Found]] = []
    for path in paths:
        store = CellStore(path.parent.name)
        spec = store.spec()
        if spec is None:  # the line above says why
            found.append({"cell": store.key, "method": None})
            continue
        scores = {protocol.name: store.score(key) for key, protocol in spec.protocols.items()}
        found.append(
            {
                "cell": store.key,
                "asked_for": time.strftime("%Y-%m-%d %H:%M", time.localtime(path.stat().st_mtime)),
                "model": spec.model.name,
                "method": spec.method_text,
                "budget": spec.budget,
                "seed": spec.seed,
                "bytes": sum(p.stat().st_size for p in path.parent.rglob("*") if p.is_file()),
                "compressed": store.artifact() is not None,
                "blocks": len(list(store.blocks.glob("*.safetensors"))),  # of an unfinished compression
                "ppl": {name: score.ppl if score else None for name, score in scores.items()},
            }
        )
    return {"folder": folder, "cells": found}


def _run_lines(found: Found) -> Iterator[str]:
    if not found["cells"]:
        yield f"no cells in {found['folder']}"
    for cell in found["cells"]:
        if cell["method"] is None:
            yield f"{cell['cell']}  unreadable; `clean` removes it, a run makes it again"
            continue
        state = ", ".join(
            f"{name} not scored" if ppl is None else f"{name} {ppl:.2f}" for name, ppl in cell["ppl"].items()
        )
        if not cell["compressed"]:
            state = f"{cell['blocks']} blocks compressed"
        budget = f" {cell['budget']}" if cell["budget"] else ""
        label = f"{cell['model']}  {cell['method']}{budget} seed {cell['seed']}"
        yield f"{cell['cell']}  {cell['asked_for']}  {label}  {cell['bytes'] / 2**20:.0f} MiB  {state}"


@dataclass(frozen=True)
class _List:
    """What is found, as JSON, and its lines."""

    find: Callable[[], Found]
    lines: Callable[[Found], Iterator[str]]


LISTS = {
    "methods": _List(_methods, _method_lines),
    "models": _List(_models, _model_lines),
    "protocols": _List(_protocols, _protocol_lines),
    "tasks": _List(_tasks, _task_lines),
    "runs": _List(_runs, _run_lines),
}
