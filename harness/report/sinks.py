"""Rows of cells to where other experiments are logged: TensorBoard, MLflow, Weights & Biases. One callback each; their
packages are imported when a run names them.

A cell is one run there, found again by its key: logging it twice replaces it, or adds the numbers it has gained. Ranks
are not logged, for they are known only once all cells are: the leaderboard has them."""

from __future__ import annotations

import logging
import math
import re
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness.progress import first_line
from harness.report.sheet import GOOD, Row, Value, label

EXPERIMENT = "ptq-harness"  # of MLflow, whose runs stand in one
WHERE = {"tensorboard": "DIR", "mlflow": "URI", "wandb": "PROJECT"}
EXAMPLE = "--log tensorboard:runs"
CONFIG = ("model", "method", "variant", "track", "budget_bpw", "seed", "allocate", "device")  # columns that say what

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Entry:
    """A cell as it is logged."""

    name: str
    key: str
    config: Mapping[str, Value]
    numbers: Mapping[str, float]  # finite ones, by the leaderboard's columns
    status: str
    reason: str

    @classmethod
    def of(cls, row: Row, config: Mapping[str, Value]) -> Entry:
        """`row`: of the leaderboard; `config`: what decided the cell, beyond what the row says of that."""
        numbers = {
            column: float(value)
            for column, value in row.items()
            if isinstance(value, int | float) and math.isfinite(value) and column not in CONFIG
        }
        told = {column: row[column] for column in CONFIG if row.get(column, "") != ""}
        return cls(label(row), str(row["cell"]), {**config, **told}, numbers, str(row["status"]), str(row["reason"]))


Callback = Callable[[Entry], None]


class Sinks:
    """Those of a run. A sink that fails is told of and left alone: it costs no cell. Cells end in several threads."""

    def __init__(self, callbacks: Mapping[str, Callback]) -> None:
        self._callbacks, self._lock = dict(callbacks), threading.Lock()

    def __bool__(self) -> bool:
        return bool(self._callbacks)

    def put(self, entry: Entry) -> None:
        with self._lock:
            for name, callback in list(self._callbacks.items()):
                try:
                    callback(entry)
                except Exception as failure:
                    del self._callbacks[name]
                    log.warning("nothing more is logged to %s (%s)", name, first_line(failure))


def open_sinks(text: str) -> Sinks:
    """Those that `--log` names, as tensorboard:DIR,mlflow:URI,wandb:PROJECT. Raises ValueError for one that is unknown,
    says no place, or whose package is missing."""
    opened = {}
    for part in filter(None, map(str.strip, text.split(","))):
        kind, _, place = part.partition(":")
        if kind not in WHERE or not place:
            ways = ", ".join(f"{name}:{what}" for name, what in WHERE.items())
            raise ValueError(f"'{part}' is no place to log to: write for example {EXAMPLE} (there are {ways})")
        try:
            opened[part] = {"tensorboard": _tensorboard, "mlflow": _mlflow, "wandb": _wandb}[kind](place)
        except ImportError:
            raise ValueError(f"--log {part} needs {kind}: pip install '.[{kind}]'") from None
        except ValueError:
            raise
        except Exception as failure:  # of theirs: a place that cannot be reached or written
            raise ValueError(
                f"--log {part} cannot be opened ({first_line(failure)}): give another {WHERE[kind]}"
            ) from None
    return Sinks(opened)


def _tensorboard(folder: str) -> Callback:
    """A folder of events per cell, with its configuration among the hyperparameters."""
    from torch.utils.tensorboard import SummaryWriter

    root = Path(folder).expanduser()
    root.mkdir(parents=True, exist_ok=True)

    def put(entry: Entry) -> None:
        own = root / f"{re.sub(r'[^A-Za-z0-9.=,_-]+', '_', entry.name)}-{entry.key}"
        for earlier in own.glob("events.out.tfevents.*"):
            earlier.unlink()
        with SummaryWriter(str(own)) as writer:
            writer.add_text("status", f"{entry.status} {entry.reason}".strip())
            writer.add_hparams(dict(entry.config), dict(entry.numbers), run_name=".")

    return put


def _mlflow(uri: str) -> Callback:
    """A run per cell, tagged with its key, in one experiment."""
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=uri)
    found = client.get_experiment_by_name(EXPERIMENT)
    experiment = found.experiment_id if found else client.create_experiment(EXPERIMENT)

    def put(entry: Entry) -> None:
        earlier = client.search_runs([experiment], f"tags.cell = '{entry.key}'")
        if earlier:
            run = earlier[0].info.run_id
        else:
            tags = {"cell": entry.key, "mlflow.runName": entry.name}
            run = client.create_run(experiment, tags=tags).info.run_id
            for name, value in entry.config.items():
                client.log_param(run, name, value)
        for column, number in entry.numbers.items():
            client.log_metric(run, re.sub(r"[^\w./ -]", "_", column), number)  # it takes no @
        client.set_tag(run, "status", entry.status)
        client.set_tag(run, "reason", entry.reason)
        client.set_terminated(run, "FINISHED" if entry.status in GOOD else "FAILED")

    return put


def _wandb(project: str) -> Callback:
    """A run per cell, whose id is its key. Their own variables say where to (WANDB_MODE, WANDB_API_KEY)."""
    import wandb

    if not hasattr(wandb, "init"):  # a folder of runs that it left here, and no package
        raise ImportError("wandb")

    def put(entry: Entry) -> None:
        run: Any = wandb.init(
            project=project,
            id=entry.key,
            name=entry.name,
            config=dict(entry.config),
            resume="allow",
            reinit="finish_previous",
        )
        run.summary.update({**entry.numbers, "status": entry.status, "reason": entry.reason})
        run.finish(exit_code=0 if entry.status in GOOD else 1)

    return put
