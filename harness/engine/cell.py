"""The work of one cell: compress, save, reload, score."""

from __future__ import annotations

import os
import platform
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from harness import __version__
from harness.compress.loop import compress_model
from harness.compress.training import finetune, save_adapter
from harness.compressed import CompressedModel
from harness.data.protocols import Calibration, Protocol, Training
from harness.data.streams import calibration_stream, evaluation_stream
from harness.data.tasks import Task
from harness.data.windows import stream_sha256
from harness.engine.process import Speaker
from harness.evaluate.score import noise_floor, score
from harness.evaluate.zero_shot import score_tasks
from harness.measure.machine import peak_process_bytes
from harness.model import Inventory, inventory, load_reference
from harness.plan.allocation import mixed
from harness.plan.budgets import parse_budget
from harness.plan.cells import ARTIFACT_VERSION
from harness.plan.costs import CostCache, expected_costs
from harness.plan.sensitivity import random_tokens, remembered_sensitivities
from harness.store.cells import CellStore
from harness.store.files import cache_dir, digest, locked
from kernels.formats.layer import LayerConfig
from methods import method_class
from methods.base import Method, Sensitivity


def work(spec: dict[str, Any], speak: Speaker) -> None:
    """All a cell still lacks; another process at the same cell waits, and then finds it done."""
    store = CellStore(spec["key"])
    with store.locked():
        run_cell(spec, store, speak)


def run_cell(spec: dict[str, Any], store: CellStore, speak: Speaker) -> None:
    torch.set_num_threads(spec["threads"])
    dtype = getattr(torch, spec["dtype"])
    store.put_spec({k: v for k, v in spec.items() if k != "reference_over"})
    if store.artifact() is None:
        _compress(spec, store, speak, dtype)
    is_reference = spec["reference"] == spec["key"]
    wanted = {key: data for key, data in spec["protocols"].items() if not store.scored(key)}
    tasks = {key: Task.from_json(data) for key, data in spec["tasks"].items() if store.task(key) is None}
    if not wanted and not tasks:
        return
    speak("load", 0, 1)
    reloaded = CompressedModel.load(store.folder, spec["device"], dtype)
    for key, data in wanted.items():
        tokens = evaluation_stream(Protocol.from_json(data), spec["model"], spec["data"])
        states = store.states(key) if is_reference else _reference_states(spec, key, speak)
        start = time.perf_counter()
        result = score(
            reloaded.model,
            tokens.tokens_NT,
            None if is_reference else states,
            states if is_reference else None,
            lambda done, total, name=data["name"]: speak(name, done, total),
            tokens.articles,
        ).to_json()
        seconds = time.perf_counter() - start
        if is_reference and states:
            result["divergence"] = noise_floor(reloaded.model, tokens.tokens_NT, states, tokens.articles)
        run = {"seconds": seconds, "peak_ram_gib": peak_process_bytes() / 2**30}
        run |= {"kind": reloaded.kind, "resident_bpw": reloaded.resident_bpw}
        run["decode_s"] = sum(getattr(layer, "decode_seconds", None) or 0.0 for layer in reloaded.packed.values())
        store.put_score(key, {"protocol": data, "tokens_sha256": tokens.sha256, **result, **run})
    # What a task's items are compared with is taken from the reference's result when the leaderboard is written: nobody
    # waits here.
    # Noqa: E731
    put = lambda key, result: store.put_task(key, {**result, "peak_ram_gib": peak_process_bytes() / 2**30})
    score_tasks(reloaded.model, Path(spec["model"]["path"]), tasks, put, speak)


def _reference_states(spec: dict[str, Any], protocol_key: str, speak: Speaker) -> Path | None:
    """The reference's states, once its cell has scored this protocol; None when that cell ended without doing so."""
    store = CellStore(spec["reference"])
    while store.score(protocol_key) is None:
        if Path(spec["reference_over"]).exists() and store.score(protocol_key) is None:
            return None
        speak.say(phase="waiting for the reference", done=0, total=1)  # also how a cell notices that its parent is gone
        time.sleep(0.5)
    return store.states(protocol_key)


def _compress(spec: dict[str, Any], store: CellStore, speak: Speaker, dtype: torch.dtype) -> None:
    speak("load", 0, 1)
    options = {k: v for k, v in spec["method"].items() if k not in ("method", "version")}
    method = method_class(spec["method"]["method"])(**options)
    model = load_reference(Path(spec["model"]["path"]), spec["device"], dtype)
    calibration_sha256, tokens_NT = None, None
    if spec["calibration"]:
        windows = calibration_stream(
            Calibration.from_json(spec["calibration"]), spec["model"], spec["seed"], spec["bos"], spec["data"]
        )
        calibration_sha256, tokens_NT = windows.sha256, windows.tokens_NT
    stock = inventory(model)
    mix = {"layers": spec["plan"]}
    if spec["allocate"] == "ilp":
        mix = store.plan()
        if mix is None:
            mix = _mix(spec, method, model, stock, tokens_NT, speak)
            store.put_plan(mix)
    plan = {name: LayerConfig.from_json(config) for name, config in mix["layers"].items()}
    fisher = _measured(spec, method, model, tokens_NT, spec["seed"], speak) if method.needs.fisher else None
    compressed, report = compress_model(
        model, method, plan, tokens_NT, spec["seed"], store.blocks, spec["half"], fisher, speak
    )
    training = _train(spec, store, method, compressed, speak)
    ledger = compressed.ledger()
    if spec["budget"] and not ledger.fits(parse_budget(spec["budget"])):
        raise ValueError(
            f"stores {ledger.stored_bpw:.6f} bits per weight, over the budget of {spec['budget']}: refused"
        )
    compressed.save(store.folder)
    store.put_artifact(
        {
            "spec": spec,
            "ledger": ledger.to_json(),
            "code_bpw": ledger.code_bpw,
            "stored_bpw": ledger.stored_bpw,
            "allocation": {k: v for k, v in mix.items() if k != "layers"},
            "checkpoint_bytes": sum((store.folder / f"{n}.safetensors").stat().st_size for n in ("packed", "rest")),
            "calibration_sha256": calibration_sha256,
            "compress_s": report["seconds"],
            "training": training,
            "layers": {
                layer.name: {
                    "kind": layer.kind,
                    "stored_bpw": plan[layer.name].stored_bits(layer).total / layer.weights,
                    "config": plan[layer.name].to_json(),
                    "report": report["layers"][layer.name],
                }
                for layer in stock.layers
            },
            "peak_ram_gib": peak_process_bytes() / 2**30,
            "environment": environment(spec["threads"]),
        }
    )


def _mix(
    spec: dict[str, Any],
    method: Method,
    model: PreTrainedModel,
    stock: Inventory,
    tokens_NT: Tensor | None,
    speak: Speaker,
) -> dict[str, Any]:
    """The plan of least predicted divergence under the cell's budget."""
    start = time.perf_counter()
    budget, seed = parse_budget(spec["budget"]), spec["seed"]
    data_free = tokens_NT is None
    if data_free:
        tokens_NT, seed = random_tokens(model.config.get_text_config().vocab_size), 0
    measured = _measured(spec, method, model, tokens_NT, seed, speak)
    if data_free:
        measured = {name: sensitivity.flat for name, sensitivity in measured.items()}
    path = cache_dir(
        "costs", digest([*_origin(spec), method.estimates_key(), stream_sha256(tokens_NT), seed])[:24] + ".json"
    )
    with locked(path):
        estimated = lambda done, total: speak("estimate errors", done, total)  # noqa: E731
        costs = expected_costs(method, model, stock, budget, measured, seed, estimated, CostCache(path))
    return mixed(stock, budget, costs).to_json() | {"seconds": time.perf_counter() - start}


def _measured(
    spec: dict[str, Any], method: Method, model: PreTrainedModel, tokens_NT: Tensor, seed: int, speak: Speaker
) -> dict[str, Sensitivity]:
    """What errors cost, or how large gradients are: whichever the method weighs errors with."""
    kind = "fisher" if method.needs.fisher else "feedback" if method.needs.hessian else "plain"
    told = lambda done, total: speak("measure layers", done, total)  # noqa: E731
    return remembered_sensitivities(_origin(spec), model, tokens_NT, seed, kind, told)


def _origin(spec: dict[str, Any]) -> list[Any]:
    return [ARTIFACT_VERSION, spec["model"]["fingerprint"], spec["dtype"], spec["device"].partition(":")[0]]


def _train(
    spec: dict[str, Any], store: CellStore, method: Method, compressed: CompressedModel, speak: Speaker
) -> dict[str, Any] | None:
    if method.adaptation is None:
        return None
    text = Training.from_json(spec["training"])
    windows = calibration_stream(text.windows, spec["model"], spec["seed"], spec["bos"], spec["data"])
    told = lambda done, total: speak("train", done, total)  # noqa: E731
    report = finetune(compressed, method.adaptation, windows.tokens_NT, text.batch, spec["seed"], store.blocks, told)
    save_adapter(compressed, method.adaptation, store.adapter)
    return {"text": spec["training"], "tokens_sha256": windows.sha256, **report}


def environment(threads: int) -> dict[str, Any]:
    packages = {name: metadata.version(name) for name in ("torch", "transformers", "tokenizers", "safetensors")}
    machine = {"machine": platform.machine(), "cores": os.cpu_count(), "threads": threads}
    return {"harness": __version__, "python": platform.python_version(), **packages, **machine}
