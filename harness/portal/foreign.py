"""A checkpoint that another program wrote: its files, its tensors by name, and what of it has been taken.

Nothing but safetensors and GGUF is opened: a pickle runs code. What nobody takes, and what is missing, is named."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from safetensors import SafetensorError, safe_open

from harness.portal.files import files_of, quantization_of
from harness.progress import first_line, lacks_memory
from kernels.formats.bits import StoredBits
from kernels.formats.layer import LayerSpec
from kernels.formats.packed import PackedLinear

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel


class Checkpoint:
    """The tensors of a folder's safetensors, each of which is taken once."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.quantization = quantization_of(path)
        self._stack = ExitStack()
        self._handles: dict[str, Any] = {}
        for file in (file for file in files_of(path) if file.suffix == ".safetensors"):
            try:
                handle = self._stack.enter_context(safe_open(file, framework="pt"))
            except SafetensorError as error:
                if lacks_memory(error):  # there is nothing wrong with the file
                    raise MemoryError(first_line(error)) from None
                raise ValueError(f"{file} cannot be read ({first_line(error)}): copy it again") from None
            self._handles |= dict.fromkeys(handle.offset_keys(), handle)
        self._left = set(self._handles)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *raised: object) -> None:
        self._stack.close()

    def __contains__(self, name: str) -> bool:
        return name in self._handles

    @property
    def left(self) -> list[str]:
        """Names nobody has taken."""
        return sorted(self._left)

    def take(self, name: str) -> Tensor:
        """Raises ValueError when there is no such tensor."""
        if name not in self._handles:
            raise ValueError(f"{self.path} lacks {name}: the checkpoint is incomplete, or of another model")
        self._left.discard(name)
        return self._handles[name].get_tensor(name)

    def shaped(self, name: str, *shape: int) -> Tensor:
        """The same of a tensor that must have this shape, in numbers of its dtype."""
        tensor = self.take(name)
        if tuple(tensor.shape) != shape:
            raise ValueError(
                f"{self.path}: {name} is {list(tensor.shape)} where {list(shape)} belongs: the file is mislabelled, "
                "or of another model"
            )
        return tensor


@dataclass(frozen=True)
class Brought:
    """A layer as our kernels take it, and what the checkpoint spends on it."""

    layer: PackedLinear
    bits: StoredBits


class Importer(ABC):
    """A format that rows come from."""

    def open(self, path: Path, model: PreTrainedModel) -> Checkpoint:
        """The tensors under the names that `model` has for them."""
        return Checkpoint(path)

    def check(self, quantization: Mapping[str, Any]) -> None:  # noqa: B027  nothing to check is a case
        """Raises ValueError for a checkpoint of a version or kind that is not understood."""

    def mislabelled(self, checkpoint: Checkpoint) -> str:
        """What a checkpoint says of itself that the layers which were read are not; empty where it says what it is."""
        return ""

    @abstractmethod
    def layer(self, checkpoint: Checkpoint, spec: LayerSpec) -> Brought | None:
        """The quantised layer of this name; None where the checkpoint holds plain weights of it. Raises ValueError for
        tensors that are not what the checkpoint says they are."""


def bits_of(tensors: Mapping[str, Tensor], **parts: str) -> StoredBits:
    """The bits of tensors by name, each counted under the part that is named for it."""
    found: dict[str, int] = {}
    for name, tensor in tensors.items():
        found[parts[name]] = found.get(parts[name], 0) + 8 * tensor.numel() * tensor.element_size()
    return StoredBits(**found)


def requires(quantization: Mapping[str, Any], name: str, kind: type, format: str) -> Any:
    """A field of the checkpoint's own description. Raises ValueError where it is missing or of another type."""
    value = quantization.get(name)
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise ValueError(f"its quantization_config has {name}={value!r}, which is no {format} of a version known here")
    return value
