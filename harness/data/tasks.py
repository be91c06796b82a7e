"""Zero-shot tasks: names, groups and keys. What a task asks is lm-eval's own task file, found by name; nothing here
repeats it.

`pinned` documents come from one pinned wheel (harness.data.task_documents) and need no network. They are the very split
lm-eval scores, but for `sciq`: the wheel has its validation split, lm-eval scores the test split. `hub` documents are
whatever the hub serves."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar

from harness.data.files import digest
from harness.data.record import Record
from kernels.registry import suggestion

# Part of every result key: bump it when the same task would be scored differently.
#   1  all there are
TASK_VERSION = 1
OFFICIAL = {  # task -> its file among lm-eval's
    "piqa": "piqa/piqa.yaml",
    "arc_easy": "arc/arc_easy.yaml",
    "arc_challenge": "arc/arc_challenge.yaml",
    "hellaswag": "hellaswag/hellaswag.yaml",
    "winogrande": "winogrande/default.yaml",
    "boolq": "super_glue/boolq/default.yaml",
    "openbookqa": "openbookqa/openbookqa.yaml",
    "lambada_openai": "lambada/lambada_openai.yaml",
    "social_iqa": "siqa/siqa.yaml",
    "commonsense_qa": "commonsense_qa/default.yaml",
    "sciq": "sciq/sciq.yaml",
    "copa": "super_glue/copa/default.yaml",
    "rte": "glue/rte/default.yaml",
}
GROUPS = {
    "commonsense": (
        "piqa",
        "arc_easy",
        "arc_challenge",
        "hellaswag",
        "winogrande",
        "boolq",
    ),  # of most papers on quantisation
    "all": tuple(OFFICIAL),
}
PINNED_SPLITS = dict.fromkeys(OFFICIAL, "validation") | dict.fromkeys(
    ("arc_easy", "arc_challenge", "openbookqa", "lambada_openai"), "test"
)
SOURCES = ("pinned", "hub")
# The share of right answers; acc_norm divides an answer's log-likelihood by its characters.
METRICS = ("acc", "acc_norm")


@dataclass(frozen=True)
class Task(Record):
    """One lm-eval task as it is scored. `limit`: the first items only, None for all."""

    VERSION: ClassVar[int] = TASK_VERSION
    VERSION_KEY: ClassVar[str] = "task_version"

    name: str
    version: str  # lm-eval's version of the task
    split: str
    metrics: tuple[str, ...]  # those of METRICS it defines
    source: str = "pinned"
    few_shot: int = 0
    limit: int | None = None

    @property
    def headline(self) -> str:
        """The metric that is shown, averaged, ranked and flipped: acc_norm where the task has it."""
        return self.metrics[-1]

    @property
    def key(self) -> str:
        return digest(self.to_json())[:16]


def parse_tasks(text: str, source: str = "pinned", few_shot: int = 0, limit: int | None = None) -> tuple[Task, ...]:
    """A comma list of tasks and groups, in its order and each once; empty for an empty text. Raises ValueError that
    says what to type."""
    names: dict[str, None] = {}
    for name in filter(None, (part.strip() for part in text.split(","))):
        if name not in OFFICIAL and name not in GROUPS:
            raise ValueError(f"unknown task '{name}': {suggestion(name, [*OFFICIAL, *GROUPS])}")
        names |= dict.fromkeys(GROUPS.get(name, (name,)))
    if limit is not None and limit < 1:
        raise ValueError("--limit takes the first N items of every task: write for example --limit 100")
    if few_shot < 0:
        raise ValueError("--few-shot must be at least 0")
    if few_shot and source == "pinned":
        raise ValueError(
            "the pinned splits hold no training items to take examples from: write --few-shot with --task-source hub"
        )
    return tuple(_task(name, source, few_shot, limit) for name in names)


def _task(name: str, source: str, few_shot: int, limit: int | None) -> Task:
    config = official_config(official_file(name))
    official_split = "test" if config.get("test_split") else "validation"
    defined = [entry["metric"] for entry in config["metric_list"]]
    return Task(
        name,
        str((config.get("metadata") or {}).get("version", "Yaml")),
        PINNED_SPLITS[name] if source == "pinned" else official_split,
        tuple(metric for metric in METRICS if metric in defined),
        source,
        few_shot,
        limit,
    )


def official_file(name: str) -> Path:
    """lm-eval's file of a task. Raises ValueError when lm-eval is missing, or too old or new to have it there."""
    found = find_spec("lm_eval")
    if found is None or not found.submodule_search_locations:
        raise ValueError("--tasks needs lm-eval: pip install 'lm-eval>=0.4.13'")
    path = Path(found.submodule_search_locations[0]) / "tasks" / OFFICIAL[name]
    if not path.exists():
        raise ValueError(
            f"the installed lm-eval keeps {name} elsewhere (no {OFFICIAL[name]}): pip install 'lm-eval==0.4.13'"
        )
    return path


def official_config(path: Path) -> dict[str, Any]:
    """A task file with what it includes, without importing lm-eval or a task's code: functions are left as their
    names."""
    import yaml

    class Loader(yaml.SafeLoader):
        pass

    Loader.add_constructor("!function", lambda loader, node: node.value)
    config = yaml.load(path.read_text(encoding="utf-8"), Loader)
    included = config.pop("include", None)
    return {**official_config(path.parent / included), **config} if included else config
