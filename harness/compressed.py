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
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from harness.data.assets import ResolvedModel
from harness.data.files import atomic_path
from harness.data.record import Record
from harness.data.sealed import write_tensors
from harness.ledger import Ledger, payload_bytes
from harness.model import Inventory, empty_model, inventory
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
        packed: dict[str, Tensor] = {}
        rest: dict[str, Tensor] = {}
        shared = self._of_base
        seen: set[tuple[int, ...]] = set()
        for name, tensor in self.model.state_dict().items():
            if name in stored_names:
                packed[name] = tensor if name not in self.inventory.uncovered else tensor.to(half)
            elif (identity := (tensor.data_ptr(), *tensor.shape)) not in seen:  # tied tensors are stored once
                seen.add(identity)
                kept = tensor.to(half) if tensor.is_floating_point() else tensor
                if name not in shared or not torch.equal(kept, shared[name]):
                    rest[name] = kept
        for name, tensors in (("packed", packed), ("rest", rest)):
            contiguous = {key: value.contiguous().cpu() for key, value in tensors.items()}
            broken = [
                key
                for key, value in contiguous.items()
                if value.is_floating_point() and not torch.isfinite(value).all()
            ]
            if broken:
                raise ValueError(f"{broken[0]} is not finite at 16 bits ({len(broken)} tensors): nothing saved")
            with atomic_path(folder / f"{name}.safetensors") as path:
                write_tensors(contiguous, path)
        self.model.config.save_pretrained(folder)
        layers = {name: layer.spec() for name, layer in self.packed.items()}
        tables = {key: table.spec() for key, table in self.tables.items()}
        base = self.base.fingerprint if self.base else ""
        PackedDescription(self.half, layers, tables, base).write(folder / "packed.json")

    @property
    def _of_base(self) -> dict[str, Tensor]:
        """The base's tensors as this model would store them, by name."""
        half, tensors = HALF_DTYPES[self.half], self.base.tensors if self.base else {}
        return {name: t.to(half) if t.is_floating_point() else t for name, t in tensors.items()}

    @classmethod
    def load(cls, folder: Path, device: str, dtype: torch.dtype, base: ResolvedModel | None = None) -> CompressedModel:
        """Rebuild from the folder alone, and of a pair from its `base`; `dtype` is the compute dtype of everything that
        is not packed. Raises ValueError for another base than that of the folder, or none."""
        from transformers import AutoConfig

        model = empty_model(AutoConfig.from_pretrained(folder, dtype=dtype, trust_remote_code=False), dtype)
        stock = inventory(model)
        description = PackedDescription.read(folder / "packed.json")
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
        packed = load_file(folder / "packed.safetensors")
        rest = load_file(folder / "rest.safetensors")
        state = {name: t if name not in stock.uncovered else t.to(dtype) for name, t in packed.items()}
        is_bias = {f"{name}.bias" for name, m in model.named_modules() if isinstance(m, PackedLinear)}
        state |= {name: t.to(dtype) if t.is_floating_point() and name not in is_bias else t for name, t in rest.items()}
        if standing:  # what is not stored is the base's
            others = cls(model, stock, description.half, standing)._of_base
            own = model.state_dict().keys() & others.keys() - state.keys()
            state |= {
                name: others[name].to(dtype) if others[name].is_floating_point() else others[name] for name in own
            }
        missing, unexpected = model.load_state_dict(state, strict=False, assign=True)
        model.tie_weights()
        still_empty = [name for name, t in (*model.named_parameters(), *model.named_buffers()) if t.is_meta]
        if unexpected or still_empty:
            raise ValueError(
                f"{folder} does not match its own packed.json ({[*unexpected, *still_empty][0]}): "
                "delete it and run again"
            )
        # Stored tensors are what they are; and a product that gradients pass through is not a fused one.
        model.requires_grad_(False)
        loaded = cls(model.to(device).eval(), stock, description.half, standing)
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
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name not in linear_weights:
                parameter.copy_(parameter.to(half))
