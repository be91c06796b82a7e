"""What is asked of a cell and what it stores, as typed records: `spec.json`, `allocation.json`, `artifact.json`.

What is scored and measured on an artifact is in harness.store.results. The history of every version is in a comment; a
file of an earlier one is brought up to date when it is read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Annotated, Any, ClassVar

from pydantic import PlainValidator

from harness.data.assets import ResolvedModel
from harness.data.protocols import Calibration, Protocol, Training
from harness.data.record import Record
from harness.data.tasks import Task
from harness.ledger import Ledger
from harness.store.results import PhaseCost
from kernels.formats.bits import FULL, Scalar
from kernels.formats.layer import LayerConfig


def _layer_config(data: Any) -> LayerConfig:
    if not isinstance(data, Mapping) or "format" not in data:
        raise ValueError(f"{data!r} is no configuration of a layer")
    return LayerConfig.from_json(data)


Config = Annotated[LayerConfig, PlainValidator(_layer_config)]


@dataclass(frozen=True)
class CellSpec(Record):
    """Everything a cell's own process needs to do its work, and everything its result repeats.

    `method` is the method's text, from which it is built again; `options` are all of its options, for the record.
    """

    # 1  no version in the file; the method as a dict of its name, version and options, `configs` called "plan"
    # 2  November 2026: the method as text, its version and options beside it
    VERSION: ClassVar[int] = 2

    key: str
    reference: str  # the key of the uncompressed model's cell
    method: str
    method_version: int
    options: dict[str, Scalar | None]
    method_text: str  # as the user typed it
    model: ResolvedModel
    budget: str | None  # bits per weight, as the user typed them; None: outside any budget
    calibration: Calibration | None
    training: Training | None
    bos: str
    half: str
    allocate: str
    seed: int
    device: str
    dtype: str
    threads: int
    protocols: dict[str, Protocol]  # by key
    tasks: dict[str, Task]  # by key
    data: str | None
    configs: dict[str, Config]  # by layer; empty where the cell allocates itself
    act_bits: int = field(default=FULL, kw_only=True)  # of the inputs of packed layers; from before there were any: all
    base: ResolvedModel | None = field(default=None, kw_only=True)  # what the model is stored as the difference to
    source: ResolvedModel | None = field(
        default=None, kw_only=True
    )  # a checkpoint of another program, which is the cell
    by_blocks: bool = field(default=False, kw_only=True)  # blocks are in memory while they run (harness.model.paging)

    @classmethod
    def upgrade(cls, data: dict[str, Any], version: int) -> dict[str, Any]:
        options = dict(data["method"])
        left_out = ("method", "plan", "reference_over", "bench")
        return {name: value for name, value in data.items() if name not in left_out} | {
            "method": data["method_text"],
            "method_version": options.pop("version"),
            "options": {name: value for name, value in options.items() if name != "method"},
            "configs": data["plan"],
        }

    @property
    def is_reference(self) -> bool:
        return self.key == self.reference


@dataclass(frozen=True)
class Prediction(Record):
    """What a mixed allocation is expected to cost, and how good it is."""

    predicted: float  # nats per token for a calibrated method
    bound: float  # no allocation of the considered configurations costs less under the budget
    gap: float  # share of the cost by which the best possible one may be better
    seconds: float  # it took to find
    costs: dict[str, float] = field(default_factory=dict, kw_only=True)  # of every layer; none from before there were


@dataclass(frozen=True)
class AllocationRecord(Prediction):
    """Which configuration every layer gets, where the cell itself decided."""

    # 1  no version in the file, which was called plan.json
    VERSION: ClassVar[int] = 1

    layers: dict[str, Config]

    @property
    def prediction(self) -> Prediction:
        return Prediction(self.predicted, self.bound, self.gap, self.seconds, costs=self.costs)


@dataclass(frozen=True)
class PartBits(Record):
    """Stored bits per weight, by what they hold."""

    codes: float
    scales: float
    tables: float
    adapters: float


@dataclass(frozen=True)
class LedgerRecord(Record):
    """The bits of an artifact (harness.ledger)."""

    stored_bits: int
    weights: int
    stored_bpw: float
    bpw_by_part: PartBits

    @classmethod
    def of(cls, ledger: Ledger) -> LedgerRecord:
        bits = ledger.bits
        parts = PartBits(*map(ledger.bpw, (bits.codes, bits.scales, bits.tables, bits.adapters)))
        return cls(ledger.stored_bits, ledger.weights, ledger.stored_bpw, parts)


@dataclass(frozen=True)
class LayerRecord(Record):
    """One packed layer, and what its making reports."""

    role: str  # its name inside its block
    stored_bpw: float
    config: Config
    report: dict[str, int | float]


@dataclass(frozen=True)
class TrainingRecord(Record):
    """What adapters were trained on, and how it went."""

    text: Training
    tokens_sha256: str
    steps: int
    tokens: int
    seconds: float
    losses: tuple[float, ...]  # one per step, nats per token


@dataclass(frozen=True)
class Environment(Record):
    """The versions and the machine that an artifact was made with."""

    harness: str
    python: str
    torch: str
    transformers: str
    tokenizers: str
    safetensors: str
    machine: str
    cores: int | None
    threads: int


@dataclass(frozen=True)
class Artifact(Record):
    """A compressed model that is complete on disk."""

    # 1  no version in the file; a layer's role called "kind", an empty "allocation" where there is no prediction
    # 2  November 2026
    # 3  with the checksums of its files
    VERSION: ClassVar[int] = 3
    SHOWN: ClassVar[tuple[str, ...]] = ("code_bpw", "stored_bpw")

    spec: CellSpec
    ledger: LedgerRecord
    allocation: Prediction | None  # None: one configuration for all layers
    checkpoint_bytes: int
    calibration_sha256: str | None  # of the token stream
    compress_s: float
    training: TrainingRecord | None
    layers: dict[str, LayerRecord]
    peak_ram_gib: float
    environment: Environment
    files: dict[str, str]  # sha256 by name; none of an artifact from before they were kept
    fallback_layers: int = 0  # packed in a plainer way than asked for, because the numbers left no other
    base_bytes: int | None = None  # of a pair's base at 16 bits, which every tenant of it shares
    phases: dict[str, PhaseCost] = field(default_factory=dict)  # by name; none from before they were kept
    source_note: str = ""  # what an imported checkpoint says of itself and is not

    @classmethod
    def upgrade(cls, data: dict[str, Any], version: int) -> dict[str, Any]:
        if version == 2:
            return data | {"files": {}}
        layers = {
            name: {"role" if field == "kind" else field: value for field, value in layer.items()}
            for name, layer in data["layers"].items()
        }
        older: dict[str, Any] = {
            "allocation": data["allocation"] or None,
            "training": data.get("training"),
            "files": {},
        }
        return data | older | {"layers": layers}

    @property
    def stored_bpw(self) -> float:
        return self.ledger.stored_bpw

    @property
    def code_bpw(self) -> float:
        return self.ledger.bpw_by_part.codes


class Ending(StrEnum):
    """How the work of a cell ended; a row's status, unless it is OK."""

    OK = "ok"
    FAILED = "failed"  # the reason says what to do
    REFUSED = "refused"
    OUT_OF_MEMORY = "out-of-memory"  # of the host, the device, or by the kernel's choice
    NON_FINITE = "nonfinite"
    TIMEOUT = "timeout"
    KILLED = "killed"  # by a signal that was not ours
    CRASHED = "crashed"  # the reason names the line
    INTERRUPTED = "interrupted"  # by Ctrl-C or SIGTERM to the run
    SKIPPED = "skipped"  # there was no reason to run it


@dataclass(frozen=True)
class Outcome:
    """How the process of a cell ended."""

    key: str
    error: str = ""  # one line; empty when the cell finished
    ending: Ending = Ending.OK
