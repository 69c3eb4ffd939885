"""atp-design: does ATP follow the question, and which of its open choices makes it?

Source: ATP, arXiv 2512.12701, leaves layer, alpha, normalisation and positions open, and its score is meant to keep
what the question names. Every reading of it is asked the same questions about the embedded scenes, whose objects are
known, so that three things can be told apart: what is answered; of which patches the kept ones are (of the object that
the question names, of the other objects, of the ground); and whether another question keeps other patches.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from statistics import mean
from typing import TYPE_CHECKING, Any

import numpy as np

from vtp_plugin import config
from vtp_plugin.errors import PruningError
from vtp_plugin.reporting.tables import Table
from vtp_plugin.studies.evaluated import interval, points
from vtp_plugin.studies.study import Study, some

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from vtp_plugin.tiny.scenes import Scene

LEADER, CONTROL, WHOLE = "atp", "random", "unpruned"
WHERE = {"asked": "of the object asked for", "others": "of other objects", "ground": "of the ground"}
COVERED = 0.3  # share of a patch from which on it belongs to an object


@dataclass(frozen=True)
class Asked:
    """One question about one scene."""

    scene: int
    task: str
    text: str
    answer: str
    named: str  # the shape that it names, if that is there; the plate for its digit; "": none that is there


class AtpDesign(Study):
    """Answers, and where the kept patches are, over ATP's open choices."""

    name = "atp-design"
    source = "ATP (arXiv 2512.12701): what resembles the question is kept; layer, alpha, N(.), sign are left open"

    def check(self) -> None:
        from vtp_plugin.tiny.testset import SCENES

        said = self.settings
        self.check_ratios("keep")
        self.check_counts("batch")
        if taken := {WHOLE} & set(said["readings"]):
            raise PruningError(f"{self.name}: a reading cannot be called '{taken.pop()}'")
        if CONTROL not in said["readings"]:
            raise PruningError(f"{self.name}: readings need one called '{CONTROL}', which the others are held against")
        for keep, name in self._cells():
            config.resolve(*self._reading(name, keep))
        self.chosen = some(range(SCENES), said["limit"], "limit")

    def measure(self) -> dict[str, Any]:
        from vtp_plugin.tiny.inference import load

        self.scenes, self.questions = questions(self.chosen)
        self.model, self.processor = load(self.settings["model"])
        rows = [self.once("unpruned", lambda: {"reading": WHOLE, "keep": 1, **self._examine("none", {})})]
        for keep, name in self._cells():
            rows.append(self.once(f"{name}-{keep:g}".replace(" ", "-"), lambda at=(keep, name): self._row(*at)))
        return {"scenes": len(self.scenes), "questions": len(self.questions), "rows": rows}

    def _cells(self) -> Iterator[tuple[float, str]]:
        for keep in self.settings["keep"]:
            for name in self.settings["readings"]:
                yield keep, name

    def _reading(self, name: str, keep: float) -> tuple[str, dict[str, Any]]:
        fields = dict(self.settings["readings"][name] or {})
        return fields.pop("pruning", LEADER), {"keep_ratio": keep, "positions": self.settings["positions"], **fields}

    def _row(self, keep: float, name: str) -> dict[str, Any]:
        return {"reading": name, "keep": keep, **self._examine(*self._reading(name, keep))}

    def _examine(self, spec: str, fields: dict[str, Any]) -> dict[str, Any]:
        """Every question once: which answers are right, and where the patches are that were kept for it."""
        from vtp_plugin.pruning import prune
        from vtp_plugin.tiny.inference import answers

        pictures, kept, hits = [scene.render() for scene in self.scenes], [], []
        with prune(self.model, spec, processor=self.processor, **fields) as pruned:
            grid = pruned.adapter.tower.grid
            pruned.finished.append(lambda call: kept.extend(image.index.tolist() for image in call.images))
            for start in range(0, len(self.questions), self.settings["batch"]):
                batch = self.questions[start : start + self.settings["batch"]]
                said = answers(self.model, self.processor, [pictures[a.scene] for a in batch], [a.text for a in batch])
                hits += [s.lower().strip(" .").split()[:1] == [a.answer] for s, a in zip(said, batch, strict=True)]
        right = {task: [h for h, a in zip(hits, self.questions, strict=True) if a.task == task] for task in self._tasks}
        return {"right": right, **followed(self.scenes, self.questions, kept, grid)}

    @property
    def _tasks(self) -> list[str]:
        return list(dict.fromkeys(asked.task for asked in self.questions))

    # -- what it looks like ---------------------------------------------------------------------------------------

    def tables(self, results: Mapping[str, Any]) -> list[Table]:
        return [self._table(results, keep) for keep in self.settings["keep"]]

    def _table(self, results: Mapping[str, Any], keep: float) -> Table:
        rows = {row["reading"]: row for row in results["rows"] if row["keep"] in (1, keep)}
        tasks = list(rows[WHOLE]["right"])
        table = Table(["reading", *tasks, "mean", "- random", *WHERE.values(), "moves"], title=f"Keep {keep:g}")
        for name, row in rows.items():
            right = row["right"]
            gain = [np.subtract(right[task], rows[CONTROL]["right"][task], dtype=float) for task in tasks]
            table.add(
                name,
                *(f"{100 * mean(right[task]):.1f}" for task in tasks),
                f"{100 * mean(mean(right[task]) for task in tasks):.1f}",
                "" if name in (WHOLE, CONTROL) else points(interval(gain)),
                *(f"{100 * row[where]:.0f}" for where in WHERE),
                f"{100 * row['moves']:.0f}",
            )
        table.caption = (
            f"{results['scenes']} embedded scenes, {results['questions']} questions. Accuracy in %; difference to "
            "random of the mean, in points, paired bootstrap, 95 %. Of ...: share of these patches that is kept, in %, "
            "over questions that name an object that is there. Moves: share of the kept patches, in %, that another "
            "question about the same picture, which names another object, does not keep."
        )
        return table

    def figures(self, results: Mapping[str, Any]) -> dict[str, Figure]:
        from matplotlib.figure import Figure

        figure = Figure(figsize=(6, 3.6), layout="constrained")
        axis = figure.subplots()
        for keep in self.settings["keep"]:
            rows = [row for row in results["rows"] if row["keep"] == keep]
            follow = [100 * (row["asked"] - row["others"]) for row in rows]
            axis.plot(follow, [100 * mean(map(mean, row["right"].values())) for row in rows], "o", label=f"{keep:g}")
            for x, row in zip(follow, rows, strict=True):
                axis.annotate(row["reading"], (x, 100 * mean(map(mean, row["right"].values()))), fontsize=6)
        axis.set_xlabel("kept of the object asked for - of other objects, points")
        axis.set_ylabel("mean accuracy, %")
        axis.legend(title="keep")
        return {"follows": figure}


def questions(chosen: Sequence[int]) -> tuple[list[Scene], list[Asked]]:
    """The chosen test scenes, and a question of every task about each."""
    from vtp_plugin.tiny.scenes import PLATE
    from vtp_plugin.tiny.testset import ask, select

    drawn, found = select(), []
    for number, index in enumerate(chosen):
        seed, scene = drawn[index]
        shapes = {shape: shape for shape in scene.counts} | {f"{shape}s": shape for shape in scene.counts}
        shapes |= {f"{shape}es": shape for shape in scene.counts} | {"digit": PLATE}
        for task, question in ask(index, seed, scene).items():
            named = shapes.get(question.text.split()[-1], "")
            found.append(Asked(number, task, question.text, question.answer, named))
    return [drawn[index][1] for index in chosen], found


def followed(
    scenes: Sequence[Scene], asked: Sequence[Asked], kept: Sequence[Sequence[int]], grid: tuple[int, int]
) -> dict[str, float]:
    """Shares of the patches that are kept, of what a question names and of the rest, and how much that moves."""
    shares: dict[str, list[float]] = {where: [] for where in WHERE}
    of_scene: dict[int, dict[str, set[int]]] = {}
    for question, columns in zip(asked, kept, strict=True):
        if not question.named:
            continue
        patches = parts(scenes[question.scene], question.named, grid)
        for where, found in patches.items():
            if found:
                shares[where].append(len(found & set(columns)) / len(found))
        of_scene.setdefault(question.scene, {})[question.named] = set(columns)
    moved = [
        1 - len(one & other) / max(1, len(one))
        for named in of_scene.values()
        for one, other in combinations(named.values(), 2)
    ]
    return {where: mean(values) for where, values in shares.items()} | {"moves": mean(moved) if moved else 0.0}


def parts(scene: Scene, named: str, grid: tuple[int, int]) -> dict[str, set[int]]:
    """Raster positions of the patches of the objects of one shape, of all others, and of the ground."""
    asked, others = set(), set()
    for thing in scene.things:
        (asked if thing.shape == named else others).update(covered(thing.box, grid))
    return {"asked": asked, "others": others - asked, "ground": set(range(grid[0] * grid[1])) - asked - others}


def covered(box: Sequence[float], grid: tuple[int, int]) -> list[int]:
    """Patches of a grid over the picture that a box (x0, y0, x1, y1) in its pixels covers."""
    from vtp_plugin.tiny.scenes import SIZE

    along = [
        np.clip(np.minimum(edges + SIZE / parts, high) - np.maximum(edges, low), 0, None) * parts / SIZE
        for low, high, parts in ((box[1], box[3], grid[0]), (box[0], box[2], grid[1]))
        for edges in [np.arange(parts) * SIZE / parts]
    ]
    return np.flatnonzero(np.outer(*along).ravel() >= COVERED).tolist()
