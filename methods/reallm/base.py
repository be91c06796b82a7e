"""What the algorithms of ReALLM share: the stored form W ~ Q + L1 L2, its options, and the codebooks that matrices
share.

`ReALLM` adds a low-rank part to vector quantisation. `SharedCodebooks` offers long codebooks, one for all matrices of a
role or of the model, plain or drawn by a small perceptron, which the allocation buys where they are worth their
bits."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from kernels.formats.mlp_table import MlpTable
from kernels.formats.tables import Table
from kernels.registry import Registry
from methods.adapted import check_adapters
from methods.base import LayerConfig, LayerSpec, Method, Option, layer_seed
from methods.codecs.mlp_training import fit_mlp_table
from methods.codecs.vector import fit_table, table_sample
from methods.vector_quantised import Shape, VectorQuantised

SHARED_SHAPES = ((4, 9), (4, 10), (4, 11), (4, 12))  # (vector length, index bits) of codebooks that many matrices share
SHARES = ("none", "role", "model")
MAX_RANK = 32
MIXED_RANKS = (0, 2, 4, 8, 16)

VARIANTS: Registry[type[Method]] = Registry(
    "variant of reallm",
    Method,
    {
        "calibrated": "methods.reallm.calibrated:Calibrated",
        "data-free": "methods.reallm.data_free:DataFree",
        "blockwise": "methods.reallm.blockwise:Blockwise",
        "finetuned": "methods.reallm.finetuned:Finetuned",
        "distilled": "methods.reallm.distilled:Distilled",
        "released": "methods.reallm.released:Released",
    },
)


@dataclass(frozen=True, kw_only=True)
class ReALLM(VectorQuantised):
    """Vectors under block scales, and a low-rank part beside them."""

    name: ClassVar[str] = "reallm"
    version: ClassVar[int] = 4  # block scales in 4 bits

    rank: int | None = None
    adapter_bits: int = 8

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rank is not None and self.rank < 0:
            raise ValueError("rank must not be negative")
        check_adapters(self.rank or None, self.adapter_bits)

    @classmethod
    def variants(cls) -> dict[str, Method]:
        return {name: VARIANTS.get(name)() for name in VARIANTS}

    def ranks(self, layer: LayerSpec) -> Iterable[int]:
        return range(MAX_RANK + 1) if self.rank is None else (self.rank,)

    def extras(self) -> dict[str, Option]:
        return {"adapter_bits": self.adapter_bits}

    def mixed_candidates(self, layer: LayerSpec) -> list[LayerConfig]:
        found = self.candidates(layer)
        return [config for config in found if self.rank is not None or config["rank"] in MIXED_RANKS]


@dataclass(frozen=True, kw_only=True)
class SharedCodebooks(ReALLM):
    """Long codebooks on offer beside those of a matrix's own."""

    decoders: ClassVar[tuple[str, ...]] = ("identity", "mlp")

    decoder: str = "identity"  # on offer beside the identity: "mlp" draws shared tables
    share: str = "role"  # whose matrices a long codebook serves: those of a role, or all of the model's

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.decoder not in self.decoders:
            raise ValueError(f"decoder must be one of {', '.join(self.decoders)}")
        if self.share not in SHARES:
            raise ValueError(f"share must be one of {', '.join(SHARES)}")

    def shapes(self, layer: LayerSpec) -> list[Shape]:
        if self.dim is not None or self.share == "none":
            return super().shapes(layer)
        group = layer.role if self.share == "role" else self.share
        forms = ("plain", "mlp") if self.decoder == "mlp" else ("plain",)
        shared = [(*shape, {"table": form, "share": group}) for shape in SHARED_SHAPES for form in forms]
        return super().shapes(layer) + shared

    def fit_tables(
        self,
        configs: Mapping[str, LayerConfig],
        layers: Sequence[LayerSpec],
        weight: Callable[[str], Tensor],
        seed: int,
    ) -> dict[str, Table]:
        tables: dict[str, Table] = {}
        latest: dict[int, Tensor] = {}
        for key in sorted({config.table_key for config in configs.values() if config.table_key}):
            users = [layer.name for layer in layers if configs[layer.name].table_key == key]
            config, own_seed = configs[users[0]], layer_seed(seed, key)
            entries, along = 2 ** config["index_bits"], dict(config.hyper).get("along", "rows")
            matrices = ((weight(name), configs[name]["block"]) for name in users)
            sample = table_sample(matrices, len(users), config["dim"], entries, own_seed, along)
            table = config.table(sample[0].device)
            if isinstance(table, MlpTable):
                tables[key] = fit_mlp_table(*sample, table, seed=own_seed)
            else:
                latest[entries] = fit_table(*sample, entries, own_seed, latest.get(entries))
                table.fill(values=latest[entries].half())
                tables[key] = table
        return tables
