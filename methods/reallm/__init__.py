"""ReALLM (Leconte, Bedin, Nguyen, Moulines; arXiv 2405.13155): W ~ Q + L1 L2, Q a vector-quantised latent of an
autoencoder.

By default the decoder is the identity, the form the released code uses for every language model it evaluates: Q is a
k-means codebook over short vectors under block scales, plus a low-rank part. `decoder=mlp` and `decoder=conv` offer
neural ones to the plan beside it. Variants:

    data-free    the paper's alternation of SVD and vector quantisation                       methods.reallm.data_free
    released     the same with the settings of the authors' code: 2 bits nominal, 2.78 stored on Llama-2-7B
    calibrated   the same stored form, every choice made against the layer's Hessian          methods.reallm.calibrated
    blockwise    that, and the real numbers of each block trained                             methods.reallm.blockwise
    finetuned    that, and then low-rank factors and row magnitudes (DoRA) end to end         harness.compress.training

README.md beside this file lists the paper's claims, ours, and each divergence.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from kernels.formats.conv import ConvLinear
from kernels.formats.layer import LayerConfig, LayerSpec
from kernels.formats.mlp_table import MlpTable
from kernels.formats.stored import StoredBits
from kernels.formats.tables import Table
from methods.adapted import check_adapters, usual_rank
from methods.base import Adaptation, Block, Compressed, Method, Needs, Sensitivity, Track, layer_seed
from methods.codecs.conv_training import unlikeness
from methods.codecs.error_feedback import check_damp
from methods.codecs.mlp_training import fit_mlp_table
from methods.codecs.svd import svd_factors
from methods.codecs.vector import block_absmax, fit_table, gaussian_error, table_sample
from methods.reallm.blockwise import Schedule, tune_block
from methods.reallm.calibrated import compress_calibrated, followed
from methods.reallm.data_free import compress_conv, compress_data_free

# (vector length, index bits) of a codebook of a matrix's own: 1.5 to 6 bits a weight; longer ones cost small matrices
# more than they gain.
SHAPES = ((2, 3), (4, 6), (4, 7), (2, 4), (4, 8), (2, 5), (2, 6), (2, 7), (2, 8), (2, 9), (1, 5), (1, 6))
SHARED_SHAPES = ((4, 9), (4, 10), (4, 11), (4, 12))  # of one that all matrices of a kind share
DECODERS = ("identity", "mlp", "conv")
CONV = dict(
    patch=64, latent_bits=2, stages=1, width=12, weight_bits=6, block=64, reorder=True
)  # decoders that draw matrices
CONV_CHANNELS = (
    2,
    3,
    4,
)  # of the latents: 1, 1.5 and 2 bits a weight; at more they lose to vectors wherever it was tried
CONV_UNLIKE = (
    0.85  # `unlikeness` of rows beyond which no decoder has been seen to beat vectors: none is trained for an estimate
)
MLP_LOSS = (
    1.03  # squared error of a table drawn by a decoder over that of the plain one: 1.01 to 1.05 for K = 256 to 4096
)
SHARES = ("none", "kind", "model")
MAX_RANK = 32
BLOCKS = (64, 128)  # columns under one scale
MIXED_RANKS = (0, 2, 4, 8, 16)


@dataclass(frozen=True, kw_only=True)
class ReALLM(Method):
    name: ClassVar[str] = "reallm"
    version: ClassVar[int] = 3
    variants: ClassVar[dict[str, dict[str, Any]]] = {
        "calibrated": {"calibrated": True},
        "data-free": {"calibrated": False},
        "blockwise": {"epochs": 2},
        "finetuned": {"epochs": 2, "finetune": True, "row_scales": True},
        "released": {
            "calibrated": False,
            "share": "none",
            "dim": 2,
            "index_bits": 4,
            "block": 64,
            "rank": 64,
            "adapter_bits": 16,
            "band": 64,
            "order_bits": 16,
            "row_scales": True,
            "rounds": 100,
            "tolerance": 0.0,
        },
    }

    calibrated: bool = True
    dim: int | None = None
    index_bits: int | None = None
    rank: int | None = None
    block: int | None = None
    scales: str = "double"
    along: str = "rows"  # what a vector's weights are consecutive along; "columns" for data-free alone
    adapter_bits: int = 8
    band: int = 0  # data-free: rows that share an order of the columns; 0 leaves them in place
    order_bits: int | None = None  # of an index in it; None: as few as hold it
    row_scales: bool = False  # DoRA's magnitudes: data-free fitted, finetuned trained
    rounds: int = 10  # data-free: alternations at most
    tolerance: float = 1e-3  # data-free: stop at a smaller relative gain
    act_order: bool = True  # calibrated
    damp: float = 0.1  # calibrated: share of mean diag(H) added to it
    refit: int = 6  # calibrated: conjugate-gradient steps on the codebook
    follow: float = 0.5  # calibrated: share of the inputs' drift that weights, and blocks as they are tuned, take back
    decoder: str = "identity"  # on offer beside the identity: "mlp" for shared tables; data-free, in mixed plans: "conv", for a matrix
    share: str = "kind"  # whose matrices the large codebooks serve: those of a kind, or all of the model's
    epochs: int = 0  # of block-wise tuning
    rate: float = 4e-3  # of its optimiser, relative to each tensor's size
    batch: int = 1  # windows per step of it
    finetune: bool = False  # train the low-rank part end to end, and row_scales if there are any
    lora_rate: float = 3e-4  # of that; these factors start fitted

    def __post_init__(self) -> None:
        if (self.dim is None) != (self.index_bits is None):
            raise ValueError("give dim and index_bits together")
        if self.dim is not None and (self.dim not in (1, 2, 4, 8) or not 1 <= (self.index_bits or 0) <= 12):
            raise ValueError("dim must be 1, 2, 4 or 8 and index_bits 1 to 12")
        if self.rounds < 1 or self.refit < 0:
            raise ValueError("rounds must be at least 1, refit not negative")
        check_damp(self.damp)
        if self.rank is not None and self.rank < 0:
            raise ValueError("rank must not be negative")
        if self.block is not None and self.block < 1:
            raise ValueError("block must be at least 1")
        if self.calibrated and self.band:
            raise ValueError("column orders (band) belong to reallm:data-free")
        if self.calibrated and self.row_scales and not self.finetune:
            raise ValueError("row_scales are fitted by reallm:data-free or trained by reallm:finetuned")
        if self.finetune and (not self.calibrated or self.rank == 0):
            raise ValueError("finetune needs the calibrated variant, and a rank of at least 1")
        check_adapters(self.rank or None, self.adapter_bits, self.lora_rate)
        if self.along not in ("rows", "columns") or (self.calibrated and self.along != "rows"):
            raise ValueError(
                "along must be rows, or with reallm:data-free columns: error feedback goes from column to column"
            )
        if self.band < 0 or (self.along == "rows" and self.band % (self.dim or 4)):
            raise ValueError("band must be a multiple of the vector length")
        if self.order_bits is not None and not (self.band and 1 <= self.order_bits <= 16):
            raise ValueError("order_bits must be 1 to 16, and needs a band")
        if self.decoder not in DECODERS:
            raise ValueError(f"decoder must be one of {', '.join(DECODERS)}")
        if self.decoder == "conv" and self.calibrated:
            raise ValueError(
                "a convolutional decoder is trained on the weights alone: write reallm:data-free,decoder=conv"
            )
        if self.share not in SHARES:
            raise ValueError(f"share must be one of {', '.join(SHARES)}")
        if not 0 <= self.follow <= 1:
            raise ValueError("follow must be 0 to 1")
        if self.epochs < 0 or self.batch < 1 or not 0 < self.rate < 1:
            raise ValueError("epochs must not be negative, batch at least 1, rate between 0 and 1")
        if self.epochs and not self.calibrated:
            raise ValueError("block-wise tuning (epochs) needs the calibrated variant")
        if self.scales not in ("half", "double"):
            raise ValueError("scales must be half or double")

    @property
    def _forms(self) -> tuple[str, ...]:
        """Of shared tables on offer."""
        if self.share == "none":
            return ()
        return ("plain", "mlp") if self.decoder == "mlp" else ("plain",)

    @property
    def track(self) -> Track:
        if self.epochs or self.finetune:
            return Track.FINE_TUNED
        return Track.CALIBRATED if self.calibrated else Track.DATA_FREE

    @property
    def adaptation(self) -> Adaptation | None:
        return Adaptation(self.lora_rate, dora=self.row_scales) if self.finetune else None

    @property
    def needs(self) -> Needs:
        return Needs(hessian=self.calibrated, original=self.calibrated and (self.follow > 0 or self.epochs > 0))

    def candidates(self, layer: LayerSpec) -> list[LayerConfig]:
        own = {"table": "learnt"}
        if self.dim is not None:
            shapes = [(self.dim, self.index_bits, own)]
        else:
            group = layer.kind if self.share == "kind" else self.share
            forms = [{"table": form, "share": group} for form in self._forms]
            shapes = [(*shape, own) for shape in SHAPES] + [(*shape, form) for shape in SHARED_SHAPES for form in forms]
        if self.rank is not None:
            ranks: Sequence[int] = (self.rank,)
        else:
            # With training to come the budget cannot tell what a rank is worth: every matrix gets what other methods
            # give it.
            ranks = (usual_rank(layer),) if self.finetune else range(MAX_RANK + 1)
        extras: dict[str, Any] = {"along": self.along} if self.along != "rows" else {}
        if self.band or self.row_scales:
            extras |= {"band": self.band, "order_bits": self.order_bits or 0, "row_scales": self.row_scales}
        return [
            LayerConfig.of(
                "codebook",
                dim=dim,
                index_bits=bits,
                block=block,
                scales=self.scales,
                rank=rank,
                adapter_bits=self.adapter_bits,
                **table,
                **extras,
            )
            for dim, bits, table in shapes
            for block in (BLOCKS if self.block is None else (self.block,))
            for rank in ranks
            if rank < min(layer.in_features, layer.out_features) and layer.in_features <= 2 ** (self.order_bits or 16)
        ]

    def family(self, config: LayerConfig) -> LayerConfig:
        return config.without("rank") if self.finetune and self.rank is None else config

    def mixed_candidates(self, layer: LayerSpec) -> list[LayerConfig]:
        mixable = [
            config
            for config in self.candidates(layer)
            if self.rank is not None or self.finetune or config["rank"] in MIXED_RANKS
        ]
        if self.decoder != "conv":
            return mixable
        # With a low-rank part of its own choice it has not been seen to win: what makes rows alike is of low rank.
        form = CONV | {"scales": self.scales, "adapter_bits": self.adapter_bits, "rank": self.rank or 0}
        return mixable + [LayerConfig.of("conv", latent_channels=count, **form) for count in CONV_CHANNELS]

    def expected_costs(
        self, weight_OI: Tensor, sensitivity: Sensitivity, layer: LayerSpec, configs: Sequence[LayerConfig], seed: int
    ) -> list[float]:
        """The low-rank part for real (diagonally whitened), the codebook by what it leaves of normal weights of that
        scale; a convolutional decoder by training it, where rows are alike enough, and elsewhere as if it drew
        nothing."""
        root_I = sensitivity.column_I.sqrt().clamp_min(torch.finfo(torch.float32).tiny)
        ranks, blocks = ({config[key] for config in configs} for key in ("rank", "block"))
        left_OR, right_RI = svd_factors(weight_OI * root_I, max(ranks), None, seed)
        scale_cost, drawn_cost = {}, {}
        for rank in ranks:
            rest_OI = weight_OI - left_OR[:, :rank] @ right_RI[:rank] / root_I
            for block in blocks:
                column_GS = torch.nn.functional.pad(sensitivity.column_I, (0, -layer.in_features % block)).view(
                    -1, block
                )
                scale_cost[rank, block] = float(
                    sensitivity.row_O @ block_absmax(rest_OI, block).square() @ column_GS.sum(dim=1)
                )
            drawn = [config for config in configs if config.format == "conv" and config["rank"] == rank]
            alike = bool(drawn) and unlikeness(rest_OI) < CONV_UNLIKE
            for config in drawn:
                error_OI = (
                    weight_OI - self.compress(weight_OI, None, layer, config, seed).packed.decode()
                    if alike
                    else rest_OI
                )
                drawn_cost[config] = sensitivity.cost(error_OI)
        return [
            drawn_cost[c] if c.format == "conv" else 0.5 * _unit_error(c) * scale_cost[c["rank"], c["block"]]
            for c in configs
        ]

    def preference(self, config: LayerConfig, bits: StoredBits, weights: int) -> tuple[float, ...]:
        """At equal index bits longer vectors, then smaller blocks, then the largest rank that fits."""
        codes, total = super().preference(config, bits, weights)
        return (config["index_bits"] / config["dim"], config["dim"], -config["block"], total)

    def fit_tables(
        self, plan: Mapping[str, LayerConfig], layers: Sequence[LayerSpec], weight: Callable[[str], Tensor], seed: int
    ) -> dict[str, Table]:
        tables: dict[str, Table] = {}
        latest: dict[int, Tensor] = {}
        for key in sorted({config.table_key for config in plan.values() if config.table_key}):
            users = [layer.name for layer in layers if plan[layer.name].table_key == key]
            config, own_seed = plan[users[0]], layer_seed(seed, key)
            entries = 2 ** config["index_bits"]
            matrices = ((weight(name), plan[name]["block"]) for name in users)
            sample = table_sample(matrices, len(users), config["dim"], entries, own_seed, self.along)
            table = config.table(sample[0].device)
            if isinstance(table, MlpTable):
                tables[key] = fit_mlp_table(*sample, table, seed=own_seed)
            else:
                latest[entries] = fit_table(*sample, entries, own_seed, latest.get(entries))
                table.fill(values=latest[entries].half())
                tables[key] = table
        return tables

    def compress_block(self, block: Block, plan: Mapping[str, LayerConfig], seed: int) -> None:
        done: dict[str, Compressed] = {}
        for stage in block.stages():
            hessian_II = block.hessian(stage[0]) if self.calibrated else None
            drift_II = block.drift(stage[0]) if self.needs.original and self.follow else None
            for name in stage:
                weight_OI = block.weight(name)
                if drift_II is not None:
                    weight_OI = followed(weight_OI, hessian_II, drift_II, self.follow)
                table = block.tables.get(plan[name].table_key)
                done[name] = self.compress(
                    weight_OI, hessian_II, block.layers[name], plan[name], layer_seed(seed, name), table
                )
                block.install(name, done[name])
        if self.epochs:
            packed = {name: compressed.packed for name, compressed in done.items()}
            report = tune_block(block, packed, Schedule(self.epochs, self.rate, self.batch, self.follow), seed)
            for name, compressed in done.items():
                block.install(name, Compressed(compressed.packed, compressed.report | report))

    def compress(
        self,
        weight_OI: Tensor,
        hessian_II: Tensor | None,
        layer: LayerSpec,
        config: LayerConfig,
        seed: int,
        table: Table | None = None,
    ) -> Compressed:
        packed = config.layout(layer, weight_OI.device)
        if table is not None:
            packed.attach(table)
        if isinstance(packed, ConvLinear):
            tensors, report = compress_conv(weight_OI, packed, seed=seed)
        elif self.calibrated:
            assert hessian_II is not None
            tensors, report = compress_calibrated(
                weight_OI, hessian_II, packed, act_order=self.act_order, damp=self.damp, refit=self.refit, seed=seed
            )
        else:
            tensors, report = compress_data_free(
                weight_OI, packed, rounds=self.rounds, tolerance=self.tolerance, seed=seed
            )
        packed.fill(**tensors)
        return Compressed(packed, report)


def _unit_error(config: LayerConfig) -> float:
    """Squared error per weight under scales of one."""
    error = gaussian_error(config["dim"], 2 ** config["index_bits"], config["block"])
    return MLP_LOSS * error if config["table"] == "mlp" else error
