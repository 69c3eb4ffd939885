"""hard-samples: what pruning does to the questions that a picture at lower resolution does not answer.

Source: the criticism of VTC-Bench (arXiv 2510.07143): most benchmark questions are answered from a down-sampled
picture, so a method shows its worth on the others; and small objects, counting and position suffer first.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import cache
from typing import TYPE_CHECKING, Any

from vtp_plugin.reporting.runs import Run
from vtp_plugin.reporting.tables import Table
from vtp_plugin.studies.evaluated import Cells, Evaluated, by_id, rows, select, unpruned

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Chosen = Callable[[str, int], bool]
DOWNSAMPLED = "downsample"
SMALL = 32  # pixels: the embedded scenes' shapes have sides of 28 to 40


class HardSamples(Evaluated):
    """Accuracy per group of questions."""

    name = "hard-samples"
    source = "VTC-Bench (arXiv 2510.07143): accuracy on what down-sampling gets wrong"

    def planned(self) -> Cells:
        budget = {"keep_ratio": self.settings["keep"]}
        methods = dict.fromkeys([DOWNSAMPLED, *self.settings["pruning"]])
        return unpruned() | {name: (name, budget if self._budgeted(name) else {}) for name in methods}

    @staticmethod
    def _budgeted(name: str) -> bool:
        from vtp_plugin.plugins import get_strategy

        return get_strategy(name).budgeted

    def measure(self) -> dict[str, Any]:
        run = self.evaluate(self.planned())
        return {"cells": rows(run), "groups": {name: select(run, chosen) for name, chosen in self.groups(run).items()}}

    def groups(self, run: Run) -> dict[str, Chosen]:
        """Which questions are hard, small, about a number, about a place."""
        low = run[DOWNSAMPLED]
        found = {
            "all": lambda task, doc: True,
            "easy": lambda task, doc: low.answers(task)[doc].correct > 0,
            "hard": lambda task, doc: not low.answers(task)[doc].correct > 0,
        }
        for group, tasks in self.settings["task_groups"].items():
            found[group] = lambda task, doc, tasks=tuple(tasks): task in tasks
        if "vtp-tiny" in self.settings["model_args"]:
            found["small objects"] = lambda task, doc: (sides().get((task, doc)) or SMALL + 1) <= SMALL
        return found

    def tables(self, results: Mapping[str, Any]) -> list[Table]:
        groups, tokens = results["groups"], by_id(results["cells"])
        table = Table(["strategy", "tokens", *groups], title=f"Keep {self.settings['keep']:g}")
        for id in tokens:
            values = [groups[group][id]["accuracy"] for group in groups]
            cells = ["-" if value is None else f"{100 * value:.1f}" for value in values]
            table.add("unpruned" if id == "none" else id, f"{tokens[id]['tokens']['after']:.0f}", *cells)
        sizes = ", ".join(f"{group} {groups[group]['none']['questions']}" for group in groups)
        table.caption = (
            f"Accuracy in %. Questions: {sizes}. Hard: wrong when the picture is down-sampled to as many tokens."
        )
        return [table]

    def figures(self, results: Mapping[str, Any]) -> dict[str, Figure]:
        from matplotlib.figure import Figure

        groups = results["groups"]
        ids = [id for id in groups["all"] if id not in ("none", DOWNSAMPLED)]
        figure = Figure(figsize=(6, 0.3 * len(ids) + 1.2), layout="constrained")
        axis = figure.subplots()
        for group, mark in {"easy": "o", "hard": "s"}.items():
            axis.plot([percent(groups[group][id]["accuracy"]) for id in ids], ids, mark, label=group)
        axis.set_xlabel("accuracy, %")
        axis.legend()
        return {"hard": figure}


def percent(accuracy: float | None) -> float:
    """For a figure: a group without a question has no place in it."""
    return math.nan if accuracy is None else 100 * accuracy


@cache
def sides() -> dict[tuple[str, int], int]:
    """The side in pixels of the thing that an embedded question asks about, where it is one thing."""
    from vtp_plugin.tiny.testset import ask, select

    found = {}
    for index, (seed, scene) in enumerate(select()):
        for task, question in ask(index, seed, scene).items():
            thing = scene.plate if task == "digit" else scene.unique.get(question.text.split()[-1])
            if thing is not None and task != "count":
                found[f"vtp_scenes_{task}", index] = thing.side
    return found
