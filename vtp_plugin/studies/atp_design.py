"""atp-design: does ATP follow the question, and which of its open choices makes it?

Source: ATP, arXiv 2512.12701, leaves layer, alpha, normalisation and positions open, and its score is meant to keep
what the question names. Every reading of it is asked the same questions about the embedded scenes, whose objects are
known, so that three things can be told apart: what is answered; of which patches the kept ones are (of the object that
the question names, of the other objects, of the ground); and whether another question keeps other patches. A probe
(`tiny.probe`) reads the same kept tokens as a set, so that of what is lost it can be said how much was information.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations
from statistics import mean
from typing import TYPE_CHECKING, Any

import numpy as np

from vtp_plugin import config
from vtp_plugin.errors import PruningError
from vtp_plugin.reporting import statistics
from vtp_plugin.reporting.tables import Table
from vtp_plugin.studies.evaluated import interval, over_tasks, paired, points
from vtp_plugin.studies.study import Study, some, whole

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from torch import Tensor

    from vtp_plugin.tiny.probe import Reader
    from vtp_plugin.tiny.scenes import Scene

LEADER, CONTROL, WHOLE, COUNT = "atp", "random", "unpruned", "count"
READER = ("scenes", "steps")
WHERE = {"asked": "of the object asked for", "others": "of other objects", "ground": "of the ground"}
SURE = 0.05
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
        if said["reader"]:
            self._check_reader(said["reader"])
        for keep, name in self._cells():
            for strategy in config.resolve(*self._reading(name, keep)):
                if said["reader"] and strategy.merges:
                    raise PruningError(f"{self.name}: '{name}' merges tokens, the reader is shown unchanged ones")
        self.chosen = some(range(SCENES), said["limit"], "limit")

    def _check_reader(self, reader: Any) -> None:
        """Refuse a reader of another model than the embedded one, and numbers that mean nothing."""
        from vtp_plugin.tiny.checkpoint import NAME

        if self.settings["model"] != NAME:
            raise PruningError(f"{self.name}: the reader reads {NAME}'s tokens: say reader={{}} with another model")
        if set(reader) != set(READER) or not all(whole(n) and n > 0 for n in reader.values()):
            raise PruningError(f"{self.name}: reader must be {{}}, or whole numbers of {' and '.join(READER)}")

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

    @cached_property
    def reader(self) -> Reader:
        """Trained in the study's folder."""
        from vtp_plugin.tiny.fitting import Run
        from vtp_plugin.tiny.probe import trained

        return trained(Run(self.folder / "reader", console=self.console), **self.settings["reader"])

    @cached_property
    def tokens(self) -> Tensor:
        """Of every scene what the projector makes of it, [scenes, N, D]."""
        import torch

        said = self.processor.image_processor([scene.render() for scene in self.scenes], return_tensors="pt")
        values = said["pixel_values"].to(self.model.device, self.model.dtype)
        size = self.settings["batch"]
        with torch.no_grad():
            made = [self.model.model.get_image_features(part).pooler_output for part in values.split(size)]
        return torch.cat([torch.stack(list(rows)) for rows in made]).float().cpu()

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
        read = {"read": self._by_task(self._read(kept))} if self.settings["reader"] else {}
        return {"right": self._by_task(hits), **read, **followed(self.scenes, self.questions, kept, grid)}

    def _by_task(self, hits: Sequence[bool]) -> dict[str, list[bool]]:
        return {task: [h for h, a in zip(hits, self.questions, strict=True) if a.task == task] for task in self._tasks}

    def _read(self, kept: Sequence[Sequence[int]]) -> list[bool]:
        """Which questions the reader answers from the tokens that were kept for them."""
        from vtp_plugin.tiny.probe import reads

        pairs = zip(self.questions, kept, strict=True)
        return [reads(self.reader, self.tokens[one.scene, columns], one) for one, columns in pairs]

    @property
    def _tasks(self) -> list[str]:
        return list(dict.fromkeys(asked.task for asked in self.questions))

    # -- what it looks like ---------------------------------------------------------------------------------------

    def tables(self, results: Mapping[str, Any]) -> list[Table]:
        by_keep = [self._table(results, keep) for keep in self.settings["keep"]]
        return [*by_keep, *([self._split(results)] if "read" in results["rows"][0] else [])]

    def _table(self, results: Mapping[str, Any], keep: float) -> Table:
        rows = {row["reading"]: row for row in results["rows"] if row["keep"] in (1, keep)}
        tasks = list(rows[WHOLE]["right"])
        table = Table(["reading", *tasks, "mean", "- random", *WHERE.values(), "moves"], title=f"Keep {keep:g}")
        for name, row in rows.items():
            right = row["right"]
            gain = paired(right, rows[CONTROL]["right"])
            table.add(
                name,
                *(f"{100 * mean(right[task]):.1f}" for task in tasks),
                f"{100 * over_tasks(right):.1f}",
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

    def _split(self, results: Mapping[str, Any]) -> Table:
        """What every reading loses, and how much of it was in the tokens."""
        keeps, rows = self.settings["keep"], {(row["keep"], row["reading"]): row for row in results["rows"]}
        every = rows[1, WHOLE]
        tasks = list(every["right"])
        parts = [f"{part}, {keep:g}" for keep in keeps for part in ("lost", "information", "shift", "in counting")]
        table = Table(["reading", *parts], title="Information and shift")
        for name in self.settings["readings"]:
            cells = []
            for keep in keeps:
                row = rows[keep, name]
                lost, gone = (paired(every[key], row[key]) for key in ("right", "read"))
                shift = [a - b for a, b in zip(lost, gone, strict=True)]
                cells += [f"{100 * mean(map(np.mean, lost)):+.1f}", points(interval(gone)), points(interval(shift))]
                cells += [f"{100 * shift[tasks.index(COUNT)].mean():+.1f}" if COUNT in tasks else "-"]
            table.add(name, *cells)
        budgets = {keep: {name: row for (at, name), row in rows.items() if at == keep} for keep in keeps}
        said = " ".join(self._kept_information(keep, of) for keep, of in budgets.items())
        alone = [f"{100 * over_tasks(every[key]):.1f}" for key in ("right", "read")]
        table.caption = (
            f"Points below all tokens, mean of the tasks; all tokens: model {alone[0]}, reader {alone[1]} %. "
            "Information: what a reader of the kept tokens loses, which knows no order and no positions; shift: the "
            f"rest; paired bootstrap, 95 %; in counting: the shift of that task. {said} Of the others neither is shown "
            "(random flips of signs, adjusted for the readings of a budget after Holm)."
        )
        return table

    def _kept_information(self, keep: float, rows: Mapping[str, Mapping[str, Any]]) -> str:
        """Which readings keep more and which less of the information than as many random tokens, in words."""
        names = [name for name in rows if name != CONTROL]
        gains = [paired(rows[name]["read"], rows[CONTROL]["read"]) for name in names]
        sure = statistics.holm([statistics.flipped_signs(gain) for gain in gains])
        shown = {name: mean(map(np.mean, gain)) for name, gain, p in zip(names, gains, sure, strict=True) if p < SURE}
        more, less = ([name for name, value in shown.items() if sign * value > 0] for sign in (1, -1))
        kept, lost = (", ".join(f"*{name}*" for name in names) or "none" for names in (more, less))
        return f"At {keep:g}, shown to keep more information than random: {kept}; less: {lost}."

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
