"""What is scored and measured on a stored artifact, as typed records: `score_*.json`, `task_*.json`, `bench_*.json`."""

from __future__ import annotations

import math
import operator
from dataclasses import dataclass
from typing import ClassVar

from harness.data.protocols import Protocol
from harness.data.record import Record
from harness.data.tasks import Task

KLD_EDGES = tuple(10 ** (step / 4 - 6) for step in range(33))  # of the bins of a histogram: 1e-6 to 100 nats
POSITIONS = 16  # stretches of a window that a curve over positions has


@dataclass(frozen=True)
class Divergence(Record):
    """KL(reference || model) per token in nats, and how often the model ranks the reference's first token first.

    What was added in November 2026 is missing in scores from before."""

    kld: float
    kld_median: float
    kld_p90: float
    kld_p99: float
    kld_max: float
    top1: float
    nonfinite_tokens: int
    window_kld: tuple[float, ...]
    kld_p999: float | None = None
    reverse_kld: float | None = None  # KL(model || reference)
    histogram: tuple[int, ...] = ()  # tokens in front of, between and behind KLD_EDGES
    position_kld: tuple[float, ...] = ()  # means of at most POSITIONS stretches of the windows


@dataclass(frozen=True)
class Losses(Record):
    """One pass over a protocol's windows. A loss that is not a number is flagged, never averaged away."""

    window_nll: tuple[float, ...]  # mean of every window, nats per token (of every article, nats per word)
    scored_tokens: int
    divergence: Divergence | None  # None: there was nothing to diverge from
    window_weight: tuple[float, ...] | None = None  # an article's words; None: windows weigh the same

    @property
    def nonfinite_windows(self) -> int:
        return sum(not math.isfinite(value) for value in self.window_nll)

    @property
    def ppl(self) -> float:
        weight = self.window_weight or [1.0] * len(self.window_nll)
        mean = (
            math.fsum(map(operator.mul, self.window_nll, weight)) / math.fsum(weight)
            if not self.nonfinite_windows
            else math.nan
        )
        return math.exp(mean) if not mean > 700 else math.inf


@dataclass(frozen=True)
class PhaseCost(Record):
    """What a phase of a cell took."""

    seconds: float
    read_gib: float  # from files, whether they were in the system's cache or not
    peak_gib: float  # of the process, meanwhile


@dataclass(frozen=True, kw_only=True)
class Score(Losses):
    """The losses of a cell under one protocol, with what they were taken on."""

    # 1  no version in files until November 2026
    VERSION: ClassVar[int] = 1
    SHOWN: ClassVar[tuple[str, ...]] = ("ppl", "nonfinite_windows")

    protocol: Protocol
    tokens_sha256: str
    seconds: float
    peak_ram_gib: float
    kind: str  # of the row (harness.compressed.KINDS)
    resident_bpw: float
    decode_s: float = 0.0  # of layers decoded when they were loaded
    cost: PhaseCost | None = None  # not known of scores from before November 2026


@dataclass(frozen=True)
class Accuracy(Record):
    """The share of items that are right under a metric, and its standard error (not a number for one item)."""

    value: float
    stderr: float


@dataclass(frozen=True)
class TaskResult(Record):
    """A zero-shot task of a cell, item by item in the order of lm-eval's documents."""

    # 1  no version in files until November 2026
    VERSION: ClassVar[int] = 1

    task: Task
    lm_eval: str  # its version
    items: int  # that were scored
    of_items: int
    requests_sha256: str
    metrics: dict[str, Accuracy]
    correct: dict[str, str]  # by metric: "1" for an item that is right, "0" for one that is wrong
    answers: dict[str, tuple[int, ...]]  # by metric: index of the chosen answer; of lambada whether it says the word
    nonfinite_items: int
    branching: bool  # whether the answers to one question were scored together
    seconds: float
    peak_ram_gib: float | None = None
    loglikelihoods: tuple[tuple[float, ...], ...] = ()  # of every answer, in nats; not in the files of a leaderboard

    def marks(self, metric: str) -> list[int]:
        """1 for every item that is right, else 0."""
        return [int(mark) for mark in self.correct[metric]]


@dataclass(frozen=True)
class Spread(Record):
    """What rounds of one measurement gave."""

    median: float
    p10: float
    p90: float
    rounds: int


@dataclass(frozen=True)
class Timing(Record):
    """Seconds of a model and, unless it is the same, of the uncompressed one in turn with it; ratios inside rounds."""

    seconds: Spread
    reference_seconds: Spread | None = None
    speed_up: Spread | None = None


@dataclass(frozen=True, kw_only=True)
class PromptTiming(Timing):
    """Reading a prompt of so many tokens."""

    tokens: int


@dataclass(frozen=True)
class Memory(Record):
    """After a model was loaded, has decoded at every batch size and read a prompt, alone in its process."""

    resident_bytes: int
    process_peak_bytes: int
    process_start_bytes: int
    allocator_peak_bytes: int | None = None  # of a GPU
    allocator_reserved_bytes: int | None = None

    @property
    def peak_bytes(self) -> int:
        """On the device the model ran on."""
        return self.process_peak_bytes if self.allocator_peak_bytes is None else self.allocator_peak_bytes


@dataclass(frozen=True)
class Machine(Record):
    """What a latency was measured on."""

    processor: str
    cores: int
    torch: str
    threads: int
    gpu: str | None = None
    gpu_gib: float | None = None
    cuda: str | None = None
    cpu_mhz: float | None = None
    gpu_mhz: float | None = None
    loadavg: float | None = None  # of the last minute: other work on this machine shows


@dataclass(frozen=True)
class ProductTime(Record):
    """One product of a shape and configuration at a batch size, each number as it spreads over rounds."""

    rows: int
    columns: int
    config: str
    kind: str
    layers: int  # that were timed together
    stored_bpw: float
    batch: int
    microseconds: Spread
    gb_per_s: Spread  # stored bytes
    vendor_microseconds: Spread | None = None  # the uncompressed product of the same shape
    speed_up: Spread | None = None  # over it


@dataclass(frozen=True, kw_only=True)
class Bench(Record):
    """Memory and latency of a cell on one machine."""

    # 1  no version in files until November 2026
    VERSION: ClassVar[int] = 1

    machine: Machine
    dtype: str
    context: int  # tokens in front of the first that is timed
    kind: str
    memory: Memory
    decode_on_load_s: float
    bandwidth: float  # bytes per second that can be read from memory
    bytes_per_token: int
    decode: dict[str, Timing]  # by batch size
    prefill: PromptTiming
    kernels: tuple[ProductTime, ...] = ()
    runner: str = "transformers"  # what ran a step (harness.measure.runner.Runner)
    runner_reason: str = ""  # why it was not the native one
    decode_gap: float | None = None  # of the perplexity, decoded token by token; None: not asked
