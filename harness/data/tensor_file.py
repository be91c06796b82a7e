"""safetensors files, a tensor at a time: read without mapping the file, written without holding what is in it.

The library's own reader maps whole files, which count as memory of the process wherever that is limited, and its writer
takes all tensors at once. Here a model may be larger than memory. The format (a length, a JSON header, the bytes of the
tensors) and the order of the tensors are the library's: the same tensors give the same file."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from harness.data.files import PLAIN_MODE

# In the order the library writes them, which is that of sizes and no file's need.
NAMES = {
    torch.uint64: "U64",
    torch.int64: "I64",
    torch.float64: "F64",
    torch.float32: "F32",
    torch.uint32: "U32",
    torch.int32: "I32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.uint16: "U16",
    torch.int16: "I16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
DTYPES = {name: dtype for dtype, name in NAMES.items()}
RANK = {dtype: place for place, dtype in enumerate(NAMES)}
METADATA = "__metadata__"
ALIGNMENT = 8  # of the header's end


@dataclass(frozen=True)
class TensorSpec:
    dtype: torch.dtype
    shape: tuple[int, ...]

    @classmethod
    def of(cls, tensor: Tensor, dtype: torch.dtype | None = None) -> TensorSpec:
        """Of a tensor, or of the same in another dtype."""
        return cls(dtype or tensor.dtype, tuple(tensor.shape))

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class TensorFile:
    """What is in a file, by name. Raises ValueError, naming the file, for one that is no safetensors file or is cut
    short."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with open(path, "rb") as handle:
                size = int.from_bytes(handle.read(8), "little")
                if size > path.stat().st_size:
                    raise ValueError("it is shorter than it says")
                header = json.loads(handle.read(size))
            self.metadata: dict[str, str] = header.pop(METADATA, {})
            self._start = 8 + size
            self._places = {name: tuple(entry["data_offsets"]) for name, entry in header.items()}
            self.specs = {n: TensorSpec(DTYPES[e["dtype"]], tuple(e["shape"])) for n, e in header.items()}
            if any(end - first != self.specs[name].bytes for name, (first, end) in self._places.items()):
                raise ValueError("offsets and shapes disagree")
            if path.stat().st_size != self._start + max((end for _, end in self._places.values()), default=0):
                raise ValueError("its size is not what its header says")
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path} is no whole safetensors file ({error}): copy it again") from None

    def read(self, name: str) -> Tensor:
        """A tensor of its own memory, on the CPU."""
        spec, (first, _) = self.specs[name], self._places[name]
        held = torch.empty(spec.bytes, dtype=torch.uint8)
        with open(self.path, "rb", buffering=0) as handle:
            handle.seek(self._start + first)
            if not fill(handle, held):
                raise ValueError(f"{self.path} ends in the middle of {name}: copy it again")
        return held.view(spec.dtype).view(spec.shape)


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Tensors that are in memory, on whatever device. Raises OSError, naming the file, for what the system refuses."""
    specs = {name: TensorSpec.of(tensor) for name, tensor in tensors.items()}
    write_tensor_file(path, specs, lambda name: tensors[name].detach().cpu(), metadata)


def write_tensor_file(
    path: Path,
    specs: Mapping[str, TensorSpec],
    read: Callable[[str], Tensor],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """`read` is asked for one tensor after the other, on the CPU, in the order of the file; each is let go when it is
    written. Raises OSError, naming the file, for what the system refuses."""
    order = sorted(specs, key=lambda name: (RANK[specs[name].dtype], name))
    header: dict[str, object] = {METADATA: dict(metadata)} if metadata else {}
    end = 0
    for name in order:
        first, end = end, end + specs[name].bytes
        header[name] = {
            "dtype": NAMES[specs[name].dtype],
            "shape": list(specs[name].shape),
            "data_offsets": [first, end],
        }
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % ALIGNMENT)
    with named(path), open(path, "wb") as handle:
        handle.write(len(text).to_bytes(8, "little") + text)
        for name in order:
            tensor = read(name)
            assert TensorSpec.of(tensor) == specs[name], f"{name}: {TensorSpec.of(tensor)}, announced as {specs[name]}"
            if tensor.numel():
                handle.write(bytes_of(tensor))
    path.chmod(PLAIN_MODE)


def fill(handle: FileIO, held_B: Tensor) -> bool:
    """Read into the memory of a uint8 tensor; False where the file ends before it is full."""
    view, done = bytes_of(held_B), 0
    while done < len(view):  # a read of more than 2 GiB comes in parts
        if not (count := handle.readinto(view[done:])):
            return False
        done += count
    return True


@contextmanager
def named(path: Path) -> Iterator[None]:
    """A write that the system refuses does not say of which file."""
    try:
        yield
    except OSError as error:
        if error.errno is None or error.filename is not None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from None


def bytes_of(tensor: Tensor) -> memoryview:
    """The memory of a tensor on the CPU, copied only where it is not in one piece."""
    # numpy's own types do not say that an array is a buffer.
    array: Any = tensor.contiguous().flatten().view(torch.uint8).numpy()
    return memoryview(array)


def in_files(paths: Iterable[Path]) -> dict[str, TensorFile]:
    """Which file a tensor is in, by its name."""
    return {name: file for file in map(TensorFile, paths) for name in file.specs}
