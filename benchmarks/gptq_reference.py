"""GPTQ of its reference implementation beside ours: one model, one calibration text, the same bits of codes, one run.

    pip install gptqmodel==7.6.0 optimum      # and, or: pip install auto-gptq==0.7.1 --no-deps
    python benchmarks/gptq_reference.py [--model NAME] [--blocks N] [--bits 3] [--group 64] [--out FOLDER]

Rows, all symmetric, one grid to a group of columns:

    gptqmodel, ...   that program from beginning to end on our calibration windows, in float32 as we compute: as it
                     comes (it orders columns inside their groups), in the columns' own order, and with act-order. Its
                     folder is read like anybody's (`--model-cell`), its bits are those of that folder
    gptq-ref         the package's quantiser alone, in our loop over the blocks
    gptq, ...        ours with the same choices (no following of drift, grids by min-max), by its defaults with one
                     layout for all matrices, and mixed under the same stored bits

Damping is 0.05 everywhere, the default of gptqmodel and of `gptq`. Seconds are those of compression. `--kinds` says
which of gptqmodel's runs there are; what is finished under `--out` is found again. `--blocks` takes the first blocks of
the model alone: quick, and no perplexity that means anything."""

from __future__ import annotations

import argparse
import os
import time
from concurrent.futures import ProcessPoolExecutor
from importlib.util import find_spec
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from harness import compare
from harness.data.assets import DEFAULT_MODEL, ResolvedModel, resolve_model
from harness.data.checkpoint import load_tokenizer
from harness.data.protocols import bos_policy, parse_calibration
from harness.data.streams import calibration_stream
from harness.model import load_reference
from harness.report.sheet import Row, Sheet
from methods.gptq_ref import Reference

KINDS: dict[str, dict[str, Any]] = {  # of gptqmodel's own runs -> its options
    "as it comes": {},
    "columns in order": {"desc_act": False, "act_group_aware": False},
    "act-order": {"desc_act": True, "act_group_aware": False},
}
TOOK = "seconds.txt"
DAMP = 0.05  # gptqmodel's own
SAME = f"grid=minmax,damp={DAMP},follow=0,shrink=0"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=DEFAULT_MODEL)
    parser.add_argument("--blocks", type=int, help="only the first so many")
    parser.add_argument("--bits", type=int, default=3)
    parser.add_argument("--group", type=int, default=64)
    parser.add_argument("--calibration", default="c4-mini@512x24")
    parser.add_argument("--protocols", default="wiki-mini@512,c4-mini@512")
    parser.add_argument("--kinds", default=",".join(KINDS), help="comma list (default: %(default)s)")
    parser.add_argument("--out", type=Path, help="folder of the leaderboards and of gptqmodel's checkpoints")
    arguments = parser.parse_args()
    if not find_spec("gptqmodel") and not find_spec("auto_gptq"):
        raise SystemExit(
            "no reference is installed: pip install gptqmodel==7.6.0 optimum, or auto-gptq==0.7.1 --no-deps"
        )
    with TemporaryDirectory() as temporary:
        out = (arguments.out or Path(temporary)).resolve()
        model = resolve_model(arguments.model)
        if arguments.blocks:
            model = first_blocks(model, arguments.blocks, out / f"{model.name}-{arguments.blocks}-blocks")
        seconds = quantised(model, arguments, out) if find_spec("gptqmodel") else {}
        grid = f"bits={arguments.bits},group={arguments.group},offset=symmetric"
        methods = [f"gptq-ref:{grid},damp={DAMP}", f"gptq:{grid},{SAME}", f"gptq:{grid}"]
        budget = f"{arguments.bits + 16 / arguments.group:.4f}"
        planned = dict(
            protocols=arguments.protocols, calibration=arguments.calibration, bench=False, jobs=1, seeds=0, strict=True
        )
        places = [str(out / name.replace(" ", "-")) for name in seconds]
        rows = compare(
            model.path, methods, budget, allocate="uniform", out=out / "uniform", model_cell=places, **planned
        )
        mixed = compare(model.path, ["gptq"], budget, out=out / "mixed", **planned)
        names = {Path(place).name: f"gptqmodel, {name}" for place, name in zip(places, seconds, strict=True)}
        lines = [line(row, names, seconds, arguments.protocols) for row in rows.rows()]
        lines += [line(row, {}, {}, arguments.protocols) for row in mixed.rows() if row["method"] == "gptq"]
    header = ["row", "stored bits", *(f"{c} {p}" for p in arguments.protocols.split(",") for c in ("ppl", "kld")), "s"]
    print(f"{model.name}, {arguments.bits} bits, groups of {arguments.group}, {arguments.calibration}")
    print(f"gptq-ref runs {Reference().runs}")
    print(Sheet(header, lines).plain())


def first_blocks(model: ResolvedModel, blocks: int, folder: Path) -> ResolvedModel:
    whole = load_reference(model.path, "cpu", torch.float32)
    layers: Any = whole.model.layers
    whole.model.layers = layers[:blocks]
    whole.config.num_hidden_layers = blocks
    whole.save_pretrained(folder)
    load_tokenizer(model.path).save_pretrained(folder)
    return resolve_model(str(folder))


def quantised(model: ResolvedModel, arguments: argparse.Namespace, out: Path) -> dict[str, float]:
    """Seconds of each of gptqmodel's own runs, a process each; their folders are in `out`, each with its seconds."""
    calibration = parse_calibration(arguments.calibration)
    bos = bos_policy(load_reference(model.path, "cpu", torch.float32).config.model_type)
    tokens_NT = calibration_stream(calibration, model, 0, bos).tokens_NT
    seconds = {}
    for name in arguments.kinds.split(","):
        folder = out / name.replace(" ", "-")
        if not (folder / TOOK).exists():
            settings = {"bits": arguments.bits, "group_size": arguments.group, "sym": True, **KINDS[name]}
            with ProcessPoolExecutor(1, get_context("spawn")) as apart:
                apart.submit(quantise, model.path.resolve(), tokens_NT.tolist(), settings, folder).result()
        seconds[name] = float((folder / TOOK).read_text(encoding="utf-8"))
    return seconds


def quantise(model: Path, windows: list[list[int]], settings: dict[str, Any], folder: Path) -> None:
    """gptqmodel from beginning to end, and the seconds of its compression beside what it saves."""
    os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")  # with fewer it refuses to load a model
    from gptqmodel import GPTQModel, QuantizeConfig

    folder.mkdir(parents=True, exist_ok=True)
    os.chdir(folder)  # it writes logs where it stands
    loaded = GPTQModel.load(str(model), QuantizeConfig(**settings), device="cpu", dtype=torch.float32)
    start = time.perf_counter()
    loaded.quantize([{"input_ids": tokens, "attention_mask": [1] * len(tokens)} for tokens in windows], batch_size=1)
    seconds = time.perf_counter() - start
    loaded.save(str(folder))
    (folder / TOOK).write_text(f"{seconds:.0f}", encoding="utf-8")


def line(row: Row, names: dict[str, str], seconds: dict[str, float], protocols: str) -> list[str]:
    label = str(row["variant"] or row["method"])
    name = names.get(label, "")
    took = seconds[name.removeprefix("gptqmodel, ")] if name else row["compress_s"]
    text = name or (label if label == row["method"] else f"{row['method']}:{label}")
    found = [row[f"{column}_{protocol}"] for protocol in protocols.split(",") for column in ("ppl", "kld")]
    numbers = [f"{value:.4f}" if isinstance(value, float) else str(value) for value in (row["stored_bpw"], *found)]
    return [text, *numbers, f"{took:.0f}" if isinstance(took, float) else str(took)]


if __name__ == "__main__":
    main()
