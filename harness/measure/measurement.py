"""One cell, in a process of its own: what its model takes, and how fast it is compared with the uncompressed one.

Memory is read before the uncompressed model is loaded. Before anything is timed, the products that will be are held
against those of the decoded weights, sixty-four decoded tokens against transformers' forward on the same tokens, and
the perplexity of two windows, decoded token by token, against the one that is scored."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from harness.compressed import CompressedModel
from harness.data.streams import evaluation_stream
from harness.measure import machine
from harness.measure.layers import BATCHES, groups_of, product_times
from harness.measure.runner import (
    CONTEXT,
    PROMPT,
    Runner,
    bytes_per_token,
    decode_gap,
    prompt,
    read_prompt,
    resident_bytes,
    scored_logits,
    timed_model,
)
from harness.progress import Progress
from harness.store.cells import CellStore
from harness.store.records import CellSpec
from harness.store.results import Bench, Memory, ProductTime, PromptTiming, Spread, Timing
from kernels.dispatch import fused, linear
from kernels.formats.packed import PackedLinear
from kernels.timing import Call, bandwidth, interleaved, speed_up, spread

# Relative norms. Products of a CPU make 16-bit integers of their inputs (kernels/cpu/README.md).
PRODUCT_LIMITS = {torch.float32: 2e-4, torch.float16: 1e-3, torch.bfloat16: 4e-3}
# The same, after as many layers as a model has.
LOGIT_LIMITS = {torch.float32: 1e-3, torch.float16: 3e-2, torch.bfloat16: 2e-1}
GAP_LIMIT = 1e-3  # of the perplexity: a row that decodes worse or better than it scores is not timed
GENERATED = 64  # tokens that are held against a forward pass
WINDOWS, WINDOW = 2, 512  # windows that are decoded token by token, and tokens of each at most
FEWEST, FEWEST_PROMPTS, MOST_PROMPTS = 7, 3, 20  # rounds


@dataclass(frozen=True)
class Conditions:
    """The settings of a measurement."""

    identity: str  # harness.measure.machine.identity_key
    seconds: float  # about so long for each thing that is timed
    threads: int


def work(spec: CellSpec, conditions: Conditions, progress: Progress) -> None:
    """Measure a stored cell, in turn with its reference, and keep what is found."""
    store, reference = CellStore(spec.key), CellStore(spec.reference)
    torch.set_num_threads(conditions.threads)
    dtype = getattr(torch, spec.dtype)
    need = 0
    for used in {store.folder: store, reference.folder: reference}.values():
        artifact = used.artifact()
        if artifact is None or (damage := used.damage(artifact)):
            raise ValueError(f"{damage or f'{used.folder} is not complete'}: `run` makes it again, then measure")
        need += artifact.checkpoint_bytes
    if spec.device == "cpu" and need > (free := machine.available_bytes()):
        raise ValueError(
            f"what is stored and its reference take {need / 2**30:.1f} GiB beside each other, and {free / 2**30:.1f} "
            "are free: measure on a larger machine (--no-bench leaves it out here)"
        )
    load = partial(CompressedModel.load, store.folder, spec.device, dtype, spec.base)
    load_reference = None
    if reference.folder != store.folder:
        load_reference = partial(CompressedModel.load, reference.folder, spec.device, dtype)
    found = measure(load, load_reference, spec.device, dtype, conditions.seconds, progress, _windows(spec))
    store.put_bench(conditions.identity, found)


def _windows(spec: CellSpec) -> Tensor | None:
    """The first windows [WINDOWS, WINDOW or fewer] that the cell was scored on; None where it was on none."""
    for protocol in spec.protocols.values():
        return evaluation_stream(protocol, spec.model, spec.data).tokens_NT[:WINDOWS, :WINDOW]
    return None


def measure(
    load: Callable[[], CompressedModel],
    load_reference: Callable[[], CompressedModel] | None,
    device: str,
    dtype: torch.dtype,
    seconds: float,
    progress: Progress,
    windows_NT: Tensor | None = None,
    random_bits: bool = False,
) -> Bench:
    """Everything the leaderboard says of memory and latency; about `seconds` of rounds for each thing that is timed.

    The uncompressed model (None: it is the one measured) is loaded when memory has been read, and takes turns.
    `windows_NT` are decoded token by token. A model of random bits has no single products timed, and of layers that are
    alike one is compared. Raises ValueError when what would be timed is not what was scored."""
    progress("load", 0, 1)
    before = machine.peak_process_bytes()
    loaded = load()
    _compare_products(_one_of_each(loaded.packed) if random_bits else loaded.packed, device, dtype, progress)
    model = timed_model(loaded)
    runners = _runners(model)
    _compare_logits(model)
    gap = None if windows_NT is None else _gap(model, windows_NT.to(device), progress)
    here = dataclasses.replace(machine.describe(device, torch.get_num_threads()), loadavg=os.getloadavg()[0])
    kind = loaded.kind if loaded.packed else "dense"
    memory = _memory(model, before, device)
    decode_on_load_s = loaded.decode_seconds
    progress("bandwidth", 0, 1)
    readable = bandwidth(device)
    read = bytes_per_token(loaded)
    reference = None if load_reference is None else timed_model(load_reference())
    decode = _decode(runners, None if reference is None else _runners(reference), device, seconds, progress)
    prefill = _prefill(model, reference, device, seconds, progress)
    products: tuple[ProductTime, ...] = ()
    if reference is not None and not random_bits:
        products = _products(loaded, reference, device, dtype, seconds, progress)
    return Bench(
        machine=here,
        dtype=str(dtype).removeprefix("torch."),
        context=CONTEXT,
        kind=kind,
        runner=runners[1].name,
        runner_reason=runners[1].reason,
        decode_gap=gap,
        memory=memory,
        decode_on_load_s=decode_on_load_s,
        bandwidth=max(readable, bandwidth(device)),  # others may have used the memory a moment ago
        bytes_per_token=read,
        decode=decode,
        prefill=prefill,
        kernels=products,
    )


def _runners(model: PreTrainedModel) -> dict[int, Runner]:
    runners = {batch: Runner(model, prompt(model, batch, CONTEXT)) for batch in BATCHES}
    for runner in runners.values():
        runner.warm()
    return runners


def _one_of_each(packed: Mapping[str, PackedLinear]) -> Mapping[str, PackedLinear]:
    """The first layer of every shape and configuration."""
    names: dict[str, str] = {}
    for name, layer in packed.items():
        names.setdefault(str(layer.spec()), name)
    return {name: packed[name] for name in names.values()}


def _compare_products(packed: Mapping[str, PackedLinear], device: str, dtype: torch.dtype, progress: Progress) -> None:
    """Fused products at every batch size against the decoded weights'."""
    generator = torch.Generator()
    for done, (name, layer) in enumerate(packed.items()):
        if fused(layer, torch.device(device).type) is None:
            continue
        x = torch.randn(sum(BATCHES), layer.in_features, generator=generator.manual_seed(0)).to(device, dtype)
        bias_O = None if layer.bias is None else layer.bias.float()
        expected = torch.nn.functional.linear(x.float(), layer.decode(), bias_O)
        for batch, own, of in zip(BATCHES, x.split(BATCHES), expected.split(BATCHES), strict=True):
            off = ((linear(layer, own).float() - of).norm() / of.norm()).item()
            if not off <= PRODUCT_LIMITS[dtype]:
                raise ValueError(f"not timed: the fused product of {name} is off by {off:.1e} at batch {batch}")
        progress("compare", done + 1, len(packed))


def _compare_logits(model: PreTrainedModel) -> None:
    """Tokens decoded one by one against a forward pass over all of them, without a cache."""
    window = prompt(model, 1, CONTEXT)
    runner = Runner(model, window)
    found, tokens = [], [window]
    for _ in range(min(GENERATED, runner.left)):
        runner.step()
        assert runner.logits_BV is not None
        found.append(runner.logits_BV.float().clone())
        tokens.append(runner.ids_B1.clone())
    scored = scored_logits(model, torch.cat(tokens[:-1], dim=1), len(found))[0].float()
    off = ((torch.cat(found) - scored).norm() / scored.norm()).item()
    if not off <= LOGIT_LIMITS[model.dtype]:
        raise ValueError(f"not timed: logits of decoded tokens are off by {off:.1e} from those that were scored")


def _gap(model: PreTrainedModel, windows_NT: Tensor, progress: Progress) -> float:
    progress("decode what was scored", 0, 1)
    gap = decode_gap(model, windows_NT)
    if not abs(gap) <= GAP_LIMIT:
        raise ValueError(f"not timed: decoded token by token the perplexity is off by {100 * gap:.2g} %")
    return gap


def _memory(model: PreTrainedModel, before: int, device: str) -> Memory:
    """What the model takes once it has decoded at every batch size and read a prompt, alone in this process; `before`
    are the process's bytes before it was loaded."""
    read_prompt(model, prompt(model, 1, PROMPT))
    is_gpu = torch.device(device).type == "cuda"
    return Memory(
        resident_bytes=resident_bytes(model),
        process_peak_bytes=machine.peak_process_bytes(),
        process_start_bytes=before,
        allocator_peak_bytes=torch.cuda.max_memory_allocated(device) if is_gpu else None,
        allocator_reserved_bytes=torch.cuda.max_memory_reserved(device) if is_gpu else None,
    )


def _decode(
    runners: dict[int, Runner], reference: dict[int, Runner] | None, device: str, seconds: float, progress: Progress
) -> dict[str, Timing]:
    found = {}
    for done, (batch, runner) in enumerate(runners.items()):
        calls: dict[str, Call] = {"own": runner.step}
        if reference is not None:
            calls["reference"] = reference[batch].step
        taken = interleaved(calls, device, seconds, FEWEST, runner.left)
        found[str(batch)] = Timing(*_spreads(taken))
        progress("decode", done + 1, len(runners))
    return found


def _prefill(
    model: PreTrainedModel, reference: PreTrainedModel | None, device: str, seconds: float, progress: Progress
) -> PromptTiming:
    ids = prompt(model, 1, PROMPT)
    calls: dict[str, Call] = {"own": partial(read_prompt, model, ids)}
    if reference is not None:
        calls["reference"] = partial(read_prompt, reference, ids)
    progress("read a prompt", 0, 1)
    taken = interleaved(calls, device, seconds, FEWEST_PROMPTS, MOST_PROMPTS)
    return PromptTiming(*_spreads(taken), tokens=ids.shape[1])


def _spreads(taken: dict[str, list[float]]) -> tuple[Spread, Spread | None, Spread | None]:
    """Seconds of the model and of the reference, and the speed-up inside rounds, as far as both were timed."""
    own, reference = taken["own"], taken.get("reference")
    if reference is None:
        return Spread(**spread(own)), None, None
    ratio = Spread(**speed_up(own, reference))
    return Spread(**spread(own)), Spread(**spread(reference)), ratio


def _products(
    loaded: CompressedModel,
    reference: PreTrainedModel,
    device: str,
    dtype: torch.dtype,
    seconds: float,
    progress: Progress,
) -> tuple[ProductTime, ...]:
    """Single products of the packed layers; none of uncompressed ones."""
    layers = {name: layer for name, layer in loaded.packed.items() if layer.format != "dense"}
    vendor: dict[tuple[int, int], list[nn.Module]] = {}
    for name, layer in layers.items():
        vendor.setdefault((layer.out_features, layer.in_features), []).append(reference.get_submodule(name))
    if not layers:
        return ()
    groups = groups_of(list(layers.values()))
    return product_times(groups, vendor, device, dtype, seconds, progress)
