"""Cells as jobs of SLURM, through submitit (`pip install '.[slurm]'`), on machines that share the cache.

The cells of a run are one array. A job that is preempted, or runs out of time, is queued again by submitit and goes on
from its cell's finished blocks."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from harness.engine import elsewhere
from harness.engine.elsewhere import Order, Task
from harness.engine.process import Watch
from harness.progress import first_line
from harness.store.records import CellSpec, Outcome

MINUTES = 8 * 60  # of a job, where nothing is said
HEADROOM_GIB = 2.0  # over what is predicted


class Performed:
    """What a job runs; submitit asks it what to do when the job is taken off its machine."""

    def __call__(self, order: Order) -> None:
        elsewhere.perform(order)

    def checkpoint(self, order: Order) -> Any:
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self, order)


def run_cells(
    specs: Sequence[CellSpec],
    watch: Watch,
    timeout_s: float | None,
    memory_gib: Mapping[str, float],
    options: Mapping[str, str],
) -> dict[str, Outcome]:
    """`options`: minutes; cluster ("slurm", or "local": processes of this machine, to try things out); all others are
    passed to sbatch (partition, account, qos, constraint). Raises ValueError where SLURM is not to be had."""
    submitit = _submitit()
    named = dict(options)
    cluster, minutes = named.pop("cluster", "slurm"), named.pop("minutes", str(MINUTES))
    if not minutes.isdecimal() or not int(minutes):
        raise ValueError(f"--slurm minutes={minutes} is no number of minutes: write for example --slurm minutes=240")

    def submit(orders: Sequence[Order]) -> list[Task]:
        cells = [order.cell for order in orders]
        try:
            executor = submitit.AutoExecutor(folder=str(Path(orders[0].folder) / "%j"), cluster=cluster)
        except (RuntimeError, ValueError) as error:
            raise ValueError(f"--engine slurm: {first_line(error)}; --slurm cluster=local tries it here") from None
        gpus = int(any(cell.device.startswith("cuda") for cell in cells))
        executor.update_parameters(
            name="harness",
            timeout_min=int(minutes),
            cpus_per_task=max(cell.threads for cell in cells),
            mem_gb=math.ceil(HEADROOM_GIB + max(order.memory_gib for order in orders)),
            **({"gpus_per_node": gpus} if gpus else {}),
            **({"slurm_additional_parameters": named} if named and cluster == "slurm" else {}),
        )
        with executor.batch():
            jobs = [executor.submit(Performed(), order) for order in orders]
        return [_Task(job) for job in jobs]

    return elsewhere.run_cells(specs, submit, watch, timeout_s, memory_gib)


class _Task:
    def __init__(self, job: Any) -> None:
        self.job = job

    def done(self) -> bool:
        return bool(self.job.done())

    def failure(self) -> str:
        error = self.job.exception()
        return "" if error is None else f"{type(error).__name__}: {first_line(error)}"

    def cancel(self) -> None:
        with contextlib.suppress(Exception):
            self.job.cancel()


def _submitit() -> Any:
    try:
        import submitit
    except ImportError:
        raise ValueError("--engine slurm needs submitit on every machine: pip install '.[slurm]'") from None
    return submitit
