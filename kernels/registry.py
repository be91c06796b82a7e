"""The one way to find a class or object by its name: methods, formats, tables and backends stand in a `Registry` each.

An entry is a text, "module:attribute", resolved on first use: a missing optional dependency breaks only what needs it,
and no module has to import what it offers. Other packages add entries through an entry point of the registry's group.
"""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Callable, Collection, Iterator, Mapping
from functools import cached_property
from importlib.metadata import EntryPoint, entry_points
from typing import Any, Generic, TypeVar

Entry = TypeVar("Entry")


class Registry(Generic[Entry]):
    """Names of `what` ("method"), each with the place its `base` class, a subclass of it, or an instance stands at.

    `base` is the class, or its place, where it would bring more than a name needs. `group` is the entry-point group
    through which other packages register theirs; "" for none.
    """

    def __init__(self, what: str, base: type | str, entries: Mapping[str, str], group: str = "") -> None:
        self.what, self._base, self.group = what, base, group
        self._entries = dict(entries)
        self._resolved: dict[str, Any] = {}

    @cached_property
    def base(self) -> type:
        found = _at(self._base) if isinstance(self._base, str) else self._base
        assert isinstance(found, type)
        return found

    @cached_property
    def _foreign(self) -> dict[str, EntryPoint]:
        """Entries of other packages; ours come first where names collide, so that nobody replaces a method unseen."""
        found = entry_points(group=self.group) if self.group else ()
        return {entry.name: entry for entry in found if entry.name not in self._entries}

    def __iter__(self) -> Iterator[str]:
        yield from self._entries
        yield from self._foreign

    def __len__(self) -> int:
        return len(self._entries) + len(self._foreign)

    def __contains__(self, name: object) -> bool:
        return name in self._entries or name in self._foreign

    def get(self, name: str) -> Entry:
        """The entry of this name, loaded when it is first asked for.

        Raises ValueError for an unknown name (with the nearest known one), for an entry of another package that cannot
        be loaded, and for one that is no `base`; ImportError where an entry of ours lacks an optional dependency.
        """
        if name not in self._resolved:
            self._resolved[name] = self._checked(name, self._load(name))
        return self._resolved[name]

    def require(self, name: str) -> None:
        """Raises ValueError for an unknown name, without loading what a known one stands for."""
        if name not in self:
            raise ValueError(f"unknown {self.what} '{name}': {suggestion(name, list(self))}")

    def _load(self, name: str) -> Any:
        if name in self._entries:
            return _at(self._entries[name])
        self.require(name)
        entry = self._foreign[name]
        try:
            return entry.load()
        except (ImportError, AttributeError) as error:
            owner = entry.dist.name if entry.dist else "another package"
            message = f"{self.what} '{name}' of {owner} cannot be loaded ({error}): update or remove it"
            raise ValueError(message) from error

    def _checked(self, name: str, found: Any) -> Any:
        fits = issubclass(found, self.base) if isinstance(found, type) else isinstance(found, self.base)
        if not fits:
            raise ValueError(f"{self.what} '{name}' is no {self.base.__name__}: {found!r}")
        return found


def on_demand(module: str, names: Collection[str]) -> Callable[[str], Any]:
    """The `__getattr__` of a package that hands on these names of a module, which is imported with the first of them
    that is asked for."""

    def named(name: str) -> Any:
        if name in names:
            return getattr(importlib.import_module(module), name)
        raise AttributeError(f"no {name} here")

    return named


def _at(place: str) -> Any:
    """What stands at "module:attribute"."""
    module, _, attribute = place.partition(":")
    return getattr(importlib.import_module(module), attribute)


def suggestion(name: str, known: Collection[str]) -> str:
    """The end of an error about a misspelt name: "did you mean 'gptq'?", or what there is to choose from."""
    near = difflib.get_close_matches(name, known, n=1)
    return f"did you mean '{near[0]}'?" if near else f"choose from {', '.join(known) or 'none'}"
