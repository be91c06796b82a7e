"""lm-eval's tasks on documents that need no network: lm-eval's own task file, with the data set's place taken by a
local file.

Eight of the pinned files hold a data set's own columns. The others hold prompts composed of such columns, one line per
answer choice; here they are taken apart again. Of ARC and OpenBookQA the labels of the choices are lost and
assigned anew (A, B, ...), which no request depends on."""

from __future__ import annotations

import gzip
import json
import logging
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness.data.assets import TASKS, fetch
from harness.data.tasks import PINNED_SPLITS, Task, official_file
from harness.progress import Say, say_nothing

if TYPE_CHECKING:
    from lm_eval.api.task import ConfigurableTask

Document = dict[str, Any]
UNCONDITIONAL = 1_000_000  # document ids of prompts that repeat an item without its question start here
SEED = 1234  # lm-eval's own seed of the few-shot examples


def load_task(task: Task, say: Say = say_nothing) -> ConfigurableTask:
    """The task as lm-eval makes it, documents loaded. Raises ValueError when they cannot be had."""
    from lm_eval.tasks import TaskManager

    with tempfile.TemporaryDirectory() as folder, _quiet():
        write_task_file(task, Path(folder), say)
        try:
            loaded = TaskManager(include_path=folder, include_defaults=False).load([task.name])["tasks"][task.name]
        except OSError as error:  # every failure of a connection is one
            if task.source == "pinned":
                raise
            reason = str(error).strip().splitlines()[0][:160]
            raise ValueError(f"cannot get {task.name} from the hub ({reason}): write --task-source pinned") from error
    loaded.set_config(key="num_fewshot", value=task.few_shot)
    loaded.set_fewshot_seed(seed=SEED)
    return loaded


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the bars of `datasets`, nor what lm-eval thinks of its own task files."""
    import datasets

    logger = logging.getLogger("lm_eval")
    level, bars = logger.level, datasets.is_progress_bar_enabled()
    logger.setLevel(logging.ERROR)
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        logger.setLevel(level)
        if bars:
            datasets.enable_progress_bars()


def write_task_file(task: Task, folder: Path, say: Say = say_nothing) -> None:
    """Write <task>.yaml: lm-eval's own task file, by inclusion, and where its documents are. lm-eval's command line
    reads such a folder too (--include_path)."""
    import yaml

    config: dict[str, Any] = {"include": str(official_file(task.name)), "task": task.name, "tag": None}
    if task.source == "pinned":
        config |= dict.fromkeys(("training_split", "validation_split", "test_split")) | {
            f"{task.split}_split": task.split
        }
        files = {
            "data_files": {task.split: str(_write_documents(task.name, folder, say))},
            "cache_dir": str(folder / "datasets"),
        }
        config |= {"dataset_path": "json", "dataset_name": None, "dataset_kwargs": files}
    (folder / f"{task.name}.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")


def _write_documents(name: str, folder: Path, say: Say) -> Path:
    """The documents of a pinned task as JSON lines. Made from the pinned file whenever they are needed: nothing lies in
    a cache that would have to be believed."""
    path = folder / f"{name}.jsonl"
    rows = documents(name, fetch(TASKS[name], say, list(TASKS.values())))
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def documents(name: str, file: Path) -> list[Document]:
    """All documents of the task's split, with the columns of the hub's data set, in its order."""
    if file.suffix == ".arrow":
        import pyarrow

        with pyarrow.memory_map(str(file)) as stream:
            return pyarrow.ipc.open_stream(stream).read_all().to_pylist()
    rebuild = REBUILD[name]
    return [rebuild(line) for line in _first_lines(file)]


def _first_lines(file: Path) -> Iterator[dict[str, Any]]:
    """The line of every document's first choice."""
    with gzip.open(file, "rt", encoding="utf-8") as lines:
        for line in map(json.loads, lines):
            if line["doc_id"] < UNCONDITIONAL and line["idx"] == 0:
                yield line


def _question(query: str) -> str:
    head, tail = "Question: ", "\nAnswer:"
    if not (query.startswith(head) and query.endswith(tail)):
        raise ValueError(f"the pinned file holds another prompt than it used to: {query[:80]!r}")
    return query[len(head) : -len(tail)]


def _multiple_choice(column: str) -> Callable[[dict[str, Any]], Document]:
    def rebuild(line: dict[str, Any]) -> Document:
        doc = line["doc"]
        labels = [chr(ord("A") + i) for i in range(len(doc["choices"]))]
        return {
            "id": doc["id"],
            column: _question(doc["query"]),
            "choices": {"text": doc["choices"], "label": labels},
            "answerKey": labels[doc["gold"]],
        }

    return rebuild


def _boolq(line: dict[str, Any]) -> Document:
    """SuperGLUE's columns: the passage has its title in front, the question no question mark, label 1 is yes."""
    doc = line["doc"]
    passage, _, question = doc["query"].rpartition("\nQuestion: ")
    if not question.endswith("?\nAnswer:") or doc["choices"] != ["yes", "no"]:
        raise ValueError(f"the pinned file holds another prompt than it used to: {question[:80]!r}")
    return {
        "question": question.removesuffix("?\nAnswer:"),
        "passage": passage,
        "idx": doc["idx"],
        "label": 1 - doc["gold"],
    }


REBUILD: dict[str, Callable[[dict[str, Any]], Document]] = {
    "arc_easy": _multiple_choice("question"),
    "arc_challenge": _multiple_choice("question"),
    "openbookqa": _multiple_choice("question_stem"),
    "boolq": _boolq,
    "lambada_openai": lambda line: {"text": line["request"]["context"] + line["request"]["continuation"]},
}
assert TASKS.keys() == PINNED_SPLITS.keys()
