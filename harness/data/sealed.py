"""Files of the cache that carry their own checksum: each is believed for its bytes, and made again when they are wrong.

A JSON object holds the sha256 of all else in it. A file of tensors holds that of the whole file, taken with zeros where
the sum itself stands. What a damaged file was made from is still there, so nobody has to be asked: one line names the
file, and it is made again."""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from safetensors import SafetensorError, safe_open

from harness.data.files import atomic_path, digest, file_sha256, json_text, write_text

if TYPE_CHECKING:
    from torch import Tensor

SEAL = "sha256"
BLANK = "0" * 64
OTHER_CONTENT = "is damaged (its checksum is of other content)"
_SEAL_IN_HEADER = re.compile(rb'"sha256":"([0-9a-f]{64})"')
CHUNK = 1 << 22
T = TypeVar("T")

log = logging.getLogger(__name__)


class Damaged(ValueError):
    """A file of the cache does not hold what was written to it. The message is one line, the file's name first."""


def believed(path: Path, read: Callable[[Path], T]) -> T | None:
    """What `read` finds in the file; None where there is no file, or a damaged one, which is named and removed."""
    if not path.exists():
        return None
    try:
        return read(path)
    except Damaged as error:
        log.warning("%s; it is made again", error)
        path.unlink(missing_ok=True)
        return None


def write_sealed(path: Path, data: Mapping[str, Any]) -> None:
    assert SEAL not in data
    write_text(path, json_text({**data, SEAL: digest(data)}))


def read_sealed(path: Path) -> dict[str, Any]:
    """Raises Damaged."""
    data = read_object(path)
    if SEAL not in data:
        raise Damaged(f"{path} has no checksum")
    return unsealed(data, path)


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object of a file. Raises Damaged."""
    try:
        data = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise Damaged(f"{path} is no JSON ({str(error).splitlines()[0]})") from None
    if not isinstance(data, dict):
        raise Damaged(f"{path} holds no object")
    return data


def unsealed(data: dict[str, Any], path: Path) -> dict[str, Any]:
    """What is sealed in an object; one without a seal, of an earlier version, as it is. Raises Damaged."""
    if SEAL not in data:
        return data
    content = {name: value for name, value in data.items() if name != SEAL}
    try:
        right = digest(content) == data[SEAL]
    except ValueError:  # half a surrogate pair
        right = False
    if not right:
        raise Damaged(f"{path} {OTHER_CONTENT}")
    return content


def damaged_files(folder: Path, sums: Mapping[str, str], sha256: Callable[[Path], str] = file_sha256) -> Iterator[str]:
    """What is wrong with the files of a folder whose checksums are kept beside them, by name; a line for each."""
    for name, expected in sums.items():
        path = folder / name
        if not path.is_file():
            yield f"{path} is missing"
        elif sha256(path) != expected:
            yield f"{path} {OTHER_CONTENT}"


def save_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Written whole or not at all, on the CPU."""
    assert metadata is None or SEAL not in metadata
    from harness.data.tensor_file import write_tensors

    with atomic_path(path) as temporary:
        write_tensors(temporary, tensors, {**(metadata or {}), SEAL: BLANK})
        found, place = _seal_of(temporary)
        with open(temporary, "r+b") as handle:
            handle.seek(place)
            handle.write(found.encode())


def load_tensors(path: Path, device: str = "cpu") -> tuple[dict[str, Tensor], dict[str, str]]:
    """(tensors, metadata). Raises Damaged."""
    from safetensors.torch import load_file

    check_tensors(path)
    try:
        tensors = load_file(path, device=device)
        with safe_open(path, framework="pt") as handle:
            metadata = dict(handle.metadata() or {})
    except SafetensorError as error:  # whole, but not of a form this version reads
        raise Damaged(f"{path} cannot be read ({str(error).splitlines()[0]})") from None
    return tensors, {name: value for name, value in metadata.items() if name != SEAL}


def checked(path: Path) -> Path:
    """A file of tensors, if it is what was written: what `believed` may read. Raises Damaged."""
    check_tensors(path)
    return path


def check_tensors(path: Path) -> None:
    """Raises Damaged."""
    found, place = _seal_of(path)
    with open(path, "rb") as handle:
        handle.seek(place)
        if handle.read(len(BLANK)) != found.encode():
            raise Damaged(f"{path} {OTHER_CONTENT}")


def _seal_of(path: Path) -> tuple[str, int]:
    """(sha256 of a file of tensors with zeros for its seal, where the seal stands). Raises Damaged."""
    with open(path, "rb") as handle:
        size = int.from_bytes(handle.read(8), "little")
        if not 0 < size <= path.stat().st_size - 8:
            raise Damaged(f"{path} is damaged (it is shorter than it says)")
        header = handle.read(size)
        match = _SEAL_IN_HEADER.search(header)
        if match is None:
            raise Damaged(f"{path} has no checksum")
        start, end = match.span(1)
        found = hashlib.sha256(size.to_bytes(8, "little") + header[:start] + BLANK.encode() + header[end:])
        while chunk := handle.read(CHUNK):
            found.update(chunk)
    return found.hexdigest(), 8 + start
