"""atp-robustness: does pruning help when pictures are corrupted or questions reworded, as ATP claims?

Source: ATP, arXiv 2512.12701. Every question is answered by the whole and by the pruned model, clean and changed:
what pruning adds is (pruned changed - pruned clean) - (whole changed - whole clean), paired by question. A model that
has less to lose loses less, so it helps only where the pruned model also answers the changed questions better.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from vtp_plugin.reporting.runs import Run
from vtp_plugin.reporting.tables import Table
from vtp_plugin.studies.evaluated import Cells, Evaluated, correct, interval, mean, points, rows

if TYPE_CHECKING:
    from matplotlib.figure import Figure

CLEAN = "clean"
WHOLE = "none"


class AtpRobustness(Evaluated):
    """Noise, blur, occlusion, paraphrases and distracting phrases."""

    name = "atp-robustness"
    source = "ATP (arXiv 2512.12701): pruning helps under corrupted pictures and changed questions"

    def planned(self) -> Cells:
        return {
            cell_id(method, condition): (spec, fields | ({} if condition == CLEAN else {"perturb": condition}))
            for method, (spec, fields) in self.methods().items()
            for condition in self.conditions()
        }

    def conditions(self) -> list[str]:
        return [CLEAN, *self.settings["perturbations"]]

    def methods(self) -> dict[str, tuple[str, dict[str, Any]]]:
        budget = {"keep_ratio": self.settings["keep"], "positions": self.settings["positions"]}
        return {WHOLE: (WHOLE, {}), **{name: (name, budget) for name in self.settings["pruning"]}}

    def check(self) -> None:
        from vtp_plugin.hosts.lmms_eval.perturb import Perturbation

        super().check()
        for condition in self.settings["perturbations"]:
            Perturbation.parse(condition)

    def measure(self) -> dict[str, Any]:
        run = self.evaluate(self.planned())
        effects = [
            {"perturbation": condition, "method": method, **self._effect(run, method, condition)}
            for condition in self.settings["perturbations"]
            for method in self.settings["pruning"]
        ]
        return {"cells": rows(run), "effects": effects}

    def _effect(self, run: Run, method: str, condition: str) -> dict[str, Any]:
        pruned, whole = ((run[cell_id(m, CLEAN)], run[cell_id(m, condition)]) for m in (method, WHOLE))
        drops = [
            [correct(changed, task) - correct(clean, task) for task in run.tasks] for clean, changed in (pruned, whole)
        ]
        added = [p - w for p, w in zip(*drops, strict=True)]
        accuracy = {"pruned": mean(pruned[1].accuracies), "whole": mean(whole[1].accuracies)}
        drop = {"pruned": interval(drops[0]), "whole": interval(drops[1])}
        better = interval([correct(pruned[1], task) - correct(whole[1], task) for task in run.tasks])
        return {"accuracy": accuracy, "better": better, "drop": drop, "added_by_pruning": interval(added)}

    def tables(self, results: Mapping[str, Any]) -> list[Table]:
        return [self._table(results, method) for method in self.settings["pruning"]]

    def _table(self, results: Mapping[str, Any], method: str) -> Table:
        columns = ["perturbation", "full", method, f"{method} - full", "full: drop", f"{method}: drop"]
        columns += ["added by pruning", "verdict"]
        table = Table(columns, title=f"{method} at keep {self.settings['keep']:g}")
        for effect in (e for e in results["effects"] if e["method"] == method):
            table.add(
                effect["perturbation"],
                *(f"{100 * effect['accuracy'][side]:.1f}" for side in ("whole", "pruned")),
                points(effect["better"]),
                *(f"{100 * effect['drop'][side]['value']:+.1f}" for side in ("whole", "pruned")),
                points(effect["added_by_pruning"]),
                verdict(effect["added_by_pruning"], effect["better"]),
            )
        table.caption = (
            "Mean accuracy over tasks in %, drops against the clean questions in points. Added by pruning: how much "
            "less (+) or more (-) the pruned model loses. Paired bootstrap, 95 %. Pruning helps where the pruned model "
            "loses less and is better on the changed questions."
        )
        return table

    def figures(self, results: Mapping[str, Any]) -> dict[str, Figure]:
        from matplotlib.figure import Figure

        figure = Figure(figsize=(7.5, 3.4), layout="constrained")
        axis = figure.subplots()
        for number, method in enumerate(self.settings["pruning"]):
            effects = [e for e in results["effects"] if e["method"] == method]
            added = [e["added_by_pruning"] for e in effects]
            errors = [[100 * (a["value"] - a["low"]) for a in added], [100 * (a["high"] - a["value"]) for a in added]]
            at = [place + 0.2 * number for place in range(len(effects))]
            axis.errorbar(at, [100 * a["value"] for a in added], errors, fmt="o", capsize=2, label=method)
        axis.axhline(0, color="grey", linewidth=0.8)
        axis.set_xticks(range(len(effects)), [e["perturbation"] for e in effects], rotation=40, ha="right")
        axis.set_ylabel("added by pruning, points")
        axis.legend()
        return {"added": figure}


def cell_id(method: str, condition: str) -> str:
    """`none` alone is the clean unpruned model, the baseline of every comparison."""
    return method if condition == CLEAN else f"{method}-{condition.replace(':', '')}"


def verdict(added: Mapping[str, float], better: Mapping[str, float]) -> str:
    """What the intervals allow to say."""
    if added["low"] > 0:
        return "pruning helps" if better["low"] > 0 else "less to lose"
    return "pruning hurts" if added["high"] < 0 else "no difference shown"
