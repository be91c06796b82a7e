"""`ls`: what there is: methods and their options, models, protocols, and the cells this machine has run."""

from __future__ import annotations

import argparse
import dataclasses
import sys
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from harness.data.assets import DEFAULT_MODEL, MODELS
from harness.data.files import cache_dir
from harness.data.protocols import PROFILES, SOURCES
from harness.data.tasks import GROUPS, PINNED_SPLITS
from harness.model import PRESETS, laid_out
from harness.store.cells import CellStore
from methods import METHODS

if TYPE_CHECKING:
    from methods.base import Method


def register(verbs: argparse._SubParsersAction) -> None:
    parser = verbs.add_parser("ls", description=__doc__)
    parser.add_argument("what", choices=sorted(LISTS), help="what to list")
    parser.set_defaults(main=main)


def main(arguments: argparse.Namespace) -> int:
    for line in LISTS[arguments.what]():
        print(line)
    return 0


def _methods() -> Iterator[str]:
    for name in METHODS:
        default = METHODS.get(name)()
        yield f"{name}  {_summary(type(default))}"
        variants = default.variants()
        algorithms = {type(method): f"{name}:{variant}" for variant, method in variants.items() if method.algorithm}
        if variants:
            shown = (f"{variant} (default)" if method == default else variant for variant, method in variants.items())
            yield f"    variants: {', '.join(shown)}"
        yield from _options("options", default)
        for algorithm, label in algorithms.items():
            yield from _options(f"{label} options", algorithm())


def _summary(method: type[Method]) -> str:
    """The first paragraph of the docstring of a method's file, or of its folder."""
    package = method.__module__.rpartition(".")[0]
    module = package if package not in ("", "methods") else method.__module__
    return " ".join((sys.modules[module].__doc__ or "").partition("\n\n")[0].split())


def _options(label: str, method: Method) -> Iterator[str]:
    from methods.base import spelling

    options = [f"{field.name}={spelling(getattr(method, field.name))}" for field in dataclasses.fields(method)]
    if options:
        yield f"    {label}: {', '.join(options)}"


def _models() -> Iterator[str]:
    for name, pinned in MODELS.items():
        default = "  (default)" if name == DEFAULT_MODEL else ""
        yield f"{name}{default}  {pinned.licence}; from {pinned.file.package}; {pinned.note}"
    yield "any local folder written by save_pretrained(), any hub id (owner/name)"
    yield "presets, for `plan` (configurations without weights):"
    for name in PRESETS:
        stock = laid_out(name)
        weights = f"{stock.weights:,} weights in linear layers, {stock.rest_weights:,} others"
        yield f"    {name}: {len(stock.blocks)} blocks, {weights}"


def _protocols() -> Iterator[str]:
    yield "TEXT@CONTEXT or TEXT@CONTEXT/WINDOWS, TEXT one of"
    for name, text in SOURCES.items():
        yield f"    {name}: {text}"
    yield "profiles (--profile):"
    for name, profile in PROFILES.items():
        yield f"    {name}: {', '.join(profile.protocols)}; calibration {profile.calibration.text}"


def _tasks() -> Iterator[str]:
    yield "zero-shot tasks of lm-eval (--tasks), and the split that is pinned here:"
    for name, split in PINNED_SPLITS.items():
        yield f"    {name}: {split}{' (lm-eval itself: test, with --task-source hub)' if name == 'sciq' else ''}"
    yield "groups:"
    for name, members in GROUPS.items():
        yield f"    {name}: {', '.join(members)}"


def _runs() -> Iterator[str]:
    folder = cache_dir("cells")
    found = sorted(folder.glob("*/spec.json"), key=lambda path: path.stat().st_mtime) if folder.exists() else []
    if not found:
        yield f"no cells in {folder}"
    for path in found:
        store = CellStore(path.parent.name)
        spec = store.spec()
        if spec is None:  # the line above says why
            yield f"{store.key}  unreadable; `clean` removes it, a run makes it again"
            continue
        scores = {protocol.name: store.score(key) for key, protocol in spec.protocols.items()}
        state = ", ".join(
            f"{name} {score.ppl:.2f}" if score else f"{name} not scored" for name, score in scores.items()
        )
        if store.artifact() is None:
            state = f"{len(list(store.blocks.glob('*.safetensors')))} blocks compressed"
        budget = f" {spec.budget}" if spec.budget else ""
        size = sum(p.stat().st_size for p in path.parent.rglob("*") if p.is_file()) / 2**20
        when = time.strftime("%Y-%m-%d %H:%M", time.localtime(path.stat().st_mtime))
        cell = f"{spec.model.name}  {spec.method_text}{budget} seed {spec.seed}"
        yield f"{store.key}  {when}  {cell}  {size:.0f} MiB  {state}"


LISTS: dict[str, Callable[[], Iterator[str]]] = {
    "methods": _methods,
    "models": _models,
    "protocols": _protocols,
    "tasks": _tasks,
    "runs": _runs,
}
