"""vtp-design: what every part of `vtp` is worth, on scenes that no table of results is made of.

Source: this package. Methods choose from what an embedded model shows them of a scene, and its language model answers
from what is left, at the original positions (tiny/reading.py). The scenes are validation scenes: other seeds and other
photographs than those of the tests.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from statistics import mean
from typing import TYPE_CHECKING, Any

from vtp_plugin import config
from vtp_plugin.errors import PruningError, unknown
from vtp_plugin.reporting.tables import Table
from vtp_plugin.stages import Stage
from vtp_plugin.studies.evaluated import digits, gain, hits, over_tasks
from vtp_plugin.studies.study import Study, some

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from vtp_plugin.strategy import PruningStrategy
    from vtp_plugin.tiny.language import Lesson
    from vtp_plugin.tiny.reading import Reading
    from vtp_plugin.tokens import VisualTokens

LEADER, WHOLE = "vtp", "unpruned"
SCENES = 1000  # that there are, of the validation seeds
TOGETHER = 25  # scenes


class VTPDesign(Study):
    """Accuracy with parts of `vtp` changed or left out, and beside other methods."""

    name = "vtp-design"
    source = "this package's own strategy: cover the picture, then keep its proportions; what each part is worth"

    def check(self) -> None:
        from vtp_plugin.tiny.reading import LAYOUTS

        said = self.settings
        self.check_ratios("keep")
        if said["model"] not in LAYOUTS:
            raise unknown(f"model of {self.name}", said["model"], LAYOUTS)
        self.seeds = some(range(SCENES), said["limit"], "limit")
        if LEADER not in said["parts"] or WHOLE in said["parts"]:
            raise PruningError(f"{self.name}: parts need one called '{LEADER}', and none called '{WHOLE}'")
        for keep in said["keep"]:
            for name in said["parts"]:
                self._strategy(name, keep)

    def _strategy(self, name: str, keep: float) -> PruningStrategy:
        """A row's strategy; PruningError if it asks for more than it can be given here."""
        from vtp_plugin.tiny.reading import SIGNALS

        fields = {"keep_ratio": keep, **(self.settings["parts"][name] or {})}
        (strategy,) = config.resolve(fields.pop("pruning", LEADER), fields)
        if strategy.stage is not Stage.PROJECTOR or strategy.merges or set(strategy.needs) - set(SIGNALS):
            known = f"in front of the projector, and need no more than {', '.join(SIGNALS)}"
            raise PruningError(f"{self.name}: '{name}' must choose {known}")
        return strategy

    def measure(self) -> dict[str, Any]:
        rows = [self.once(WHOLE, lambda: {"part": WHOLE, "keep": 1, "right": self._answered(None)})]
        for keep in self.settings["keep"]:
            for name in self.settings["parts"]:
                rows.append(self.once(f"{name}-{keep:g}".replace(" ", "-"), lambda of=(name, keep): self._row(*of)))
        return {"scenes": len(self.seeds), "rows": rows}

    def _row(self, name: str, keep: float) -> dict[str, Any]:
        return {"part": name, "keep": keep, "right": self._answered(self._strategy(name, keep))}

    @cached_property
    def reading(self) -> Reading:
        from vtp_plugin.tiny.reading import Reading

        return Reading(self.settings["model"])

    @cached_property
    def lots(self) -> list[tuple[VisualTokens, Lesson]]:
        """What is shown of some scenes, and the questions about them."""
        from vtp_plugin.tiny.scenes import sample_scene
        from vtp_plugin.tiny.testset import ask

        numbered = [(place, seed, sample_scene("validation", seed)) for place, seed in enumerate(self.seeds)]
        parts = [numbered[start : start + TOGETHER] for start in range(0, len(numbered), TOGETHER)]
        return [
            (
                self.reading.shown([scene for _, _, scene in part]),
                self.reading.lesson([list(ask(*of).values()) for of in part]),
            )
            for part in parts
        ]

    def _answered(self, strategy: PruningStrategy | None) -> dict[str, str]:
        """Per task, 1 or 0 for every scene."""
        found = [self.reading.answered(visual, strategy, lesson) for visual, lesson in self.lots]
        return digits({task: [hit for part in found for hit in part[task]] for task in found[0]})

    # -- what it looks like ---------------------------------------------------------------------------------------

    def tables(self, results: Mapping[str, Any]) -> list[Table]:
        return [self._table(results, keep) for keep in self.settings["keep"]]

    def _table(self, results: Mapping[str, Any], keep: float) -> Table:
        rows = {row["part"]: hits(row["right"]) for row in results["rows"] if row["keep"] in (1, keep)}
        tasks = list(rows[WHOLE])
        table = Table(["", *tasks, "mean", f"- {LEADER}"], title=f"Keep {keep:g}")
        for name, right in rows.items():
            table.add(
                name,
                *(f"{100 * mean(right[task]):.1f}" for task in tasks),
                f"{100 * over_tasks(right):.1f}",
                "" if name == LEADER else gain(right, rows[LEADER]),
            )
        table.caption = (
            f"{self.settings['model']}: {results['scenes']} validation scenes, a question of every task about each. "
            f"Accuracy in %, original positions; difference to {LEADER} of the mean, in points, paired bootstrap, 95 %."
        )
        return table

    def figures(self, results: Mapping[str, Any]) -> dict[str, Figure]:
        from matplotlib.figure import Figure

        figure = Figure(figsize=(6, 3.6), layout="constrained")
        axis, rows = figure.subplots(), results["rows"]
        for name in self.settings["parts"]:
            line = sorted((row["keep"], 100 * over_tasks(hits(row["right"]))) for row in rows if row["part"] == name)
            axis.plot(*zip(*line, strict=True), "o-", label=name, linewidth=2 if name == LEADER else 0.8)
        axis.axhline(100 * over_tasks(hits(rows[0]["right"])), color="grey", linewidth=0.8, label=WHOLE)
        axis.set_xlabel("keep ratio")
        axis.set_ylabel("mean accuracy, %")
        axis.legend(fontsize=6)
        return {"parts": figure}
