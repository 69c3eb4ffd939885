"""vprune-main: V-PRUNE against FastV and VisionZip at matched reduction, laid out like the article's main table.

Source: V-PRUNE, Appl. Sci. 2025, 15(17), 9463. Its thresholds decide how much goes; the others get the same share, task
by task, as the article does. `random`, which the article lacks, stands beside them.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from vtp_plugin import config
from vtp_plugin.reporting.runs import Answer, Cell, Run
from vtp_plugin.reporting.tables import Table
from vtp_plugin.studies.evaluated import Cells, Evaluated, correct, interval, points, short, unpruned

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LEADER = "vprune"


class VPruneMain(Evaluated):
    """Accuracy, time and removed share per task."""

    name = "vprune-main"
    source = "V-PRUNE (Appl. Sci. 2025, 15(17), 9463), main table: removes 13-37 % at about equal accuracy"

    def planned(self) -> Cells:
        return unpruned() | {LEADER: (LEADER, self.settings["vprune"])}

    def check(self) -> None:
        super().check()
        for rival in self.settings["rivals"]:
            config.resolve(rival, {"keep_ratio": 0.5})

    def measure(self) -> dict[str, Any]:
        first = self.evaluate(self.planned(), "first")
        entries = [entry(first[id], first.baseline, task) for task in first.tasks for id in ("none", LEADER)]
        for number, (removed, tasks) in enumerate(self._matched(first).items()):
            cells = unpruned() | {r: (r, {"keep_ratio": round(1 - removed, 4)}) for r in self.settings["rivals"]}
            run = self.evaluate(cells, f"matched-{number}", tasks)
            entries += [entry(run[r], run.baseline, task) for task in run.tasks for r in self.settings["rivals"]]
        return {"entries": entries, "article": self.settings["article"], "missing": self.settings["missing"]}

    def _matched(self, run: Run) -> dict[float, list[str]]:
        """Removed share of V-PRUNE, rounded to a tenth of a percent -> the tasks where it removes that much."""
        shares = defaultdict(list)
        for task in run.tasks:
            shares[round(removed_share(run[LEADER].answers(task).values()), 3)].append(task)
        return dict(shares)

    def tables(self, results: Mapping[str, Any]) -> list[Table]:
        return [self._ours(results["entries"]), self._article(results)]

    def _ours(self, entries: Sequence[Mapping[str, Any]]) -> Table:
        methods = list(dict.fromkeys(e["method"] for e in entries))
        heads = [head for m in methods for head in (f"{label(m)} acc.", "time", "removed")]
        table = Table(["task", *heads, "V-PRUNE - full", "V-PRUNE - random"], title="Measured here")
        for task in dict.fromkeys(e["task"] for e in entries):
            found = {e["method"]: e for e in entries if e["task"] == task}
            cells = [c for m in methods for c in numbers(found[m])]
            gap = points(found[LEADER]["difference"])
            table.add(short(task), *cells, gap, against(found[LEADER], found.get("random")))
        table.caption = (
            "Accuracy in %, seconds of the model's calls over all questions, removed share of the visual tokens in %: "
            "what the article calls FLOPs ratio. V-PRUNE - full: points, paired bootstrap, 95 %; - random: points."
        )
        return table

    def _article(self, results: Mapping[str, Any]) -> Table:
        article = results["article"]
        table = Table(["data set", "lmms-eval task", *article["methods"]], title="The article's accuracies (%)")
        for name, row in article["rows"].items():
            table.add(name, row["task"] or "none", *(f"{value:.2f}" for value in row["accuracy"]))
        table.caption = f"Not in lmms-eval: {', '.join(results['missing'])}."
        return table

    def figures(self, results: Mapping[str, Any]) -> dict[str, Figure]:
        from matplotlib.figure import Figure

        entries = results["entries"]
        figure = Figure(figsize=(7, 3.2), layout="constrained")
        axis = figure.subplots()
        methods, tasks = (list(dict.fromkeys(e[key] for e in entries)) for key in ("method", "task"))
        width = 0.8 / len(methods)
        for number, method in enumerate(methods):
            heights = [100 * e["accuracy"] for e in entries if e["method"] == method]
            axis.bar([place + width * number for place in range(len(heights))], heights, width, label=label(method))
        axis.set_xticks([place + 0.4 - width / 2 for place in range(len(tasks))], map(short, tasks))
        axis.set_ylabel("accuracy, %")
        axis.legend(fontsize=7)
        return {"main": figure}


def entry(cell: Cell, baseline: Cell, task: str) -> dict[str, Any]:
    """One method on one task."""
    answers = cell.answers(task)
    return {
        "method": cell.pruning,
        "task": task,
        "pruning_args": dict(cell.pruning_args),
        "questions": len(answers),
        "accuracy": cell.accuracies[task],
        "difference": interval([correct(cell, task) - correct(baseline, task)]),
        "seconds": sum(a.report["seconds"].get("total", 0.0) for a in answers.values()),
        "removed": removed_share(answers.values()),
    }


def removed_share(answers: Sequence[Answer]) -> float:
    """Share of the visual tokens of all questions that is gone by the last layer."""
    images = [image for answer in answers for image in answer.report.get("images", [])]
    return 1 - float(np.sum([i["after"] for i in images]) / np.sum([i["before"] for i in images])) if images else 0.0


def numbers(found: Mapping[str, Any]) -> list[str]:
    return [f"{100 * found['accuracy']:.1f}", f"{found['seconds']:.0f} s", f"{100 * found['removed']:.1f}"]


def against(one: Mapping[str, Any], other: Mapping[str, Any] | None) -> str:
    return f"{100 * (one['accuracy'] - other['accuracy']):+.1f}" if other else "-"


def label(method: str) -> str:
    names = {"none": "LLaVA", "fastv": "FastV", "visionzip": "VisionZip", "vprune": "V-PRUNE"}
    return names.get(method, method)
