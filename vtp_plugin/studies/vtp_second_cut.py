"""vtp-second-cut: what a second cut, between two decoder layers, is worth behind `vtp`, at equal tokens x layers.

Source: this package; the idea of the second cut is CoRePrune's. A budget is the share of the unpruned model's tokens x
layers, text not counted. `vtp` lets so many times the budget enter the language model (`enters`; without it everything
enters), and the cut of a row leaves as many as then cost the budget. A row may be for some budgets only (`keep`). Every
strategy is attached to the embedded model as it is to any other; how much a row spent is read from the pruned calls.
The scenes are validation scenes: other seeds and other photographs than those of the tests.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from statistics import mean
from typing import TYPE_CHECKING, Any

from vtp_plugin import config
from vtp_plugin.errors import PruningError
from vtp_plugin.reporting.tables import Table
from vtp_plugin.stages import Stage
from vtp_plugin.studies.evaluated import gain, over_tasks
from vtp_plugin.studies.study import Study, some, whole

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from vtp_plugin.strategy import PruningStrategy
    from vtp_plugin.tiny.questioning import Questions

LEADER, WHOLE = "vtp", "unpruned"
SCENES = 1000  # that there are, of the validation seeds
FIELDS = ("enters", "cut", "keep")


class VTPSecondCut(Study):
    """Accuracy with a second cut behind `vtp`, and with methods that cut between decoder layers only."""

    name = "vtp-second-cut"
    source = "this package's own strategy: whether a second cut at a quarter of the depth pays for what it costs"

    def check(self) -> None:
        said = self.settings
        self.check_ratios("keep")
        self.check_counts("batch")
        self.seeds = some(range(SCENES), said["limit"], "limit")
        if WHOLE in said["rows"]:
            raise PruningError(f"{self.name}: a row cannot be called '{WHOLE}'")
        for name in {LEADER, said["form"]} - set(said["rows"]):
            raise PruningError(f"{self.name}: rows need one called '{name}', which the others are held against")
        for name, row in said["rows"].items():
            self._check_row(name, row)

    def _check_row(self, name: str, row: Any) -> None:
        """Refuse a row that says no cut, or a cut that is none between decoder layers."""
        if not isinstance(row, Mapping) or not {"enters", "cut"} & set(row) or set(row) - set(FIELDS):
            raise PruningError(f"{self.name}: expected {', '.join(FIELDS)} of row '{name}', got {row!r}")
        enters, budgets = row.get("enters", 1), row.get("keep", self.settings["keep"])
        if not isinstance(budgets, list) or not set(budgets) <= set(self.settings["keep"]):
            raise PruningError(f"{self.name}: keep of row '{name}' must be some of {self.settings['keep']}")
        if not (whole(enters) or isinstance(enters, float)) or not 0 < enters < 100:
            raise PruningError(f"{self.name}: enters of row '{name}' must be a number above 0, got {enters!r}")
        for strategy in self._strategies(row, 0.5 / enters, 1)["enters" in row :]:
            if strategy.stage is not Stage.LLM:
                raise PruningError(f"{self.name}: row '{name}' must cut at the llm stage, {strategy.name} does not")

    def _strategies(self, row: Mapping[str, Any], budget: float, tokens: int) -> list[PruningStrategy]:
        """What is attached for a row: `vtp` if not everything enters, and the cut that leaves so many tokens."""
        chosen: list[Any] = []
        if "enters" in row:
            chosen.append({"strategy": LEADER, "keep_ratio": row["enters"] * budget})
        if "cut" in row:
            chosen.append({**row["cut"], "keep_tokens": tokens})
        return [s for one in chosen for s in config.resolve({"positions": self.settings["positions"], **one})]

    def measure(self) -> dict[str, Any]:
        rows = [self.once(WHOLE, lambda: {"row": WHOLE, "keep": 1, **self.asked.answered([])})]
        for keep in self.settings["keep"]:
            for name in self._asked_at(keep):
                found = self.once(f"{name}-{keep:g}".replace(" ", "-"), lambda of=(name, keep): self._row(*of))
                rows += [found] if found else []
        return {"scenes": len(self.seeds), "rows": rows}

    @cached_property
    def asked(self) -> Questions:
        from vtp_plugin.tiny.questioning import Questions

        return Questions(self.seeds, self.settings["batch"])

    def _asked_at(self, keep: float) -> list[str]:
        """The rows of one budget."""
        return [name for name, row in self.settings["rows"].items() if keep in row.get("keep", [keep])]

    def _row(self, name: str, keep: float) -> dict[str, Any] | None:
        """A row of the table; None if the budget cannot be had with its layers, or everything would enter."""
        row = self.settings["rows"][name]
        if row.get("enters", 0) * keep >= 1:
            return None
        strategies = self._strategies(row, keep, 1)
        if "cut" in row:
            tokens = self._affordable(row, keep)
            if tokens is None:
                return None
            strategies = self._strategies(row, keep, tokens)
        return {"row": name, "keep": keep, **self.asked.answered(strategies)}

    def _affordable(self, row: Mapping[str, Any], keep: float) -> int | None:
        """How many tokens the cut leaves so that the row costs the budget, as nearly as whole tokens do."""

        def costs(tokens: int) -> float:
            return self.asked.spent(self._strategies(row, keep, tokens))

        low, high = 0, self.asked.tokens
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if costs(middle) <= keep else (low, middle)
        if low == 0:
            return None
        return min((low, high), key=lambda tokens: abs(costs(tokens) - keep))

    # -- what it looks like ---------------------------------------------------------------------------------------

    def tables(self, results: Mapping[str, Any]) -> list[Table]:
        return [self._table(results, keep) for keep in self.settings["keep"]]

    def _table(self, results: Mapping[str, Any], keep: float) -> Table:
        rows = {row["row"]: row for row in results["rows"] if row["keep"] in (1, keep)}
        tasks, form = list(rows[WHOLE]["right"]), self.settings["form"]
        against = [name for name in dict.fromkeys((LEADER, form)) if name in rows]
        columns = ["", "tokens", "tokens x layers", *tasks, "mean", *(f"- {name}" for name in against)]
        table = Table(columns, title=f"{100 * keep:g} % of the tokens x layers")
        for name, row in rows.items():
            table.add(
                name,
                " → ".join(f"{count:.0f}" for count in dict.fromkeys(row["layers"])),
                f"{100 * row['spent']:.1f} %",
                *(f"{100 * mean(row['right'][task]):.1f}" for task in tasks),
                f"{100 * over_tasks(row['right']):.1f}",
                *("" if name == other else gain(row["right"], rows[other]["right"]) for other in against),
            )
        absent = [name for name in self._asked_at(keep) if name not in rows]
        table.caption = (
            f"{results['scenes']} validation scenes, a question of every task about each. Tokens: in the first layer "
            f"and behind every cut. Accuracy in %, positions {self.settings['positions']}; differences of the mean, in "
            "points, paired bootstrap, 95 %." + f" Not to be had at this budget: {'; '.join(absent)}." * bool(absent)
        )
        return table

    def figures(self, results: Mapping[str, Any]) -> dict[str, Figure]:
        from matplotlib.figure import Figure

        figure = Figure(figsize=(6, 3.6), layout="constrained")
        axis, rows = figure.subplots(), results["rows"]
        for name in self.settings["rows"]:
            line = sorted((row["spent"], 100 * over_tasks(row["right"])) for row in rows if row["row"] == name)
            wide = name in (LEADER, self.settings["form"])
            axis.plot([x for x, _ in line], [y for _, y in line], "o-", label=name, linewidth=2 if wide else 0.8)
        axis.axhline(100 * over_tasks(rows[0]["right"]), color="grey", linewidth=0.8, label=WHOLE)
        axis.set_xlabel("tokens x layers, of the unpruned model's")
        axis.set_ylabel("mean accuracy, %")
        axis.legend(fontsize=6)
        return {"cuts": figure}
