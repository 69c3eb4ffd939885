"""judged-where: does it matter whether tokens are judged in front of a merger or behind it, on a trained model?

Source: an unreviewed draft ("rank before merge") claims that the norm of what goes into a merger chooses better than
that of what comes out, by up to 27.7 points. The embedded video model merges squares of four patches into a token by
averaging, `vtp-tiny-qwen` by a learnt merger. Every method that compares features is asked for its choice by either
place (`judge`), and the same questions about test clips or scenes are answered from what it leaves, so that all that
differs is the place. The rows are the same rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from statistics import mean
from typing import TYPE_CHECKING, Any

import numpy as np

from vtp_plugin import config
from vtp_plugin.errors import PruningError, unknown
from vtp_plugin.reporting import statistics
from vtp_plugin.reporting.comparison import p_value
from vtp_plugin.reporting.tables import Table
from vtp_plugin.stages import Stage
from vtp_plugin.studies.evaluated import digits, hits, over_tasks, paired, points
from vtp_plugin.studies.study import Study, some

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from vtp_plugin.strategy import PruningStrategy
    from vtp_plugin.tiny.asked import Asked, Seen

PLACES = ("after", "before")
WHOLE, ALL = "unpruned", "all methods"
SURE = 0.05
SHOWN = {"vtp-tiny-video": "clips", "vtp-tiny-qwen": "scenes"}  # model: what it is shown
Right = dict[str, str]  # task -> 1 or 0 for every clip or scene


class JudgedWhere(Study):
    """Answers by methods that judge the merger's output, and by the same ones that judge its input."""

    name = "judged-where"
    source = "rank before merge (a draft): what goes into a merger chooses tokens better than what comes out"

    def check(self) -> None:
        from vtp_plugin.tiny.clips.testset import CLIPS
        from vtp_plugin.tiny.testset import SCENES

        said = self.settings
        self.check_ratios("keep")
        self.check_counts("batch")
        if said["model"] not in SHOWN:
            raise unknown(f"model of {self.name}", said["model"], SHOWN)
        self.numbers = some(range(CLIPS if self.shown == "clips" else SCENES), said["limit"], "limit")
        if not said["methods"] or {WHOLE, ALL} & set(said["methods"]):
            raise PruningError(f"{self.name}: methods need one, and none called '{WHOLE}' or '{ALL}'")
        for _ in self._cells():
            pass
        if not self.methods:
            raise PruningError(f"{self.name}: methods need one that is for pictures, {said['model']} is shown no video")

    @property
    def shown(self) -> str:
        """`clips` or `scenes`."""
        return SHOWN[self.settings["model"]]

    @cached_property
    def methods(self) -> dict[str, dict[str, Any]]:
        """Those of the settings; of scenes without those that compare frames."""
        said = {name: dict(fields or {}) for name, fields in self.settings["methods"].items()}
        return {
            name: fields
            for name, fields in said.items()
            if self.shown == "clips" or self._strategy(name, dict(fields), 0.5, "after").pictures
        }

    def _cells(self) -> Iterator[tuple[str, float, dict[str, PruningStrategy]]]:
        """A method, a budget, and the strategy that judges there, by place; PruningError for what cannot judge."""
        for keep in self.settings["keep"]:
            for name, fields in self.methods.items():
                yield name, keep, {place: self._strategy(name, dict(fields), keep, place) for place in PLACES}

    def _strategy(self, name: str, fields: dict[str, Any], keep: float, place: str) -> PruningStrategy:
        spec = fields.pop("pruning", name)
        found = config.resolve(
            spec, {**fields, "keep_ratio": keep, "positions": self.settings["positions"], "judge": place}
        )
        if len(found) > 1 or found[0].stage is not Stage.PROJECTOR:
            raise PruningError(f"{self.name}: method '{name}' must be one strategy at the projector stage")
        return found[0]

    def measure(self) -> dict[str, Any]:
        size = self.settings["batch"]
        parts = [self.numbers[start : start + size] for start in range(0, len(self.numbers), size)]
        done = [self.once(f"{self.shown}-{part[0]:03d}", lambda of=part: self._answered(of)) for part in parts]
        joined = [joined_rows([part["rows"][number] for part in done]) for number in range(len(done[0]["rows"]))]
        unpruned = {task: "".join(part[WHOLE][task] for part in done) for task in done[0][WHOLE]}
        return {self.shown: len(self.numbers), WHOLE: unpruned, "rows": joined}

    @cached_property
    def asked(self) -> Asked:
        from vtp_plugin.tiny import scene_questions
        from vtp_plugin.tiny.clips import questions as clip_questions

        return clip_questions.ClipQuestions() if self.shown == "clips" else scene_questions.SceneQuestions()

    def _answered(self, numbers: Sequence[int]) -> dict[str, Any]:
        """Every cell's answers to the questions about some clips or scenes."""
        prompts, rows = self.asked.about(numbers), []
        with self.asked.tower_once():
            whole = self.asked.answered(prompts, [])
            for name, keep, strategies in self._cells():
                seen = {place: self.asked.answered(prompts, [strategies[place]]) for place in PLACES}
                rows.append({"method": name, "keep": keep, "questions": len(whole.said), **compared(seen)})
        self.console.print(f"{self.shown} {numbers[0]} to {numbers[-1]} are answered")
        return {WHOLE: digits(whole.right), "rows": rows}

    # -- what it looks like ---------------------------------------------------------------------------------------

    def tables(self, results: Mapping[str, Any]) -> list[Table]:
        return [self._over_budgets(results), *(self._table(results, keep) for keep in self.settings["keep"])]

    def _over_budgets(self, results: Mapping[str, Any]) -> Table:
        """One row a method, its budgets together, and all methods in one."""
        by_method = {name: [r for r in results["rows"] if r["method"] == name] for name in self.methods}
        gains = {name: gain_of(rows) for name, rows in by_method.items()}
        sure = dict(zip(gains, statistics.holm([statistics.flipped_signs(g) for g in gains.values()]), strict=True))
        table = Table(["method", "after", "before", "before - after", "p"], title="All budgets together")
        for name, rows in by_method.items():
            shown = [f"{100 * mean(accuracy(row[place]) for row in rows):.1f}" for place in PLACES]
            table.add(name, *shown, gained(gains[name]), p_value(sure[name]))
        every = gain_of(results["rows"])
        shown = [f"{100 * mean(accuracy(row[place]) for row in results['rows']):.1f}" for place in PLACES]
        table.add(ALL, *shown, gained(every), p_value(statistics.flipped_signs(every)))
        table.caption = (
            f"{verdict(gains, sure, every)} {self._said(results)} p: adjusted for the methods (Holm), not that of all."
        )
        return table

    def _said(self, results: Mapping[str, Any]) -> str:
        whole, tasks = results[WHOLE], " and ".join(", ".join(results[WHOLE]).rsplit(", ", 1))
        alone = ", ".join(f"{task} {100 * mean(right):.1f}" for task, right in hits(whole).items())
        return (
            f"{results[self.shown]} test {self.shown}, a question of each of the tasks {tasks} about each; all tokens: "
            f"{alone}. "
            f"Accuracy in %, mean of the tasks, positions {self.settings['positions']}; before - after: points, paired "
            "bootstrap, 95 %; p: random flips of signs."
        )

    def _table(self, results: Mapping[str, Any], keep: float) -> Table:
        every = [gain_of([row]) for row in results["rows"]]
        sure = statistics.holm([statistics.flipped_signs(gain) for gain in every])
        tasks = list(results[WHOLE])
        columns = [f"{task}, {place}" for task in tasks for place in PLACES]
        table = Table(
            ["method", *columns, "before - after", "p", "same answer", "kept by both"], title=f"Keep {keep:g}"
        )
        for row, gain, p in zip(results["rows"], every, sure, strict=True):
            if row["keep"] == keep:
                right = [f"{100 * mean(hits(row[place])[task]):.1f}" for task in tasks for place in PLACES]
                shares = [f"{100 * row[name]:.0f}" for name in ("same", "both")]
                table.add(row["method"], *right, gained(gain), p_value(p), *shares)
        table.caption = (
            f"p: adjusted for the {len(every)} rows of all budgets (Holm). Same answer: right or wrong, in %. Kept by "
            "both: of the tokens that one place keeps, the share that the other keeps too, in %; a method whose "
            "features decide only what is merged into what keeps the same ones."
        )
        return table

    def figures(self, results: Mapping[str, Any]) -> dict[str, Figure]:
        from matplotlib.figure import Figure

        figure = Figure(figsize=(6, 4.2), layout="constrained")
        axis, names = figure.subplots(), list(self.methods)
        for shift, keep in enumerate(self.settings["keep"]):
            rows = {row["method"]: row for row in results["rows"] if row["keep"] == keep}
            found = [statistics.difference(gain_of([rows[name]])) for name in names]
            middle = np.array([100 * one.value for one in found])
            ends = np.array([[100 * one.low for one in found], [100 * one.high for one in found]])
            places = [number + 0.2 * (shift - 1) for number in range(len(names))]
            axis.errorbar(middle, places, xerr=np.abs(ends - middle), fmt="o", markersize=3, label=f"keep {keep:g}")
        axis.axvline(0, color="grey", linewidth=0.8)
        axis.set_yticks(range(len(names)), names)
        axis.invert_yaxis()
        axis.set_xlabel("before - after, points")
        axis.legend(fontsize=7)
        return {"places": figure}


def compared(seen: Mapping[str, Seen]) -> dict[str, Any]:
    """What was right by either place, and the share of questions and of tokens in which they agree."""
    after, before = (seen[place] for place in PLACES)
    both = mean(len(a & b) / max(len(a), len(b)) for a, b in zip(after.kept, before.kept, strict=True))
    same = mean(a == b for a, b in zip(after.said, before.said, strict=True))
    return {"after": digits(after.right), "before": digits(before.right), "same": same, "both": both}


def joined_rows(parts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """One row of what was answered about several lots."""
    weights, first = [part["questions"] for part in parts], parts[0]
    right = {place: {task: "".join(p[place][task] for p in parts) for task in first[place]} for place in PLACES}
    shares = {name: float(np.average([part[name] for part in parts], weights=weights)) for name in ("same", "both")}
    return {"method": first["method"], "keep": first["keep"], **right, **shares}


def gain_of(rows: Sequence[Mapping[str, Any]]) -> list[np.ndarray]:
    """Per task, before - after for every clip or scene, the mean of some rows."""

    gains = [paired(hits(row["before"]), hits(row["after"])) for row in rows]
    return [np.mean(of_task, 0) for of_task in zip(*gains, strict=True)]


def accuracy(right: Right) -> float:
    """The mean of the tasks."""
    return over_tasks(hits(right))


def gained(gain: Sequence[np.ndarray]) -> str:
    """A gain in points with its interval."""
    return points(vars(statistics.difference(gain)))


def verdict(gains: Mapping[str, Sequence[np.ndarray]], sure: Mapping[str, float], every: Sequence[np.ndarray]) -> str:
    """Which methods the place is shown to matter to, in words."""
    shown = {name: statistics.difference(gains[name]).value for name, p in sure.items() if p < SURE}
    better, worse = (", ".join(n for n, value in shown.items() if sign * value > 0) or "none" for sign in (1, -1))
    chance = "" if statistics.flipped_signs(every) < SURE else ", within chance"
    return (
        "Judged before the merger instead of behind it, these methods are shown to answer better: "
        f"{better}; worse: {worse}. All methods together: {gained(every)} points{chance}."
    )
