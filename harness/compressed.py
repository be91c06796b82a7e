"""`CompressedModel`: a causal language model whose block linears are packed, as one folder on disk and one module in
memory.

packed.safetensors   the stored tensors of the block weights; its payload is exactly the ledger's stored bits
rest.safetensors     embeddings, head, norms and biases at 16 bits
packed.json          shapes and enums of every packed layer, never a learnt number; of a pair the base's fingerprint
config.json          the architecture

Of a model that is a pair the files hold the difference alone: no weight of the base, and of the rest nothing that is
the same in the base, bit for bit."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor, nn

from harness.data.assets import ResolvedModel
from harness.data.files import atomic_path
from harness.data.record import Record
from harness.data.tensor_file import TensorSpec, in_files, write_tensor_file
from harness.ledger import Ledger, payload_bytes
from harness.model import Inventory, decoder_blocks, empty_model, inventory
from harness.model.paging import Pages, pages_of, tensor_of
from harness.model.pair import Base
from kernels.dispatch import kind
from kernels.formats.bits import Spec, StoredBits
from kernels.formats.delta import DeltaLinear
from kernels.formats.dense import HALF_DTYPES
from kernels.formats.packed import PackedLinear
from kernels.formats.tables import Table

if TYPE_CHECKING:
    from transformers import PreTrainedModel

FILES = ("packed.safetensors", "rest.safetensors", "packed.json", "config.json")
TABLES = "shared_tables"  # the attribute of the model that holds them
KINDS = (
    "dense",
    "fused",
    "fused-16",
    "decode-per-call",
    "decode-on-load",
)  # a model is of the last kind any of its layers is


@dataclass(frozen=True)
class PackedDescription(Record):
    """packed.json: what every packed module of a model is, by name, complete enough to build it empty."""

    # 1  all there are
    VERSION: ClassVar[int] = 1

    half: str
    layers: dict[str, Spec]
    tables: dict[str, Spec] = field(default_factory=dict)
    base: str = ""  # fingerprint of the model that this one is the difference to


@dataclass
class CompressedModel:
    """A causal language model with packed block linears, on disk and in memory."""

    model: PreTrainedModel
    inventory: Inventory
    half: str  # 16-bit type of everything that is not packed: "float16" or "bfloat16"
    base: Base | None = None  # of a pair

    @property
    def packed(self) -> dict[str, PackedLinear]:
        """By name; what such a layer is made of is a part of it."""
        found: dict[str, PackedLinear] = {}
        outer = ""
        for name, module in self.model.named_modules():  # an outer module in front of what is inside it
            if isinstance(module, PackedLinear) and not (outer and name.startswith(f"{outer}.")):
                found[outer := name] = module
        return found

    @property
    def tables(self) -> dict[str, Table]:
        """Those that layers share, by the key they are asked for with."""
        tables = getattr(self.model, TABLES, nn.ModuleDict()).items()
        return {_key(name): table for name, table in tables if isinstance(table, Table)}

    def ledger(self) -> Ledger:
        bits = sum((module.stored_bits() for module in self._stored), StoredBits())
        return Ledger(bits, self.inventory.uncovered_bits, self.inventory.weights)

    @property
    def resident_bpw(self) -> float:
        bits = sum(module.resident_bits for module in self._stored)
        return (bits + self.inventory.uncovered_bits) / self.inventory.weights

    @property
    def _stored(self) -> list[PackedLinear | Table]:
        return [*self.packed.values(), *self.tables.values()]

    @property
    def decode_seconds(self) -> float:
        """What decoding layers took when the model was loaded, where a kernel asks for that."""
        return sum(getattr(layer, "decode_seconds", None) or 0.0 for layer in self.packed.values())

    @property
    def kind(self) -> str:
        device = next(self.model.parameters()).device.type
        return KINDS[max(KINDS.index(kind(layer, device)) for layer in self.packed.values())]

    def save(self, folder: Path) -> None:
        """Write the four files, each whole or absent; `packed.json` comes last and marks the folder as complete."""
        stored_names = {f"{name}.{leaf}" for name, layer in self.packed.items() for leaf in layer.stored_parts()}
        stored_names |= {
            f"{TABLES}.{table_slug(key)}.{leaf}" for key, table in self.tables.items() for leaf in table.stored_parts()
        }
        stored_names |= set(self.inventory.uncovered)
        half = HALF_DTYPES[self.half]
        packed: dict[str, TensorSpec] = {}
        rest: dict[str, TensorSpec] = {}
        shared = self._of_base
        seen: set[tuple[object, ...]] = set()
        for name, tensor in self.model.state_dict().items():
            rounded = TensorSpec.of(tensor, half if tensor.is_floating_point() else None)
            if name in stored_names:
                packed[name] = TensorSpec.of(tensor) if name not in self.inventory.uncovered else rounded
                continue
            # Tied tensors are stored once; of those that are not in memory none is tied.
            identity = (name,) if tensor.is_meta else (tensor.data_ptr(), *tensor.shape)
            if identity not in seen:
                seen.add(identity)
                if name not in shared or not torch.equal(tensor.to(rounded.dtype), shared[name]):
                    rest[name] = rounded
        for file, specs in (("packed", packed), ("rest", rest)):
            with atomic_path(folder / f"{file}.safetensors") as path:
                write_tensor_file(path, specs, partial(self._stored_as, specs))
        self.model.config.save_pretrained(folder)
        layers = {name: layer.spec() for name, layer in self.packed.items()}
        tables = {key: table.spec() for key, table in self.tables.items()}
        base = self.base.fingerprint if self.base else ""
        PackedDescription(self.half, layers, tables, base).write(folder / "packed.json")

    def _stored_as(self, specs: Mapping[str, TensorSpec], name: str) -> Tensor:
        """A tensor of the model as it is stored. Raises ValueError for one that 16 bits cannot hold."""
        tensor = tensor_of(self.model, name).detach().to("cpu", specs[name].dtype)
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise ValueError(f"{name} is not finite at 16 bits: nothing saved")
        return tensor

    @property
    def _of_base(self) -> dict[str, Tensor]:
        """The base's tensors as this model would store them, by name."""
        half, tensors = HALF_DTYPES[self.half], self.base.tensors if self.base else {}
        return {name: t.to(half) if t.is_floating_point() else t for name, t in tensors.items()}

    @classmethod
    def load(
        cls,
        folder: Path,
        device: str,
        dtype: torch.dtype,
        base: ResolvedModel | None = None,
        *,
        by_blocks: bool = False,
    ) -> CompressedModel:
        """Rebuild from the folder alone, and of a pair from its `base`; `dtype` is the compute dtype of everything that
        is not packed. With `by_blocks` blocks are in memory while they run (harness.model.paging); a pair is always
        whole. Raises ValueError for another base than that of the folder, or none."""
        from transformers import AutoConfig

        model = empty_model(AutoConfig.from_pretrained(folder, dtype=dtype, trust_remote_code=False), dtype)
        stock = inventory(model)
        description = PackedDescription.read(folder / "packed.json")
        by_blocks = by_blocks and base is None
        if description.base != (base.fingerprint if base else ""):
            given = f"{base.name} ({base.fingerprint[:12]})" if base else "none"
            raise ValueError(
                f"{folder} is the difference to a base of fingerprint {description.base[:12] or 'none'}, "
                f"and the base given is {given}: give the one it was made with"
            )
        standing = Base.load(base, device) if base else None
        for name, spec in description.layers.items():
            layer = PackedLinear.from_spec(spec)
            if isinstance(layer, DeltaLinear) and standing:
                layer.stand_on(standing.weight(name))
            model.set_submodule(name, layer)
        attach_tables(model, {key: Table.from_spec(spec) for key, spec in description.tables.items()})
        files = in_files(folder / f"{name}.safetensors" for name in ("packed", "rest"))
        prefix = f"{decoder_blocks(model)[0]}."
        paged = {name for name in files if by_blocks and name.startswith(prefix)}
        is_bias = {f"{name}.bias" for name, m in model.named_modules() if isinstance(m, PackedLinear)}

        def computed(name: str) -> Tensor:
            """In the dtype that it computes in; what is packed, as it is stored."""
            tensor, stays = files[name].read(name), name in is_bias or name in packed
            return tensor if stays or not tensor.is_floating_point() else tensor.to(dtype)

        packed = {name for name, file in files.items() if file.path.stem == "packed"} - stock.uncovered.keys()
        state = {name: computed(name) for name in files.keys() - paged}
        if standing:  # what is not stored is the base's
            others = cls(model, stock, description.half, standing)._of_base
            own = model.state_dict().keys() & others.keys() - state.keys()
            state |= {
                name: others[name].to(dtype) if others[name].is_floating_point() else others[name] for name in own
            }
        unexpected = sorted(paged - model.state_dict().keys())
        unexpected += model.load_state_dict(state, strict=False, assign=True).unexpected_keys
        model.tie_weights()
        held = dict((*model.named_parameters(), *model.named_buffers()))
        still_empty = [name for name, t in held.items() if t.is_meta and name not in paged]
        if unexpected or still_empty:
            raise ValueError(
                f"{folder} does not match its own packed.json ({[*unexpected, *still_empty][0]}): "
                "delete it and run again"
            )
        # Stored tensors are what they are; and a product that gradients pass through is not a fused one.
        model.requires_grad_(False)
        if by_blocks:
            Pages(model, prefix.removesuffix("."), {name: partial(computed, name) for name in paged}, device)
        else:
            model.to(device)
        loaded = cls(model.eval(), stock, description.half, standing)
        assert 8 * payload_bytes(folder / "packed.safetensors") == loaded.ledger().stored_bits, (
            "payload and ledger disagree"
        )
        return loaded


def attach_tables(model: nn.Module, tables: Mapping[str, Table]) -> None:
    """Make the model own the tables, and every packed layer that shares one decode from it."""
    if not tables:
        return
    setattr(model, TABLES, nn.ModuleDict({table_slug(key): table for key, table in tables.items()}))
    for layer in model.modules():
        if isinstance(layer, PackedLinear) and layer.table_key:
            layer.attach(tables[layer.table_key])


def table_slug(key: str) -> str:
    return key.replace(".", "/")  # a module's name holds no dot, and no key a slash


def _key(slug: str) -> str:
    return slug.replace("/", ".")


def round_rest(model: PreTrainedModel, stock: Inventory, half: torch.dtype) -> None:
    """Round everything that is not a block linear to its stored 16 bits, so that calibration sees what scoring will
    see."""
    linear_weights = {f"{layer.name}.weight" for layer in stock.layers}
    if pages := pages_of(model):
        pages.rounded(half, linear_weights)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name not in linear_weights and not parameter.is_meta:
                parameter.copy_(parameter.to(half))
