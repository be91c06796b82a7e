"""Blocks that are in memory only while they run, so that a model may be larger than memory.

A paged model is a model like any other whose blocks, between their uses, are shapes on the meta device. A block that is
called reads its tensors from the files they are in and lets go of them when it has run; whoever uses one for longer (a
whole text, a pass forward and back) holds it with `resident`. What is read are the bytes a whole model would hold, so
nothing that is computed differs. A block that was packed is read from its own file from then on.

A pass over thousands of tokens reads every weight once, which is little beside multiplying it: at 8192 tokens 16 kFLOP
to two bytes."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from harness.data import checkpoint
from harness.data.checkpoint import require_unchanged
from harness.data.tensor_file import TensorFile, in_files
from harness.model.linear_layers import otherwise_named
from harness.model.network import (
    as_published,
    decoder_blocks,
    read_config,
    require_finite,
    require_own,
    require_weights,
)
from kernels.formats.packed import PackedLinear
from kernels.views import forget

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from transformers import PreTrainedModel

PAGES = "_pages"  # the attribute of a model that is paged
WHOLE = "write --load whole"
Read = Callable[[], Tensor]  # the tensor of a name, from its file


class Pages:
    """Where the tensors of a model's blocks are when the blocks are not in memory."""

    def __init__(
        self, model: PreTrainedModel, prefix: str, sources: Mapping[str, Read], device: str | torch.device
    ) -> None:
        """`sources` by full name, those of blocks, whose list stands at `prefix`; each becomes of the dtype that it has
        in the model, on the `device`, where all else is put for good."""
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if not tensor.is_meta:
                put(model, name, tensor.detach().to(device))
        model.tie_weights()
        self.device, self.prefix = device, prefix
        self.blocks: list[nn.Module] = list(model.get_submodule(prefix).children())
        self.sources: list[dict[str, Read]] = [{} for _ in self.blocks]
        for name, read in sources.items():
            number, _, inside = name.removeprefix(f"{prefix}.").partition(".")
            self.sources[int(number)][inside] = read
        self._users = [0] * len(self.blocks)
        for index, block in enumerate(self.blocks):
            self._let_go(index)
            block.register_forward_pre_hook(self._hook(self._enter, index))
            block.register_forward_hook(self._hook(self._leave, index), always_call=True)
        model.__dict__[PAGES] = self

    @contextmanager
    def resident(self, index: int) -> Iterator[None]:
        self._enter(index)
        try:
            yield
        finally:
            self._leave(index)

    def packed_in(self, index: int, layers: Iterable[str], file: TensorFile) -> None:
        """From now on what is packed of a block's layers (full names) is read from this file."""
        prefix, sources = f"{self.prefix}.{index}.", self.sources[index]
        for name in layers:
            sources.pop(f"{name.removeprefix(prefix)}.weight", None)
        sources.update({name.removeprefix(prefix): partial(file.read, name) for name in file.specs})

    def rounded(self, half: torch.dtype, apart: Iterable[str]) -> None:
        """From now on what is read is rounded to 16 bits first, but for the tensors set `apart` (full names)."""
        kept = set(apart)
        for index, sources in enumerate(self.sources):
            for name, read in sources.items():
                if f"{self.prefix}.{index}.{name}" not in kept:
                    sources[name] = partial(_rounded, read, half)

    def read(self, name: str) -> Tensor | None:
        """A tensor of a block that is not in memory, by its full name, in the dtype of the model; None for any other,
        which is in memory."""
        if not name.startswith(f"{self.prefix}."):
            return None
        number, _, inside = name.removeprefix(f"{self.prefix}.").partition(".")
        index = int(number)
        if self._users[index] or inside not in self.sources[index]:
            return None
        return self.sources[index][inside]().to(held_in(self.blocks[index], inside).dtype)

    def _hook(self, change: Callable[[int], None], index: int) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            change(index)

        return hook

    def _enter(self, index: int) -> None:
        self._users[index] += 1
        if self._users[index] == 1:
            for name, read in self.sources[index].items():
                held = held_in(self.blocks[index], name)
                put(self.blocks[index], name, read().to(device=self.device, dtype=held.dtype))

    def _leave(self, index: int) -> None:
        self._users[index] -= 1
        if not self._users[index]:
            self._let_go(index)

    def _let_go(self, index: int) -> None:
        block = self.blocks[index]
        for name in self.sources[index]:
            put(block, name, torch.empty_like(held_in(block, name), device="meta"))
        for module in block.modules():
            if isinstance(module, PackedLinear):
                forget(module)


def load_by_blocks(path: Path, device: str, dtype: torch.dtype, fingerprint: str = "") -> PreTrainedModel:
    """The model of a folder, as `load_reference` gives it, paged. Raises ValueError as that does, of what is wrong with
    a block's weights when they are read; and where the files do not hold the model's tensors one by one, by the names
    that the modules have (transposed weights, experts in one tensor)."""
    config = read_config(path)
    require_unchanged(path, not fingerprint or checkpoint.fingerprint(path) == fingerprint)
    model = as_published(config, dtype)
    if others := otherwise_named(model):
        raise ValueError(f"{path} keeps weights otherwise than linear layers do ({others[0][0]} first): {WHOLE}")
    files = in_files(file for file in checkpoint.weight_files(path) if file.suffix == ".safetensors")
    prefix, own = decoder_blocks(model)[0], model.state_dict()
    inside = [name for name in own if name.startswith(f"{prefix}.")]
    rest = {name: files[name].read(name) for name in own.keys() & files.keys() - set(inside)}
    require_finite(path, rest)
    model.load_state_dict({name: t.to(own[name].dtype) for name, t in rest.items()}, strict=False, assign=True)
    model.tie_weights()
    held = (*model.named_parameters(), *model.named_buffers())
    if lacking := sorted({n for n, t in held if t.is_meta and n not in inside} | (set(inside) - files.keys())):
        raise ValueError(
            f"{path} cannot be read block by block: it lacks {len(lacking)} tensors by the names that its modules have "
            f"({lacking[0]} first): {WHOLE}"
        )
    ignored = "|".join(model._keys_to_ignore_on_load_unexpected or ()) or "$^"
    unknown = [name for name in files.keys() - own.keys() if not re.search(ignored, name)]
    require_own(path, "holds", "that its config.json has no place for: it is another model's", unknown)
    mismatched = [n for n in own.keys() & files.keys() if files[n].specs[n].shape != tuple(own[n].shape)]
    require_own(path, "holds", "of other sizes than its config.json says: it is another model's", mismatched)
    require_weights(path, (files[name].read(name) for name in inside if own[name].ndim >= 2))
    Pages(model, prefix, {name: partial(_finite, path, files[name], name) for name in inside}, device)
    model.config.name_or_path = str(path)
    return model.eval()


def _finite(path: Path, file: TensorFile, name: str) -> Tensor:
    tensor = file.read(name)
    require_finite(path, {name: tensor})
    return tensor


def pages_of(model: nn.Module) -> Pages | None:
    return model.__dict__.get(PAGES)


def resident(model: nn.Module, index: int) -> AbstractContextManager[None]:
    """Inside, the block's tensors are in memory, as those of a model that is not paged always are."""
    pages = pages_of(model)
    return nullcontext() if pages is None else pages.resident(index)


def tensor_of(model: nn.Module, name: str) -> Tensor:
    """A parameter or buffer of the model, read where it is not in memory."""
    pages = pages_of(model)
    found = pages.read(name) if pages else None
    return held_in(model, name) if found is None else found


def settle(model: nn.Module) -> None:
    """Have all blocks in memory from now on."""
    if pages := pages_of(model):
        for index in range(len(pages.blocks)):
            pages._enter(index)


def _rounded(read: Read, half: torch.dtype) -> Tensor:
    tensor = read()
    return tensor.to(half) if tensor.is_floating_point() else tensor


def held_in(module: nn.Module, name: str) -> Tensor:
    """A parameter or buffer by its dotted name."""
    owner, _, leaf = name.rpartition(".")
    holder = module.get_submodule(owner)
    parameter, buffer = holder._parameters.get(leaf), holder._buffers.get(leaf)
    found = buffer if parameter is None else parameter
    assert found is not None, f"there is no {name}"
    return found


def put(module: nn.Module, name: str, value: Tensor) -> None:
    """Set it."""
    owner, _, leaf = name.rpartition(".")
    holder = module.get_submodule(owner)
    known = holder._parameters.get(leaf)
    if known is None:
        holder._buffers[leaf] = value
    else:
        holder._parameters[leaf] = nn.Parameter(value, requires_grad=known.requires_grad)
