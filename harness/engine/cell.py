"""The work of one cell: compress, save, reload, score."""

from __future__ import annotations

import logging
import os
import platform
import time
from dataclasses import replace
from functools import partial
from importlib import metadata
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from harness import __version__
from harness.compress.distil import remember_states
from harness.compress.loop import FALLBACK, compress_model
from harness.compress.training import finetune, save_adapter
from harness.compressed import FILES, CompressedModel
from harness.data.assets import ResolvedModel
from harness.data.files import cache_dir, digest, file_sha256, locked
from harness.data.protocols import DISTIL, Protocol, also_seen
from harness.data.streams import calibration_stream, evaluation_stream, training_stream
from harness.data.windows import Windows, stream_sha256
from harness.engine.meter import Meter
from harness.engine.process import WAITING, Phase, Speaker
from harness.evaluate.score import first_nonfinite, noise_floor, score
from harness.evaluate.zero_shot import score_tasks
from harness.ledger import Ledger
from harness.measure.machine import return_what_is_freed
from harness.model import Inventory, inventory, load_reference
from harness.model.described import describe
from harness.model.families import known_positions
from harness.model.paging import load_by_blocks, settle
from harness.model.pair import Base
from harness.plan.allocation import mixed
from harness.plan.bayes import searched
from harness.plan.budgets import MIXED, parse_budget
from harness.plan.cells import ARTIFACT_VERSION
from harness.plan.costs import CostCache, expected_costs
from harness.plan.pivots import measure_version
from harness.plan.sensitivity import random_tokens, remembered_sensitivities
from harness.portal.incoming import bring_in
from harness.store.cells import CellStore
from harness.store.records import (
    AllocationRecord,
    Artifact,
    CellSpec,
    Environment,
    LayerRecord,
    LedgerRecord,
    TrainingRecord,
)
from harness.store.results import Score, TaskResult
from methods import parse_method
from methods.base import Method, Sensitivity

log = logging.getLogger(__name__)


def work(spec: CellSpec, reference_over: Path, speak: Speaker) -> None:
    """All a cell still lacks; another process at the same cell waits, and then finds it done. The file `reference_over`
    exists once the reference's cell will do no more."""
    store = CellStore(spec.key)
    with store.lease(partial(speak, f"{WAITING} for another run", 0, 1)):
        run_cell(spec, store, reference_over, speak)


def run_cell(spec: CellSpec, store: CellStore, reference_over: Path, speak: Speaker) -> None:
    torch.set_num_threads(spec.threads)
    if spec.by_blocks:
        return_what_is_freed()
    meter = Meter(len(describe(spec.model.path).stock.blocks) if spec.by_blocks else None)
    dtype = getattr(torch, spec.dtype)
    store.put_spec(spec)
    artifact = store.artifact()
    if artifact and (damage := store.damage(artifact) or store.unsealed(artifact)):
        log.warning("%s; the cell is made again", damage)
        artifact = None
    if artifact is None:
        store.drop_artifact()  # scores are of the bytes that were there
        if spec.source:
            _import(spec, spec.source, store, speak, meter)
        else:
            _compress(spec, store, speak, dtype, meter)
    protocols = {key: protocol for key, protocol in spec.protocols.items() if not store.scored(key, spec.is_reference)}
    tasks = {key: task for key, task in spec.tasks.items() if store.task(key) is None}
    if not protocols and not tasks:
        return
    speak("load", 0, 1)
    with meter.phase("load"):
        reloaded = CompressedModel.load(store.folder, spec.device, dtype, spec.base, by_blocks=spec.by_blocks)
    for key, protocol in protocols.items():
        states = store.states(key) if spec.is_reference else _reference_states(spec, key, reference_over, speak)
        store.put_score(key, _score(spec, protocol, reloaded, states, speak, meter))
    # What a task's items are compared with is taken from the reference's result when the leaderboard is written: nobody
    # waits here.

    def put(key: str, result: TaskResult) -> None:
        store.put_task(key, replace(result, peak_ram_gib=meter.peak_gib))

    score_tasks(reloaded.model, spec.model, tasks, put, speak)


def _reference_states(spec: CellSpec, protocol_key: str, reference_over: Path, speak: Speaker) -> Path | None:
    """The reference's states, once its cell has scored this protocol; None when that cell ended without doing so."""
    store = CellStore(spec.reference)
    while not store.scored(protocol_key, is_reference=True):
        if reference_over.exists() and not store.scored(protocol_key, is_reference=True):
            return None
        speak.say(Phase(f"{WAITING} for the reference", 0, 1))  # also how a cell notices that its parent is gone
        time.sleep(0.5)
    return store.states(protocol_key)


def _score(
    spec: CellSpec, protocol: Protocol, reloaded: CompressedModel, states: Path | None, speak: Speaker, meter: Meter
) -> Score:
    """The model's score under a protocol, diverging from the reference's `states`; the reference writes them, and its
    divergence is the noise floor."""
    tokens = evaluation_stream(protocol, spec.model, spec.data)
    phase = f"score {protocol.name}"
    with meter.phase(phase):
        losses = score(
            reloaded.model,
            tokens.tokens_NT,
            None if spec.is_reference else states,
            states if spec.is_reference else None,
            speak,
            tokens.articles,
            protocol.name,
        )
    if losses.nonfinite_windows:
        _name_overflow(reloaded.model, protocol, tokens.tokens_NT)
    divergence = losses.divergence
    if spec.is_reference and states:
        divergence = noise_floor(reloaded.model, tokens.tokens_NT, states, tokens.articles)
    return Score(
        window_nll=losses.window_nll,
        window_weight=losses.window_weight,
        scored_tokens=losses.scored_tokens,
        divergence=divergence,
        protocol=protocol,
        tokens_sha256=tokens.sha256,
        seconds=meter.phases[phase].seconds,
        peak_ram_gib=meter.peak_gib,
        cost=meter.phases[phase],
        kind=reloaded.kind,
        resident_bpw=reloaded.resident_bpw,
        decode_s=reloaded.decode_seconds,
    )


def _name_overflow(model: PreTrainedModel, protocol: Protocol, tokens_NT: Tensor) -> None:
    """Log the layer that first has an output that is not finite."""
    name = next(filter(None, (first_nonfinite(model, window_T) for window_T in tokens_NT)), "the head")
    log.warning("%s: losses are not finite; the first output that is not is that of %s", protocol.name, name)


def _compress(spec: CellSpec, store: CellStore, speak: Speaker, dtype: torch.dtype, meter: Meter) -> None:
    speak("load", 0, 1)
    method = parse_method(spec.method)
    load = load_by_blocks if spec.by_blocks else load_reference
    with meter.phase("load the reference"):
        model = load(spec.model.path, spec.device, dtype, spec.model.fingerprint)
        base = Base.load(spec.base, spec.device) if spec.base else None
    calibration_sha256, tokens_NT = None, None
    if spec.calibration:
        windows = calibration_stream(spec.calibration, spec.model, spec.seed, spec.bos, spec.data)
        calibration_sha256, tokens_NT = windows.sha256, windows.tokens_NT
    training = None
    if method.adaptation:
        assert spec.training is not None
        training = training_stream(spec.training, spec.model, spec.seed, spec.bos, spec.data)
        if spec.training.loss == DISTIL:  # while there is a model that nothing was packed of
            with meter.phase("remember"):
                remember_states(model, training.tokens_NT, store.teacher, speak)
    stock = inventory(model)
    allocation = store.allocation() if spec.allocate in MIXED else None
    if spec.allocate in MIXED and allocation is None:
        allocation = _allocate(spec, method, model, stock, tokens_NT, speak, base, meter)
        store.put_allocation(allocation)
    configs = allocation.layers if allocation else spec.configs
    fisher = _measured(spec, "fisher", model, tokens_NT, spec.seed, speak, meter) if method.needs.fisher else None
    seen_NT = tokens_NT
    if training and tokens_NT is not None and method.needs.training_text:
        more = also_seen(spec.calibration, spec.training)
        seen_NT = torch.cat([tokens_NT, training.tokens_NT[:more]]) if more else tokens_NT
    with meter.phase("compress"):
        compressed, report = compress_model(
            model,
            stock,
            method,
            configs,
            seen_NT,
            spec.seed,
            store.blocks,
            spec.half,
            fisher,
            spec.act_bits,
            speak,
            base,
        )
    trained = None
    if training:
        settle(model)
        with meter.phase("train"):
            trained = _train(spec, store, method, compressed, training, speak)
    spec.model.check()
    if spec.base:
        spec.base.check()
    ledger = compressed.ledger()
    if spec.budget and not ledger.fits(parse_budget(spec.budget)):
        raise ValueError(f"stores {ledger.stored_bpw:.6f} bits per weight, over the budget of {spec.budget}: refused")
    with meter.phase("save"):
        compressed.save(store.folder)
    layers = {
        layer.name: LayerRecord(
            role=layer.role,
            stored_bpw=configs[layer.name].stored_bits(layer).total / layer.weights,
            config=configs[layer.name],
            report=report.layers[layer.name],
        )
        for layer in stock.layers
    }
    artifact = _artifact(spec, store, ledger, layers, report.seconds, meter)
    store.put_artifact(
        replace(
            artifact,
            allocation=allocation.prediction if allocation else None,
            calibration_sha256=calibration_sha256,
            training=trained,
            fallback_layers=sum(FALLBACK in noted for noted in report.layers.values()),
            base_bytes=base.bytes if base else None,
        )
    )


def _import(spec: CellSpec, source: ResolvedModel, store: CellStore, speak: Speaker, meter: Meter) -> None:
    """Another program's checkpoint as this cell's artifact."""
    found = bring_in(source, spec.model.path, spec.half, speak)
    found.compressed.save(store.folder)
    roles = {layer.name: layer.role for layer in found.compressed.inventory.layers}
    records = {n: LayerRecord(roles[n], bpw, config, {}) for n, (config, bpw) in found.layers.items()}
    artifact = _artifact(spec, store, found.ledger, records, found.seconds, meter)
    store.put_artifact(replace(artifact, source_note=found.note))


def _artifact(
    spec: CellSpec, store: CellStore, ledger: Ledger, layers: dict[str, LayerRecord], seconds: float, meter: Meter
) -> Artifact:
    """Of the files in the store, which must be complete; the rest is for whoever knows of it."""
    return Artifact(
        spec=spec,
        ledger=LedgerRecord.of(ledger),
        allocation=None,
        checkpoint_bytes=sum((store.folder / f"{n}.safetensors").stat().st_size for n in ("packed", "rest")),
        calibration_sha256=None,
        compress_s=seconds,
        training=None,
        layers=layers,
        peak_ram_gib=meter.peak_gib,
        phases=dict(meter.phases),
        environment=environment(spec.threads),
        files={name: file_sha256(store.folder / name) for name in FILES},
    )


def _allocate(
    spec: CellSpec,
    method: Method,
    model: PreTrainedModel,
    stock: Inventory,
    tokens_NT: Tensor | None,
    speak: Speaker,
    base: Base | None,
    meter: Meter,
) -> AllocationRecord:
    """The allocation of least predicted divergence under the cell's budget."""
    start = time.perf_counter()
    assert spec.budget is not None
    budget, seed = parse_budget(spec.budget), spec.seed
    data_free = tokens_NT is None
    if tokens_NT is None:
        tokens_NT, seed = random_tokens(model.config.get_text_config().vocab_size, known_positions(model.config)), 0
    measure = method.needs.sensitivity
    measured = _measured(spec, measure, model, tokens_NT, seed, speak, meter)
    if data_free:
        measured = {name: sensitivity.flat for name, sensitivity in measured.items()}
    way = measure_version(measure).values()
    # Sensitivities are the tuned model's; what errors there are depends on the base too.
    pair = [base.fingerprint] if base else []
    key = digest([*_origin(spec), method.identity(method.later), stream_sha256(tokens_NT), seed, *way, *pair])
    path = cache_dir("costs", key[:24] + ".json")
    with meter.phase("estimate errors"), locked(path, f"estimates of {spec.method}"):
        costs = expected_costs(method, model, stock, budget, measured, seed, speak, CostCache(path), base)
    found = searched(stock, budget, costs, spec.seed) if spec.allocate == "bayes" else mixed(stock, budget, costs)
    assert found.predicted is not None and found.bound is not None and found.gap is not None
    seconds = time.perf_counter() - start
    return AllocationRecord(found.predicted, found.bound, found.gap, seconds, found.layers, costs=found.costs)


def _measured(
    spec: CellSpec,
    measure: str,
    model: PreTrainedModel,
    tokens_NT: Tensor | None,
    seed: int,
    speak: Speaker,
    meter: Meter,
) -> dict[str, Sensitivity]:
    """What errors cost, or how large gradients are (harness.plan.sensitivity.MEASURES)."""
    assert tokens_NT is not None
    with meter.phase("measure layers"):
        return remembered_sensitivities(_origin(spec), model, tokens_NT, seed, measure, speak)


def _origin(spec: CellSpec) -> tuple[int, str, str, str]:
    """What all measurements of a model depend on."""
    return ARTIFACT_VERSION, spec.model.fingerprint, spec.dtype, spec.device.partition(":")[0]


def _train(
    spec: CellSpec, store: CellStore, method: Method, compressed: CompressedModel, windows: Windows, speak: Speaker
) -> TrainingRecord:
    assert spec.training is not None and method.adaptation is not None
    report = finetune(
        compressed,
        method.adaptation,
        windows.tokens_NT,
        spec.training.batch,
        spec.seed,
        store.blocks,
        speak,
        states=store.teacher if spec.training.loss == DISTIL else None,
    )
    if not method.adaptation.whole:
        save_adapter(compressed, method.adaptation, store.adapter)
    return TrainingRecord(text=spec.training, tokens_sha256=windows.sha256, **vars(report))


def environment(threads: int) -> Environment:
    """The versions and the machine of this process."""
    packages = {name: metadata.version(name) for name in ("torch", "transformers", "tokenizers", "safetensors")}
    return Environment(
        harness=__version__,
        python=platform.python_version(),
        machine=platform.machine(),
        cores=os.cpu_count(),
        threads=threads,
        **packages,
    )
