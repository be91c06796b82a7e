"""What a run is: cells, each keyed by everything that decides its bytes, and the protocols they are scored by.

artifact key   method with its configuration and versions, model, budget, way of allocation, calibration, seed,
               compute dtype, type of device
result key     artifact key + protocol, or artifact key + zero-shot task
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from importlib.util import find_spec

from harness.data.assets import ResolvedModel
from harness.data.files import digest
from harness.data.protocols import Calibration, Protocol, Training, also_seen, protocol_key
from harness.data.tasks import Task
from harness.model import Inventory
from harness.plan import bayes
from harness.plan.allocation import Allocation, BudgetError, alike, require_mixable, uniform
from harness.plan.budgets import MIXED, Budget
from harness.plan.pivots import measure_version
from harness.store.records import CellSpec
from kernels.formats.bits import FULL
from kernels.formats.packed import FORMATS
from methods.base import Method, Track

# Bump when the same cell would be written differently: another allocation, measurement or training behind it.
#   1  one configuration for all layers
#   2  mixed allocations, sensitivities in units of divergence
ARTIFACT_VERSION = 2


@dataclass(frozen=True)
class Compute:
    """Where and in what arithmetic a cell runs. Dtype and type of device are part of its key, threads are recorded."""

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
    act_bits: int = FULL  # of the inputs of packed layers
    half: str = "float16"  # 16-bit type of everything that is not packed
    allocate: str = "uniform"  # harness.plan.budgets.MODES
    base: ResolvedModel | None = None  # what is stored is the difference to it; None: the model itself
    allocation: Allocation | None = None  # None: refused, or made by the cell itself, which has the weights ("ilp")
    refusal: str = ""
    source: ResolvedModel | None = None  # a checkpoint of another program, which is the cell

    @property
    def key(self) -> str:
        return self.key_with(self.method.identity())

    def key_with(self, method: dict[str, object]) -> str:
        """The key of this cell for a method of that identity."""
        # Absent rather than none: a cell that trains nothing keeps the key it had before anything could be trained.
        training = {"training": self.training.identity} if self.training else {}
        rounded = {"act_bits": self.act_bits} if self.act_bits != FULL else {}
        pair = {"base": self.base.fingerprint} if self.base else {}
        measure = measure_version(self.method.needs.sensitivity) if self.allocate in MIXED else {}
        return digest(
            {
                **training,
                **measure,
                **rounded,
                **pair,
                "artifact_version": ARTIFACT_VERSION,
                "method": method,
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
    def seen_tokens(self) -> int:
        """Of how many tokens statistics are."""
        if self.calibration is None:
            return 0
        more = also_seen(self.calibration, self.training) if self.method.needs.training_text else 0
        return self.calibration.context * (self.calibration.sequences + more)

    @property
    def track(self) -> Track:
        """What it is ranked in: a difference is never beside a whole model."""
        return Track.DELTA if self.base else self.method.track

    @property
    def label(self) -> str:
        label = f"{self.method_text} {self.budget.text}" if self.budget else self.method_text
        label = f"{label} a{self.act_bits}" if self.act_bits != FULL else label
        return f"{label} seed {self.seed}" if self.seed else label

    def spec(
        self, protocols: Sequence[Protocol], data: str | None, reference: str, tasks: Sequence[Task] = ()
    ) -> CellSpec:
        """Everything the cell's own process needs, and everything its result repeats."""
        return CellSpec(
            key=self.key,
            reference=reference,
            method=self.method.text,
            method_version=self.method.version,
            options=asdict(self.method),
            method_text=self.method_text,
            model=self.model,
            budget=self.budget.text if self.budget else None,
            calibration=self.calibration,
            training=self.training,
            bos=self.bos,
            half=self.half,
            act_bits=self.act_bits,
            base=self.base,
            allocate=self.allocate,
            seed=self.seed,
            device=self.compute.device,
            dtype=self.compute.dtype,
            threads=self.compute.threads,
            protocols={protocol_key(protocol): protocol for protocol in protocols},
            tasks={task.key: task for task in tasks},
            data=data,
            configs=self.allocation.layers if self.allocation else {},
            source=self.source,
        )


@dataclass(frozen=True)
class Plan:
    """The cells of a run, and what they are scored by."""

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
        # Absent rather than empty: a run without has the folder it had.
        tasks = [[task.key for task in self.tasks]] if self.tasks else []
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
    act_bits: Sequence[int],
    compute: Compute,
    bos: str,
    half: str,
    allocate: str,
    base: ResolvedModel | None = None,
) -> Plan:
    """A cell for every method, budget, width of activations and seed; a method outside any budget has one, and so has
    one that no seed can change. With a `base`, all but the reference store the difference to it."""
    cells: dict[str, Cell] = {}
    rounded = any(bits != FULL for bits in act_bits)
    for text, method in methods:
        unrounded = _unrounded(method, stock, base) if rounded and method.budgeted else ""
        for budget in budgets if method.budgeted else (None,):
            mode = allocate if budget else "uniform"
            sees = method.needs.text if method.track == Track.DELTA else method.track != Track.DATA_FREE
            looks = calibration if sees and (mode in MIXED or method.needs.text) else None
            trains = training if method.adaptation else None
            allocation, refusal = None, ""
            try:
                if budget and mode in MIXED:
                    require_mixable(method, stock, budget.bpw)
                else:
                    allocation = uniform(method, stock, budget.bpw if budget else None)
            except BudgetError as error:
                refusal = str(error)
            if method.adaptation and not method.adaptation.whole and find_spec("peft") is None:
                refusal = "training adapters needs peft: pip install 'peft>=0.19'"
            if mode == "bayes":
                refusal = refusal or bayes.missing()
            refusal = _no_pair(method, base) or refusal
            for bits in act_bits if budget else (FULL,):
                why = refusal or (unrounded if bits != FULL else "")
                for seed in seeds if method.seeded else (0,):
                    cell = Cell(
                        method,
                        text,
                        model,
                        budget,
                        looks,
                        trains,
                        seed,
                        compute,
                        bos,
                        bits,
                        half,
                        mode,
                        None if method.name == "fp16" else base,
                        allocation,
                        why,
                    )
                    cells.setdefault(cell.key, cell)
    return Plan(tuple(cells.values()), tuple(protocols))


def _no_pair(method: Method, base: ResolvedModel | None) -> str:
    """Why a method cannot store the difference to `base`, or needs one; "" where it can, and for the reference."""
    if base is None and method.track == Track.DELTA:
        return f"{method.name} stores the difference of two models: write --base with the one --model was tuned from"
    if base is None or method.packs_differences or method.name == "fp16":
        return ""
    more = "write gptq:follow=0" if method.name == "gptq" else "take delta-come, bitdelta, svd, rtn or gptq:follow=0"
    return f"{method.name} does not pack the difference of two models: {more}, or leave --base out"


def _unrounded(method: Method, stock: Inventory, base: ResolvedModel | None) -> str:
    """Why a method's layers cannot round their inputs; "" where they can."""
    if base is not None:
        return f"the base of a pair multiplies inputs that are not rounded: write --act-bits {FULL}"
    formats = {config.format for layer in alike(stock).values() for config in method.candidates(layer)}
    if without := sorted(name for name in formats if not FORMATS.get(name).takes_act_bits):
        return f"{method.name} stores layers of format {without[0]}, which round no inputs: write --act-bits {FULL}"
    if method.adaptation:
        return f"{method.name} trains its adapters on inputs that are not rounded: write --act-bits {FULL}"
    return ""
