"""The folder that every export of a Hugging Face kind is: shards, their index, tokenizer, card and configuration.

Tensors are read one by one from the cell and written a shard at a time, so that no model is held whole. Every file is
whole or absent, and `config.json`, without which nobody takes a folder for a model, comes last: what a kill leaves is
finished by the same command, to the same bytes."""

from __future__ import annotations

import json
import shutil
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from safetensors import safe_open

from harness.data.checkpoint import CONFIG, INDEX, TOKENIZER, WEIGHTS
from harness.data.files import atomic_path, write_json, write_text
from harness.data.sealed import read_object
from harness.data.tensor_file import write_tensors
from harness.portal.card import card
from harness.portal.cells import StoredCell
from kernels.dispatch import reference_only

if TYPE_CHECKING:
    from torch import Tensor

    from harness.compressed import PackedDescription
    from kernels.formats.packed import PackedLinear

MARK = "ptq_harness.json"  # in a folder of ours: which cell it is, in which format
ADAPTER = "adapter"  # the folder of a base's adapters
SHARD_BYTES = 4 * 2**30
BESIDE = (*TOKENIZER, "chat_template.jinja", "generation_config.json")  # of the uncompressed model, as they are

Tensors = Iterator[tuple[str, "Tensor"]]


@dataclass(frozen=True)
class Request:
    """What is exported, and where to; `option` is one of the exporter's own."""

    cell: StoredCell
    folder: Path
    option: str = ""
    shard_bytes: int = SHARD_BYTES


class Exporter(ABC):
    """A format that cells leave in."""

    options: tuple[str, ...] = ()  # of `--variant`; the first is the default
    holds_pairs: ClassVar[bool] = False  # whether a difference can leave in it, with the base it stands on

    @abstractmethod
    def write(self, request: Request) -> None:
        """Raises ValueError for a cell that the format cannot hold, before anything is written."""


class CellReader:
    """The stored tensors of a cell, a layer at a time."""

    def __init__(self, cell: StoredCell) -> None:
        from harness.compressed import PackedDescription

        self.folder = cell.store.folder
        self.description: PackedDescription = PackedDescription.read(self.folder / "packed.json")

    def layer(self, name: str) -> PackedLinear:
        """A packed layer with its tensors, and the table it shares; without its bias, which is among the rest."""
        from harness.compressed import TABLES, table_slug
        from kernels.formats.packed import PackedLinear
        from kernels.formats.tables import Table

        spec = {**self.description.layers[name], "bias": False}
        layer = PackedLinear.from_spec(spec)
        layer.load_state_dict(self._under(f"{name}."), assign=True)
        if layer.table_key:
            table = Table.from_spec(self.description.tables[layer.table_key])
            table.load_state_dict(self._under(f"{TABLES}.{table_slug(layer.table_key)}."), assign=True)
            layer.attach(table)
        return layer

    def _under(self, prefix: str) -> dict[str, Tensor]:
        with safe_open(self.folder / "packed.safetensors", framework="pt") as handle:
            return {
                name[len(prefix) :]: handle.get_tensor(name) for name in handle.offset_keys() if name.startswith(prefix)
            }

    def rest(self) -> Tensors:
        """Embeddings, head, norms and biases, in 16 bits."""
        yield from self._file("rest")

    def packed(self) -> Tensors:
        """Every stored tensor of the block weights under its own name, tables and uncovered weights included."""
        yield from self._file("packed")

    def uncovered(self) -> Tensors:
        """Block weights that no method covers."""
        owned = (*(f"{name}." for name in self.description.layers), "shared_tables.")
        yield from ((name, tensor) for name, tensor in self.packed() if not name.startswith(owned))

    def _file(self, name: str) -> Tensors:
        with safe_open(self.folder / f"{name}.safetensors", framework="pt") as handle:
            yield from ((key, handle.get_tensor(key)) for key in handle.offset_keys())


def claim(request: Request, format: str) -> None:
    """Make the folder, or take one that this very export began. Raises ValueError for any other."""
    folder, mark = request.folder, {"cell": request.cell.store.key, "format": format, "variant": request.option}
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file: give a new folder with --to")
    begun = (folder / MARK).is_file() and read_object(folder / MARK) == mark
    if not begun and folder.exists() and any(folder.iterdir()):
        raise ValueError(f"{folder} holds something else: give a new folder with --to")
    write_json(folder / MARK, mark)


@reference_only()
def write_folder(
    request: Request,
    format: str,
    tensors: Callable[[], Tensors],
    quantization: dict[str, Any] | None,
    load: str,
    dtype: str,
) -> None:
    """The folder with these tensors, and this `quantization_config`; `load` is the Python that the card shows,
    `dtype` what a loader computes in."""
    spec, store = request.cell.artifact.spec, request.cell.store
    claim(request, format)
    _write_shards(request.folder, tensors(), request.shard_bytes)
    for file in sorted({path for pattern in BESIDE for path in spec.model.path.glob(pattern) if path.is_file()}):
        with atomic_path(request.folder / file.name) as temporary:
            shutil.copyfile(file, temporary)
    if not any(request.folder.glob("tokenizer*")):
        raise ValueError(f"{spec.model.path} holds no tokenizer any more: give the model back its place, then export")
    write_text(request.folder / "README.md", card(request.cell, format, load))
    config = json.loads((store.folder / CONFIG).read_text(encoding="utf-8"))
    config["dtype"] = dtype
    config.pop("_name_or_path", None)
    write_json(request.folder / CONFIG, config | ({"quantization_config": quantization} if quantization else {}))


def write_adapter(request: Request) -> None:
    """Beside a base: the cell's adapters, as peft saved them."""
    shutil.copytree(request.cell.store.adapter, request.folder / ADAPTER, dirs_exist_ok=True)


def _write_shards(folder: Path, tensors: Tensors, shard_bytes: int) -> None:
    """One file, or numbered ones with an index. What they are called depends on how many there are, so that they are
    numbered when all are written; those of an interrupted export are written again."""
    for stale in (*folder.glob("model*.safetensors"), folder / INDEX):
        stale.unlink(missing_ok=True)
    parts: list[list[str]] = []
    total = 0
    for part in _groups(tensors, shard_bytes):
        parts.append(list(part))
        total += sum(tensor.numel() * tensor.element_size() for tensor in part.values())
        with atomic_path(folder / f"model-part-{len(parts)}.safetensors") as path:
            write_tensors(path, part, {"format": "pt"})
    names = [WEIGHTS] if len(parts) == 1 else [_shard(i + 1, len(parts)) for i in range(len(parts))]
    for number, name in enumerate(names, 1):
        (folder / f"model-part-{number}.safetensors").rename(folder / name)
    if len(parts) > 1:
        weight_map = {key: name for name, keys in zip(names, parts, strict=True) for key in keys}
        write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})


def _shard(number: int, count: int) -> str:
    return f"model-{number:05d}-of-{count:05d}.safetensors"


def _groups(tensors: Tensors, shard_bytes: int) -> Iterator[dict[str, Tensor]]:
    group: dict[str, Tensor] = {}
    held = 0
    for name, tensor in tensors:
        size = tensor.numel() * tensor.element_size()
        if group and held + size > shard_bytes:
            yield group
            group, held = {}, 0
        group[name], held = tensor.contiguous(), held + size
    if group:
        yield group
