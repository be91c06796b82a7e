"""`Record`: a frozen dataclass that is kept as JSON, and says in one line what is wrong with a file it cannot read.

A file holds the version of its class, the fields, and what is shown for readers. Fields are read strictly: nothing is
converted, an unknown or missing one is an error that names it. Files of earlier versions are brought up to date by
`upgrade`. Not-a-number and infinity are kept as they are, in the spelling of Python's json module."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Hashable, Mapping
from functools import cache
from pathlib import Path
from typing import Any, ClassVar, Self, cast

from pydantic import ConfigDict, GetCoreSchemaHandler, TypeAdapter, ValidationError
from pydantic_core import CoreSchema, core_schema

from harness.data.files import Json
from harness.data.sealed import Damaged, read_object, unsealed, write_sealed

SHOWN_CHARACTERS = 60  # of a wrong value, in an error


@dataclasses.dataclass(frozen=True)
class Record:
    """Base of frozen dataclasses of scalars, tuples, dicts with text as keys, and other records.

    `VERSION` is 0 where a record has none of its own, being a part of another; a file without one is of the first
    version. `SHOWN` are properties that are written for readers and ignored when read.
    """

    VERSION: ClassVar[int] = 0
    VERSION_KEY: ClassVar[str] = "version"
    SHOWN: ClassVar[tuple[str, ...]] = ()
    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid", strict=True)

    @classmethod
    def upgrade(cls, data: dict[str, Any], version: int) -> dict[str, Any]:
        """The fields of this version from those that an earlier `version` of the class wrote."""
        return data

    def to_json(self) -> dict[str, Json]:
        version = {self.VERSION_KEY: self.VERSION} if self.VERSION else {}
        names = (*self.SHOWN, *(field.name for field in dataclasses.fields(self)))
        return {**version, **{name: _plain(getattr(self, name)) for name in names}}

    @classmethod
    def from_json(cls, data: Mapping[str, Any], where: str = "") -> Self:
        """Raises ValueError; `where` is what the data is called in its message."""
        return cls._parsed(json.dumps(data), where or cls.__name__)

    def write(self, path: Path) -> None:
        write_sealed(path, self.to_json())

    @classmethod
    def read(cls, path: Path) -> Self:
        """Raises Damaged in one line when the file is not one of this class, and ValueError when it is of a later
        version, which is not ours to remove."""
        return cls._parsed(json.dumps(unsealed(read_object(path), path)), str(path))

    @classmethod
    def _parsed(cls, text: str, where: str) -> Self:
        try:
            return cast(Self, _adapter(cast(Hashable, cls)).validate_json(text))
        except ValidationError as error:
            problem, later = _first(error)
            raise (ValueError if later else Damaged)(f"{where}: {problem}") from None

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        inner: dict[str, Any] = dict(handler.resolve_ref_schema(handler(source)))
        # Whoever refers to the class means both, else a class used twice would be read without its own `_fields`.
        ref = inner.pop("ref")
        return core_schema.no_info_before_validator_function(cls._fields, cast(CoreSchema, inner), ref=ref)

    @classmethod
    def _fields(cls, data: Any) -> Any:
        """What was written, as the fields of this version."""
        if not isinstance(data, dict):
            return data
        data = {name: _frozen(value) for name, value in data.items()}
        if cls.VERSION:
            version = data.pop(cls.VERSION_KEY, 1)
            if not isinstance(version, int):
                raise ValueError(f"{cls.VERSION_KEY} is {version!r}, not a number")
            if version > cls.VERSION:
                raise _Later(f"{cls.VERSION_KEY} {version} is of a later harness, this one knows {cls.VERSION}")
            if version < cls.VERSION:
                try:
                    data = cls.upgrade(data, version)
                except KeyError as error:
                    raise ValueError(f"the field {error} is missing") from None
                except (TypeError, AttributeError) as error:
                    raise ValueError(f"{cls.VERSION_KEY} {version} had other fields ({error})") from None
        return {name: value for name, value in data.items() if name not in cls.SHOWN}


class _Later(ValueError):
    """The record is of a version that does not exist yet."""


@cache
def _adapter(cls: Hashable) -> TypeAdapter[Any]:
    return TypeAdapter(cast(type, cls))


def _plain(value: Any) -> Json:
    if isinstance(value, Mapping):
        return {name: _plain(member) for name, member in value.items()}
    if isinstance(value, tuple):
        return [_plain(member) for member in value]
    if isinstance(value, Path):
        return str(value)
    return value.to_json() if hasattr(value, "to_json") else value


def _frozen(value: Any) -> Any:
    """JSON has lists, records have tuples."""
    if isinstance(value, dict):
        return {name: _frozen(member) for name, member in value.items()}
    return tuple(map(_frozen, value)) if isinstance(value, list | tuple) else value


def _first(error: ValidationError) -> tuple[str, bool]:
    """The first thing that is wrong, and whether a later version would know better."""
    found = error.errors(include_url=False)[0]
    field = ".".join(map(str, found["loc"]))
    where = f"'{field}': " if field else ""
    if found["type"] == "missing":
        return f"the field '{field}' is missing", False
    if found["type"] == "unexpected_keyword_argument":
        return f"the field '{field}' is unknown", False
    if found["type"] == "value_error":
        cause = found["ctx"]["error"]
        later = isinstance(cause, _Later)
        return f"{where}{cause}{'; update the harness' if later else ''}", later
    value = repr(found["input"])
    value = value if len(value) <= SHOWN_CHARACTERS else value[:SHOWN_CHARACTERS] + "..."
    return f"{where}{value} is wrong ({found['msg']})", False
