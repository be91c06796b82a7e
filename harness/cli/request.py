"""What a run is asked for, typed. The command line is one front of it, Python (harness.api) the other: both are read by
one parser, so that an option means the same, has the same default and is refused with the same words."""

from __future__ import annotations

import argparse
import difflib
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Never, Self, TypedDict

Texts = str | Iterable[Any]  # "a,b", or ["a", "b"]


@dataclass(kw_only=True)
class Options:
    """The options of a run as they were typed, read one by one but not yet together (harness.cli.options). Those with a
    default here are of some verbs only."""

    methods: str
    bits: str
    model: str
    base: str | None
    revision: str | None
    profile: str
    protocols: str | None
    tasks: str
    limit: int | None
    few_shot: int
    task_source: str
    calibration: str | None
    training: str | None
    data: str | None
    device: str
    dtype: str | None
    allocate: str
    seeds: str
    jobs: int | None
    act_bits: str = "16"
    model_cell: str = ""
    out: Path | None = None
    fresh: bool = False
    bench: bool = True
    timeout: float | None = None
    strict: bool = False
    log: str = ""
    engine: str = "local"
    load: str = "auto"
    address: str = ""
    slurm: str = ""
    shapes: str = ""
    bench_seconds: float = 3.0
    bench_threads: int = 1
    quiet: bool = False
    verbose: bool = False
    wide: bool = False
    json: bool = False
    typed: Sequence[str] = ()  # the words that were typed

    @classmethod
    def of(cls, arguments: argparse.Namespace) -> Self:
        named = {field.name for field in fields(cls)}
        return cls(**{name: value for name, value in vars(arguments).items() if name in named})


class Given(TypedDict, total=False):
    """Options of `run` as Python has them; what they mean is said by `python -m harness run --help`. Lists may also be
    written as one text, as on the command line."""

    base: str | os.PathLike[str]
    revision: str
    profile: str
    protocols: Texts
    tasks: Texts
    limit: int
    few_shot: int
    task_source: str
    calibration: str
    training: str
    data: str | os.PathLike[str]
    model_cell: Texts
    device: str
    dtype: str
    allocate: str
    seeds: int | Texts
    act_bits: int | Texts
    jobs: int
    out: str | os.PathLike[str]
    fresh: bool
    bench: bool
    timeout: float
    strict: bool
    log: Texts
    engine: str
    load: str
    address: str
    slurm: str
    bench_seconds: float
    bench_threads: int
    quiet: bool
    verbose: bool


class Parser(argparse.ArgumentParser):
    """A parser of what no one typed at a prompt: it raises ValueError instead of ending the process."""

    def error(self, message: str) -> Never:
        raise ValueError(message)


def words(given: dict[str, Any]) -> list[str]:
    """The command line's words for options given in Python. Raises ValueError for a name that is no option's."""
    known = ["model", "methods", "bits", *Given.__annotations__]
    found = []
    for name, value in given.items():
        if name not in known:
            close = difflib.get_close_matches(name, known, 1)
            raise ValueError(
                f"there is no option '{name}': write {close[0]}=..."
                if close
                else f"there is no option '{name}': there are {', '.join(known)}"
            )
        option = name.replace("_", "-")
        if value is None:  # as if it were not there
            continue
        if isinstance(value, bool):
            found += [f"--{option}"] if value else [f"--no-{option}"] if name == "bench" else []
        else:
            found.append(f"--{option}={_text(value)}")
    return found


def _text(value: object) -> str:
    if isinstance(value, Iterable) and not isinstance(value, str):
        return ",".join(map(_text, value))
    if isinstance(value, float):
        return repr(float(value)).removesuffix(".0")  # NumPy's, too
    return str(value)
