"""What the studies of a whole model share: cells through lmms-eval, one row of numbers for each, paired intervals."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from vtp_plugin import config
from vtp_plugin.errors import Failed, PruningError
from vtp_plugin.reporting.runs import BASELINE, Cell, Run
from vtp_plugin.studies.study import Study

Cells = dict[str, tuple[str, dict[str, Any]]]  # id -> strategies, hyper-parameters
CONFIDENCE = 0.95


class Evaluated(Study):
    """A study of answers. `cells` says which configurations; every question is answered by each."""

    def check(self) -> None:
        from vtp_plugin.compare import sweep

        for spec, fields in self.planned().values():
            config.resolve(spec, {key: value for key, value in fields.items() if key != "perturb"})
        self.check_counts("batch_size")
        if self.jobs < 1:
            raise PruningError(f"{self.name}: jobs must be at least 1, got {self.jobs}")
        sweep.check_limit(self.settings["limit"], config.parse_names(self.settings["tasks"], f"{self.name}: tasks"))

    def planned(self) -> Cells:
        """The cells that are known before anything has been measured."""
        raise NotImplementedError

    def evaluate(self, cells: Cells, where: str = "runs", tasks: Sequence[str] = ()) -> Run:
        """Run the cells that have not ended yet; PruningError if one fails."""
        from vtp_plugin.compare import matrix, sweep

        said = self.settings
        run = sweep.run(
            self.folder / where,
            [matrix.cell(spec, id=id, **fields) for id, (spec, fields) in cells.items()],
            model=said["model"],
            model_args=said["model_args"],
            tasks=",".join(tasks) or said["tasks"],
            limit=said["limit"],
            options={"batch_size": said["batch_size"]},
            jobs=self.jobs,
            idle=True,
            console=self.console,
        )
        if run.failed:
            raise Failed(f"{self.name}: {run.failed[0].id} failed: {run.failed[0].error}")
        return run


def row(cell: Cell, baseline: Cell) -> dict[str, Any]:
    """What a table says of a cell: accuracy per task, paired difference to the baseline, tokens, FLOPs, seconds."""
    record = cell.record
    tokens, samples = record["visual_tokens"], record["samples"]["total"]
    return {
        "id": cell.id,
        "pruning": cell.pruning,
        "pruning_args": dict(cell.pruning_args),
        "questions": {task: len(cell.answers(task)) for task in cell.accuracies},
        "accuracy": cell.accuracies,
        "mean": mean(cell.accuracies),
        "difference": difference(cell, baseline),
        "tokens": {"before": tokens["mean_before"], "after": tokens["mean_after"]},
        "flops_ratio": record["prefill_flops"]["ratio"],
        "seconds": {part: seconds / samples for part, seconds in record["seconds"].items()},
    }


def mean(accuracies: Mapping[str, float]) -> float:
    """Over tasks, each counting the same."""
    return sum(accuracies.values()) / len(accuracies)


def difference(cell: Cell, baseline: Cell) -> dict[str, float]:
    """Mean over tasks of accuracy - baseline's, with its paired bootstrap interval."""
    return interval([correct(cell, task) - correct(baseline, task) for task in cell.accuracies])


def correct(cell: Cell, task: str) -> np.ndarray:
    """The value of every answer, in the order of the documents."""
    answers = cell.answers(task)
    return np.array([answers[document].correct for document in sorted(answers)])


def interval(by_task: Sequence[np.ndarray]) -> dict[str, float]:
    """Mean over tasks of the mean over questions, and its 95 % interval: questions are drawn again within tasks."""
    from scipy.stats import bootstrap

    def over_tasks(*parts: np.ndarray, axis: int = -1) -> np.ndarray:
        return sum(part.mean(axis=axis) for part in parts) / len(parts)

    value = float(over_tasks(*by_task))
    if all(np.ptp(part) == 0 for part in by_task):  # nothing varies: the interval is the value
        return {"value": value, "low": value, "high": value}
    rng = np.random.default_rng(0)
    found = bootstrap(by_task, over_tasks, n_resamples=2000, confidence_level=CONFIDENCE, method="percentile", rng=rng)
    return {"value": value, "low": float(found.confidence_interval.low), "high": float(found.confidence_interval.high)}


def rows(run: Run) -> list[dict[str, Any]]:
    return [row(cell, run.baseline) for cell in run]


def points(found: Mapping[str, float]) -> str:
    """A difference in percentage points with its interval."""
    return f"{100 * found['value']:+.1f} [{100 * found['low']:+.1f}, {100 * found['high']:+.1f}]"


def by_id(found: Sequence[Mapping[str, Any]]) -> dict[str, Mapping[str, Any]]:
    return {entry["id"]: entry for entry in found}


def short(task: str) -> str:
    """A task's name in a table's head."""
    return task.removeprefix("vtp_scenes_")


def unpruned() -> Cells:
    return {BASELINE: (BASELINE, {})}


def select(run: Run, chosen: Callable[[str, int], bool]) -> dict[str, dict[str, Any]]:
    """Accuracy of every cell over the questions that are chosen by task and document."""
    found = {}
    for cell in run:
        hits = [a.correct for task in run.tasks for doc, a in cell.answers(task).items() if chosen(task, doc)]
        found[cell.id] = {"questions": len(hits), "accuracy": float(np.mean(hits)) if hits else None}
    return found


def digits(right: Mapping[str, Sequence[float]]) -> dict[str, str]:
    """Answers that are right or wrong, a digit each, as records keep them."""
    return {task: "".join(str(int(hit)) for hit in hits) for task, hits in right.items()}


def hits(right: Mapping[str, str]) -> dict[str, list[int]]:
    """`digits`, read again."""
    return {task: list(map(int, written)) for task, written in right.items()}


def over_tasks(right: Mapping[str, Sequence[float]]) -> float:
    """The mean of what was right, every task counting the same."""
    return mean({task: statistics.mean(values) for task, values in right.items()})


def gain(right: Mapping[str, Sequence[float]], other: Mapping[str, Sequence[float]]) -> str:
    """The difference of two such means over the same questions, in points, with its paired interval."""
    return points(interval(paired(right, other)))


def paired(right: Mapping[str, Sequence[float]], other: Mapping[str, Sequence[float]]) -> list[np.ndarray]:
    """Per task, what the first has right more than the second, question by question."""
    return [np.subtract(right[task], other[task], dtype=float) for task in right]
