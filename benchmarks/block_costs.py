"""What a block of a large model takes, phase by phase: random models that have the shapes of a preset and few blocks go
through `run --load blocks`, and the seconds, the operations and the rate of every phase are printed for one block.

    python -m benchmarks.block_costs --shapes smollm2-135m,llama3.2-1b,llama2-7b --methods gptq,reallm --out DIR

Random weights take as long as trained ones, but for what a plan makes of them (which layers get which format). The
vocabulary is the default model's. Cells are kept in the cache as those of any model: the same command again prints the
same numbers. Alone on the machine, or the seconds are upper limits.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from harness.data.assets import DEFAULT_MODEL, resolve_model
from harness.data.checkpoint import load_tokenizer
from harness.model import PRESETS
from harness.store.cells import CellStore

PHASES = ("measure layers", "estimate errors", "compress")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", default="smollm2-135m,llama3.2-1b,llama2-7b", help=f"among {', '.join(PRESETS)}")
    parser.add_argument("--blocks", type=int, default=1, help="of every model (default: %(default)s)")
    parser.add_argument("--methods", default="gptq,reallm")
    parser.add_argument("--bits", default="3.25")
    parser.add_argument("--out", type=Path, required=True, help="folder of the models and their leaderboards")
    arguments = parser.parse_args()
    print("| shape | method | phase | seconds a block | TFLOP a block | GFLOP/s |")
    print("|---|---|---|---|---|---|")
    for shape in arguments.shapes.split(","):
        model = arguments.out / "models" / f"{shape}-{arguments.blocks}"
        if not (model / "config.json").exists():
            _make(shape, arguments.blocks, model)
        asked = ["--model", str(model), "--methods", arguments.methods, "--bits", arguments.bits]
        asked += ["--protocols", "wiki-mini@512/2"]  # a random model's perplexity says nothing
        board = ["--load", "blocks", "--jobs", "1", "--no-bench", "--out", str(arguments.out / model.name)]
        _harness("run", *asked, *board)
        for cell in json.loads(_harness("plan", *asked, "--json"))["cells"]:
            if cell["budget"]:
                _show(shape, cell, arguments.blocks)


def _make(shape: str, blocks: int, folder: Path) -> None:
    tokenizer = load_tokenizer(resolve_model(DEFAULT_MODEL, say=partial(print, file=sys.stderr)).path)
    changed = {"num_hidden_layers": blocks, "vocab_size": len(tokenizer), "tie_word_embeddings": True}
    values = {name: value for name, value in PRESETS[shape].items() if name != "model_type"} | changed
    torch.manual_seed(0)
    config = AutoConfig.for_model(PRESETS[shape]["model_type"], **values)
    AutoModelForCausalLM.from_config(config, dtype=torch.float16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _harness(*arguments: str) -> str:
    """What a command says; a run says it in files."""
    command = [sys.executable, "-m", "harness", *arguments]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout


def _show(shape: str, cell: dict[str, Any], blocks: int) -> None:
    artifact = CellStore(cell["cell"]).artifact()
    assert artifact is not None, f"{cell['method']} has not ended well"
    for phase in PHASES:
        if artifact.phases[phase].seconds < 0.1:  # found: another cell has measured it
            continue
        taken, flop = artifact.phases[phase].seconds / blocks, cell["predicted_flop"].get(phase, 0.0) / blocks
        rate = f"{flop / 1e12:.3g} | {flop / 1e9 / taken:.0f}" if flop else " | "
        print(f"| {shape} | {cell['method']} | {phase} | {taken:.1f} | {rate} |", flush=True)


if __name__ == "__main__":
    main()
