"""Zero-shot tasks in the leaderboard, and a page for each: accuracies with intervals, flips against the reference,
ranks.

Columns of a task T: `acc_T` and, where T has it, `acc_norm_T`, each with `_stderr` and its 95 % interval `_lo`, `_hi`;
then, of the headline metric (acc_norm where there is one), `rank_T` and `tie_T` within budget, track and seed, and
`flips_T`: the share of items that are right in one of row and reference and wrong in the other (Dutta et al. 2024,
"Accuracy is Not All You Need"); `retention_T`: its accuracy over the reference's. `acc_average` is the mean of the
headline metrics. All differences are paired: every row answered the same items."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Container, Mapping, Sequence
from functools import partial
from pathlib import Path

from harness.data.files import write_text
from harness.data.tasks import Task
from harness.report.sheet import Row, Sheet, label, number
from harness.report.stats import accuracy_difference, accuracy_interval, accuracy_ranks
from harness.report.summary import ranked_together
from harness.store.results import TaskResult

Results = Mapping[str, TaskResult | None]  # of one cell, by task
AVERAGE = "acc_average"
TIME_COLUMN = "tasks_s"


def task_columns(tasks: Sequence[Task]) -> list[str]:
    """Average first, then task by task; none when no tasks were asked for."""
    if not tasks:
        return []
    columns = [AVERAGE, f"{AVERAGE}_lo", f"{AVERAGE}_hi", "rank_average", "tie_average", "retention_average"]
    for task in tasks:
        columns += [f"{metric}_{task.name}{end}" for metric in task.metrics for end in ("", "_stderr", "_lo", "_hi")]
        columns += [f"{what}_{task.name}" for what in ("rank", "tie", "flips", "retention")]
    return [*columns, "provisional", TIME_COLUMN]


def fill_tasks(
    rows: Sequence[Row],
    results: Mapping[str, Results],
    tasks: Sequence[Task],
    reference: str,
    unseeded: Container[str] = (),
) -> None:
    """Set every task column of every row. `results`: by cell; `reference`: the reference's cell. Raises ValueError when
    two cells were asked different questions."""
    if not tasks:
        return
    for task in tasks:
        asked = {result.requests_sha256 for of_cell in results.values() if (result := of_cell.get(task.name))}
        if len(asked) > 1:
            raise ValueError(f"{task.name} was asked in two different wordings; run again with --fresh")
    for row in rows:
        row |= _row_values(str(row["cell"]), results, tasks, reference)
    for group in ranked_together(rows, unseeded):
        for name, some in [*((task.name, [task]) for task in tasks), ("average", tasks)]:
            answered = [row for row in group if all(results[str(row["cell"])].get(task.name) for task in some)]
            ranks = accuracy_ranks([_marks(results[str(row["cell"])], some) for row in answered])
            for row, rank in zip(answered, ranks, strict=True):
                row[f"rank_{name}"], row[f"tie_{name}"] = rank, "tie" if ranks.count(rank) > 1 else ""


def _row_values(cell: str, results: Mapping[str, Results], tasks: Sequence[Task], reference: str) -> Row:
    """The columns of one row, without ranks."""
    of_cell = results.get(cell, {})
    done = [result for result in of_cell.values() if result]
    values: Row = {}
    for task in tasks:
        if result := of_cell.get(task.name):
            values |= _values(task, result)
            base = results.get(reference, {}).get(task.name)
            if base and cell != reference:
                lost, gained, _ = flips(result, base, task.headline)
                values[f"flips_{task.name}"] = (lost + gained) / result.items
            if base and (whole := base.metrics[task.headline].value):
                values[f"retention_{task.name}"] = result.metrics[task.headline].value / whole
    if done:
        values["provisional"] = provisional(tasks)
        values[TIME_COLUMN] = sum(result.seconds for result in done)
    if len(done) == len(tasks):
        marks = _marks(of_cell, tasks)
        low, high = accuracy_interval(marks)
        mean = _mean(marks)
        values |= {AVERAGE: mean, f"{AVERAGE}_lo": low, f"{AVERAGE}_hi": high}
        of_reference = results.get(reference, {})
        if all(of_reference.get(task.name) for task in tasks):
            values["retention_average"] = mean / _mean(_marks(of_reference, tasks))
    return values


def _mean(marks: Sequence[Sequence[int]]) -> float:
    return math.fsum(sum(m) / len(m) for m in marks) / len(marks)


def provisional(tasks: Sequence[Task]) -> str:
    """What part of the tasks was scored, in words; empty for all of them."""
    return f"first {tasks[0].limit} items of every task" if tasks[0].limit else ""


def flips(result: TaskResult, base: TaskResult, metric: str) -> tuple[int, int, int]:
    """Items that are (right in the reference and wrong here, the reverse, answered differently), the last also between
    wrong answers."""
    pairs = list(zip(result.marks(metric), base.marks(metric), strict=True))
    changed = sum(a != b for a, b in zip(result.answers[metric], base.answers[metric], strict=True))
    return pairs.count((0, 1)), pairs.count((1, 0)), changed


def task_means(summary: Sequence[Row], rows: Sequence[Row], tasks: Sequence[Task]) -> None:
    """Set the accuracies and flips of rows over several seeds to the means of theirs."""
    by_cell = {row["cell"]: row for row in rows}
    names = (
        [
            AVERAGE,
            "retention_average",
            *(f"{what}_{task.name}" for task in tasks for what in (*task.metrics, "flips", "retention")),
        ]
        if tasks
        else []
    )
    for mean in summary:
        members = [by_cell[cell] for cell in str(mean["cell"]).split("|")]
        for name in names:
            missing = any(member[name] == "" for member in members)
            mean[name] = "" if missing else statistics.fmean(number(member, name) for member in members)


def shown_tasks(tasks: Sequence[Task], ranks: bool = True) -> dict[str, Callable[[Row], str]]:
    """Columns of the sheet people read: title -> text of a row. Titles say when only some items were scored."""
    if not tasks:
        return {}
    part = f" (first {tasks[0].limit})" if tasks[0].limit else ""
    shown: dict[str, Callable[[Row], str]] = {f"average acc{part}": partial(_accuracy, column=AVERAGE)}
    if ranks:
        shown["rank acc"] = partial(_rank, name="average")
    for task in tasks:
        title = f"{task.headline} {task.name}{part}"
        shown[title] = partial(_accuracy, column=f"{task.headline}_{task.name}")
    return shown


def write_pages(
    folder: Path, rows: Sequence[Row], results: Mapping[str, Results], tasks: Sequence[Task], reference: str
) -> None:
    """Write tasks/<task>.md for every task: one line per row that has it, in the order of `rows`."""
    for task in tasks:
        of_cell = {cell: result for cell, of_task in results.items() if (result := of_task.get(task.name))}
        write_text(folder / "tasks" / f"{task.name}.md", _page(task, rows, of_cell, reference))


def _page(task: Task, rows: Sequence[Row], results: Mapping[str, TaskResult], reference: str) -> str:
    if not results:
        return f"# {task.name}\n\nNo row has a result.\n"
    first = next(iter(results.values()))
    part = (
        f"**provisional: the first {first.items} of {first.of_items} items**"
        if task.limit
        else f"all {first.items} items"
    )
    about = (
        f"# {task.name}\n\nlm-eval's task, version {task.version}, {task.few_shot} examples in front; "
        f"{task.split} split ({task.source}), {part}; scored with lm-eval {first.lm_eval}. "
        f"Requests: sha256 `{first.requests_sha256}`.\n\n"
    )
    header = [
        "method",
        *(f"{metric} [95 %] ± stderr" for metric in task.metrics),
        f"{task.headline} - reference [95 %]",
    ]
    header += ["rank", "flips", "right to wrong", "wrong to right", "other answer"]
    base, lines = results.get(reference), []
    for row in rows:
        result = results.get(str(row["cell"]))
        if result is None:
            continue
        line = [label(row)]
        for metric in task.metrics:
            line.append(f"{_accuracy(row, f'{metric}_{task.name}')} ± {result.metrics[metric].stderr:.3f}")
        line += _against(result, base if row["cell"] != reference else None, task.headline)
        line.insert(len(task.metrics) + 2, _rank(row, task.name))
        lines.append(line)
    legend = (
        f"\nDifferences are paired, item by item. Flips, and the columns behind them, are of {task.headline}: "
        "the share of items right in one of row and reference and wrong in the other; their numbers, each way; "
        "items with another answer, whether right or wrong.\n"
    )
    return about + Sheet(header, lines).markdown() + legend


def _against(result: TaskResult, base: TaskResult | None, metric: str) -> list[str]:
    if base is None:
        return [""] * 5
    difference, low, high = accuracy_difference([result.marks(metric)], [base.marks(metric)])
    lost, gained, changed = flips(result, base, metric)
    share = (lost + gained) / result.items
    return [f"{difference:+.3f} [{low:+.3f}, {high:+.3f}]", f"{share:.3f}", str(lost), str(gained), str(changed)]


def _values(task: Task, result: TaskResult) -> Row:
    values: Row = {}
    for metric in task.metrics:
        name, (low, high) = f"{metric}_{task.name}", accuracy_interval([result.marks(metric)])
        values |= {name: result.metrics[metric].value, f"{name}_stderr": result.metrics[metric].stderr}
        values |= {f"{name}_lo": low, f"{name}_hi": high}
    return values


def _marks(results: Results, tasks: Sequence[Task]) -> list[list[int]]:
    return [result.marks(task.headline) for task in tasks if (result := results.get(task.name))]


def _rank(row: Row, name: str) -> str:
    return f"{row[f'rank_{name}']} {row[f'tie_{name}']}".strip()


def _accuracy(row: Row, column: str) -> str:
    value, low, high = (row.get(column + end, "") for end in ("", "_lo", "_hi"))
    if value == "":
        return ""
    return f"{value:.3f} [{low:.3f}, {high:.3f}]" if isinstance(low, float) else f"{value:.3f}"
