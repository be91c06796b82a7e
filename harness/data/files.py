"""Files that are either whole or absent, and the folder they are cached in."""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

Json = None | bool | int | float | str | list["Json"] | dict[str, "Json"]
CACHE_VARIABLE = "HARNESS_CACHE"

log = logging.getLogger(__name__)


def cache_dir(*parts: str) -> Path:
    """A folder of the user's cache: $HARNESS_CACHE, else ~/.cache/ptq-harness."""
    root = os.environ.get(CACHE_VARIABLE)
    return Path(root).expanduser().joinpath(*parts) if root else Path.home().joinpath(".cache", "ptq-harness", *parts)


_UMASK = os.umask(0)  # to be read it must be set, before there are threads
os.umask(_UMASK)
PLAIN_MODE = 0o666 & ~_UMASK  # of a file that anyone makes


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """A temporary sibling to write to; fsynced and renamed over `path` on success, so a kill leaves the old file or
    none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # Machines that share a folder have processes of the same number, containers nearly always.
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")
    try:
        yield temporary
        with open(temporary, "rb") as handle:
            os.fsync(handle.fileno())
        os.replace(temporary, path)
        sync_dir(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def locked(path: Path, what: str) -> Iterator[None]:
    """One process at a time makes the file `path`; a second one says for what it waits. Freed by the kernel on
    death."""
    lock = path.with_name(f"{path.name}.lock")
    lock.parent.mkdir(parents=True, exist_ok=True)
    with open(lock, "w") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            log.info("waiting for %s, which another process makes", what)
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def sync_dir(path: Path) -> None:
    """Make a rename in this folder survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_text(path: Path, text: str) -> None:
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def json_text(data: Any) -> str:
    """What a file of ours holds: a line per value."""
    return json.dumps(data, indent=1, ensure_ascii=False) + "\n"


def write_json(path: Path, data: Any) -> None:
    write_text(path, json_text(data))


def canonical(data: Any) -> str:
    """The one JSON text of a value: what keys are hashed from."""
    return json.dumps(data, sort_keys=True, separators=(",", ":"), ensure_ascii=False)


def digest(data: Any) -> str:
    return hashlib.sha256(canonical(data).encode()).hexdigest()


def file_sha256(path: Path) -> str:
    with open(path, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()
