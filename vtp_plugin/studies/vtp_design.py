"""vtp-design: what every part of `vtp` is worth, on scenes that no table of results is made of.

Source: this package. Methods are asked for their choice of the embedded model's tokens, and its language model answers
from what is left, at the original positions. No host is between, so a row takes seconds. The scenes are validation
scenes: other seeds and other photographs than those of the tests.
"""

from __future__ import annotations

from collections.abc import Mapping
from statistics import mean
from typing import TYPE_CHECKING, Any

import numpy as np

from vtp_plugin import config
from vtp_plugin.errors import PruningError
from vtp_plugin.reporting.tables import Table
from vtp_plugin.stages import Stage
from vtp_plugin.studies.evaluated import gain, over_tasks
from vtp_plugin.studies.study import Study, some

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from torch import Tensor

    from vtp_plugin.strategy import PruningStrategy
    from vtp_plugin.tiny.vision import View

LEADER, WHOLE = "vtp", "unpruned"
SCENES = 1000  # that there are, of the validation seeds
GIVEN = ("projected", "cls_attention", "fingerprint")


class VTPDesign(Study):
    """Accuracy with parts of `vtp` changed or left out, and beside other methods."""

    name = "vtp-design"
    source = "this package's own strategy: cover the picture, then keep its proportions; what each part is worth"

    def check(self) -> None:
        said = self.settings
        self.check_ratios("keep")
        self.seeds = range(len(some(range(SCENES), said["limit"], "limit")))
        if LEADER not in said["parts"] or WHOLE in said["parts"]:
            raise PruningError(f"{self.name}: parts need one called '{LEADER}', and none called '{WHOLE}'")
        for keep in said["keep"]:
            for name in said["parts"]:
                self._strategy(name, keep)

    def _strategy(self, name: str, keep: float) -> PruningStrategy:
        """A row's strategy; PruningError if it asks for more than is GIVEN."""
        fields = {"keep_ratio": keep, **(self.settings["parts"][name] or {})}
        (strategy,) = config.resolve(fields.pop("pruning", LEADER), fields)
        if strategy.stage is not Stage.PROJECTOR or set(strategy.needs) - set(GIVEN):
            raise PruningError(f"{self.name}: '{name}' needs more than {', '.join(GIVEN)} in front of the projector")
        return strategy

    def measure(self) -> dict[str, Any]:
        rows = [self.once(WHOLE, lambda: {"part": WHOLE, "keep": 1, "right": self._answered(None)})]
        for keep in self.settings["keep"]:
            for name in self.settings["parts"]:
                rows.append(self.once(f"{name}-{keep:g}".replace(" ", "-"), lambda of=(name, keep): self._row(*of)))
        return {"scenes": len(self.seeds), "rows": rows}

    def _row(self, name: str, keep: float) -> dict[str, Any]:
        return {"part": name, "keep": keep, "right": self._answered(self._strategy(name, keep))}

    def _answered(self, strategy: PruningStrategy | None) -> dict[str, list[float]]:
        """Per task, 1 or 0 for every scene."""
        from vtp_plugin.tiny.examining import answered, shipped
        from vtp_plugin.tiny.pool import draw
        from vtp_plugin.tiny.scenes import sample_scene

        if not hasattr(self, "scenes"):
            self.networks, self.layout = shipped()
            self.scenes = [(seed, sample_scene("validation", seed)) for seed in self.seeds]
            self.images = np.stack([draw(scene) for _, scene in self.scenes])
        return answered(self.networks, self.layout, self.images, self.scenes, lambda *seen: _chosen(strategy, *seen))

    # -- what it looks like ---------------------------------------------------------------------------------------

    def tables(self, results: Mapping[str, Any]) -> list[Table]:
        return [self._table(results, keep) for keep in self.settings["keep"]]

    def _table(self, results: Mapping[str, Any], keep: float) -> Table:
        rows = {row["part"]: row["right"] for row in results["rows"] if row["keep"] in (1, keep)}
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
            f"{results['scenes']} validation scenes, a question of every task about each. Accuracy in %, original "
            f"positions; difference to {LEADER} of the mean, in points, paired bootstrap, 95 %."
        )
        return table

    def figures(self, results: Mapping[str, Any]) -> dict[str, Figure]:
        from matplotlib.figure import Figure

        figure = Figure(figsize=(6, 3.6), layout="constrained")
        axis, rows = figure.subplots(), results["rows"]
        for name in self.settings["parts"]:
            line = sorted((row["keep"], 100 * over_tasks(row["right"])) for row in rows if row["part"] == name)
            axis.plot(*zip(*line, strict=True), "o-", label=name, linewidth=2 if name == LEADER else 0.8)
        axis.axhline(100 * over_tasks(rows[0]["right"]), color="grey", linewidth=0.8, label=WHOLE)
        axis.set_xlabel("keep ratio")
        axis.set_ylabel("mean accuracy, %")
        axis.legend(fontsize=6)
        return {"parts": figure}


def _chosen(strategy: PruningStrategy | None, tokens: Tensor, view: View) -> Tensor:
    """The raster positions [B, K] that a strategy keeps of projected tokens [B, N, D]; None keeps all."""
    import torch

    from vtp_plugin.tiny.scenes import GRID
    from vtp_plugin.tokens import VisualTokens

    index = torch.arange(tokens.shape[1]).expand(len(tokens), -1)
    if strategy is None:
        return index
    content = (1e6 * view.patches[:, 0, 0]).long().tolist()  # tells pictures apart, for `random`
    seen = dict(zip(GIVEN, (tokens, view.attention, tuple(content)), strict=True))
    return torch.stack(strategy.decide(VisualTokens(view.patches, (GRID, GRID), index, **seen)).sources)
