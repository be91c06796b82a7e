"""What the larger of LQ-LoRA's grids is worth over the paper's, on one block of the default model, and what either
takes to price.

    python benchmarks/lq_grid.py [--block 15] [--bits 2.5,2.75,3.25]

Every configuration of `grid=paper` (243) and `released` (432) is priced for the block's seven matrices, errors weighted
with the Fisher information of the calibration text (`price=fisher`), and the integer programme mixes each grid under
the same budget. Printed: configurations, seconds, predicted cost relative to the paper's. Minutes on one core."""

from __future__ import annotations

import argparse
import time

import torch

from harness.data.assets import DEFAULT_MODEL, resolve_model
from harness.data.checkpoint import load_tokenizer
from harness.data.protocols import PROFILES
from harness.data.windows import calibration_windows
from harness.model import Inventory, inventory, load_reference
from harness.plan.allocation import mixed
from harness.plan.budgets import parse_budget
from harness.plan.costs import expected_costs
from harness.plan.sensitivity import measure_fisher
from methods import parse_method


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--block", type=int, default=15)
    parser.add_argument("--bits", default="2.5,2.75,3.25", help="stored, with adapters")
    parser.add_argument("--windows", type=int, default=8, help="of the calibration text, for the Fisher information")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    path = resolve_model(DEFAULT_MODEL).path
    model = load_reference(path, "cpu", torch.float32)
    tokens_NT = calibration_windows(PROFILES["quick"].calibration, load_tokenizer(path), seed=0).tokens_NT
    fisher = measure_fisher(model, tokens_NT[: arguments.windows])
    block = Inventory((inventory(model).blocks[arguments.block],))
    print(f"{'grid':10} {'configurations':>14} {'bits':>6} {'seconds':>8} {'cost':>8}")
    for bits in arguments.bits.split(","):
        least = None
        for grid in ("paper", "released"):
            method = parse_method(f"lq-lora:price=fisher,grid={grid}")
            start = time.perf_counter()
            costs = expected_costs(method, model, block, parse_budget(bits), fisher, seed=0)
            plan = mixed(block, parse_budget(bits), costs)
            least = least or plan.predicted
            count = len(next(iter(costs.values())))
            print(
                f"{grid:10} {count:14} {bits:>6} {time.perf_counter() - start:8.0f} {plan.predicted / least:8.4f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
