"""What a run is: cells, each keyed by everything that decides its bytes, and the protocols they are scored by.

artifact key   method with its configuration and version, model, budget, way of allocation, calibration, seed, compute dtype, kind
               of device
result key     artifact key + protocol, or artifact key + zero-shot task
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from importlib.util import find_spec
from typing import Any

import torch

from harness.allocate import Allocation, BudgetError, require_mixable, uniform
from harness.assets import ResolvedModel
from harness.evaluate.score import BODY_TOKENS, HEAD_LOGITS
from harness.files import digest
from harness.finetune import KEPT_BYTES, kept_bytes
from harness.ledger import parse_budget
from harness.model import Inventory
from harness.protocol import Calibration, Protocol, Training, protocol_key
from harness.sensitivity import FISHER_TOKENS, GRADIENT_TOKENS, HEAD_TOKENS, HESSIAN_TOKENS, RANDOM_CONTEXT
from harness.tasks import Task
from methods.base import LayerSpec, Method, Track

ARTIFACT_VERSION = 2  # bump when the same cell would be written differently: another plan, measurement or training behind it


@dataclass(frozen=True)
class Budget:
    text: str  # as the user wrote it
    bpw: Fraction

    @classmethod
    def parse(cls, text: str) -> Budget:
        return cls(text.strip(), parse_budget(text))


@dataclass(frozen=True)
class Compute:
    """Where and in what arithmetic a cell runs. Dtype and kind of device are part of its key, threads are recorded."""

    device: str
    dtype: str
    threads: int


@dataclass(frozen=True)
class Cell:
    """The unit of work, isolation, resume and result. `refusal` says why a cell will not run."""

    method: Method
    method_text: str
    model: ResolvedModel
    budget: Budget | None  # None: the reference
    calibration: Calibration | None  # None: a method that looks at no data
    training: Training | None  # None: a method that trains nothing once the blocks are packed
    seed: int
    compute: Compute
    bos: str
    half: str = "float16"  # 16-bit type of everything that is not packed
    allocate: str = "uniform"  # harness.allocate.MODES
    allocation: Allocation | None = None  # None: refused, or made by the cell itself, which has the weights ("ilp")
    refusal: str = ""

    @property
    def key(self) -> str:
        # Absent rather than none: a cell that trains nothing keeps the key it had before anything could be trained.
        training = {"training": self.training.to_json()} if self.training else {}
        return digest(
            {
                **training,
                "artifact_version": ARTIFACT_VERSION,
                "method": self.method.to_json(),
                "model": self.model.fingerprint,
                "budget": str(self.budget.bpw) if self.budget else None,
                "allocate": self.allocate,
                "calibration": self.calibration.to_json() if self.calibration else None,
                "bos": self.bos if self.calibration or self.training else None,
                "seed": self.seed,
                "dtype": self.compute.dtype,
                "device": self.compute.device.partition(":")[0],
            }
        )[:16]

    @property
    def label(self) -> str:
        label = f"{self.method_text} {self.budget.text}" if self.budget else self.method_text
        return f"{label} seed {self.seed}" if self.seed else label

    def to_json(self, protocols: Sequence[Protocol], data: str | None, reference: str, tasks: Sequence[Task] = ()) -> dict[str, Any]:
        """Everything the cell's own process needs, and everything its result repeats."""
        return {
            "key": self.key,
            "reference": reference,
            "method": self.method.to_json(),
            "method_text": self.method_text,
            "model": self.model.to_json(),
            "budget": self.budget.text if self.budget else None,
            "calibration": self.calibration.to_json() if self.calibration else None,
            "training": self.training.to_json() if self.training else None,
            "bos": self.bos,
            "half": self.half,
            "allocate": self.allocate,
            "seed": self.seed,
            "device": self.compute.device,
            "dtype": self.compute.dtype,
            "threads": self.compute.threads,
            "protocols": {protocol_key(p): p.to_json() for p in protocols},
            "tasks": {task.key: task.to_json() for task in tasks},
            "data": data,
            "plan": {name: config.to_json() for name, config in self.allocation.layers.items()} if self.allocation else {},
        }


@dataclass(frozen=True)
class Plan:
    cells: tuple[Cell, ...]
    protocols: tuple[Protocol, ...]
    tasks: tuple[Task, ...] = ()

    @property
    def reference(self) -> Cell:
        """The uncompressed model everything is compared with: the first cell."""
        assert not self.cells[0].method.budgeted
        return self.cells[0]

    @property
    def key(self) -> str:
        tasks = [[task.key for task in self.tasks]] if self.tasks else []  # absent rather than empty: a run without has the folder it had
        return digest([[cell.key for cell in self.cells], [protocol_key(p) for p in self.protocols], *tasks])[:12]


def make_plan(
    methods: Iterable[tuple[str, Method]],
    budgets: Sequence[Budget],
    model: ResolvedModel,
    stock: Inventory,
    protocols: Sequence[Protocol],
    calibration: Calibration,
    training: Training,
    seeds: Sequence[int],
    compute: Compute,
    bos: str,
    half: str,
    allocate: str,
) -> Plan:
    """A cell for every method, budget and seed; a method outside any budget has one, and so has one that no seed can change."""
    cells: dict[str, Cell] = {}
    for text, method in methods:
        for budget in budgets if method.budgeted else (None,):
            mode = allocate if budget else "uniform"
            looks = calibration if method.track != Track.DATA_FREE and (mode == "ilp" or _uses_text(method)) else None
            trains = training if method.adaptation else None
            allocation, refusal = None, ""
            try:
                if budget and mode == "ilp":
                    require_mixable(method, stock, budget.bpw)
                else:
                    allocation = uniform(method, stock, budget.bpw if budget else None)
            except BudgetError as error:
                refusal = str(error)
            if trains and find_spec("peft") is None:
                refusal = "training adapters needs peft: pip install 'peft>=0.19'"
            for seed in seeds if method.seeded else (0,):
                cell = Cell(method, text, model, budget, looks, trains, seed, compute, bos, half, mode, allocation, refusal)
                cells.setdefault(cell.key, cell)
    return Plan(tuple(cells.values()), tuple(protocols))


def _uses_text(method: Method) -> bool:
    return method.needs.hessian or method.needs.fisher


def _rank(method: Method, layer: LayerSpec) -> int:
    return dict(method.candidates(layer)[0].hyper).get("rank", 0)


def predicted_peak_gib(cell: Cell, stock: Inventory, hidden: int, vocabulary: int) -> float:
    """Process memory a cell will need at most, in GiB: the most of its phases, each with the whole model loaded.

    Measuring what errors cost, for a mixed plan, holds the states of some windows in front of every block (and of all of them, a few
    times, at one), and the most of three: a Gram matrix for every layer of a block, one of them being factored; a window's
    activations, to go back through a block; copies of a slice of logits. Compressing holds every calibration token's hidden state
    (in and out) and, inside one block, its widest activations and a Hessian being factored; twice the states for a method that also
    looks at the uncompressed model's. Training holds what is needed on the way back and a window's logits a few times. Scoring holds
    one chunk of logits.
    """
    dtype_bytes = getattr(torch, cell.compute.dtype).itemsize
    calibration, layers = cell.calibration, stock.blocks[0].layers
    model = (stock.weights + stock.rest_weights) * dtype_bytes
    wide = max(layer.in_features for layer in stock.layers)
    inner = sum(layer.out_features for layer in layers)
    # A Hessian with its copies and factors; or a matrix being packed, and what is made of it.
    working = (7 if calibration else 3) * 4 * wide * wide
    measuring = 0
    if cell.allocate == "ilp":
        context = calibration.context if calibration else RANDOM_CONTEXT
        followed = FISHER_TOKENS if cell.method.needs.fisher else GRADIENT_TOKENS
        states = (4 * max(HESSIAN_TOKENS, context) + len(stock.blocks) * max(followed, context)) * hidden * dtype_bytes
        grams = working + sum(4 * layer.in_features**2 for layer in layers) if calibration else 0
        measuring = states + max(grams, 2 * context * (hidden + inner) * dtype_bytes, 6 * 4 * HEAD_TOKENS * vocabulary)
    tokens = calibration.context * calibration.sequences if calibration else 0
    streams = 2 if cell.method.needs.original else 1
    compressing = streams * tokens * (2 * hidden + inner) * dtype_bytes + working
    training = 0
    if cell.training:
        width = cell.training.windows.context
        kept = kept_bytes(stock, width, dtype_bytes)
        if kept > KEPT_BYTES:  # then one block's, and the states in front of all
            kept = kept // len(stock.blocks) + width * len(stock.blocks) * hidden * dtype_bytes
        factors = sum(_rank(cell.method, layer) * (layer.in_features + layer.out_features) for layer in stock.layers)
        training = kept + 5 * 4 * width * vocabulary + 4 * 4 * factors  # value, gradient and the optimiser's two moments
    scoring = BODY_TOKENS * (4 * hidden + 3 * wide) * dtype_bytes + 4 * 4 * max(HEAD_LOGITS, vocabulary)
    python = 0.6 * 2**30  # interpreter, torch and transformers
    return (model + max(measuring, compressing, training, scoring) + python) / 2**30
