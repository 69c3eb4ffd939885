"""vprune-design: what the group, the two thresholds and the choice of the patch are worth.

Source: V-PRUNE, Appl. Sci. 2025, 15(17), 9463, sections 4.2.5 and 5.3: groups of 2x2, 3x3 and 4x4, chi-square
thresholds 5, 10 and 20, cosine thresholds and their interaction. Two parts: `answers` asks a model, with `random` at
equal removal, which shows what the choice of the patches is worth; `photographs` asks none and holds readings of the
article against the shares that it prints (`studies.readings`).
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import product
from typing import TYPE_CHECKING, Any

from vtp_plugin.config import build
from vtp_plugin.errors import PruningError
from vtp_plugin.reporting.tables import Table
from vtp_plugin.studies import readings
from vtp_plugin.studies.evaluated import Cells, Evaluated, by_id, correct, interval, points, rows, unpruned
from vtp_plugin.studies.vprune_main import removed_share

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from vtp_plugin.reporting.runs import Run


ANSWERS, PHOTOGRAPHS = PARTS = ("answers", "photographs")


class VPruneDesign(Evaluated):
    """Accuracy and removed share over V-PRUNE's choices; what its readings remove of photographs."""

    name = "vprune-design"
    source = "V-PRUNE (Appl. Sci. 2025, 15(17), 9463), sections 4.2.5 and 5.3; removed share 13-37 %"

    def planned(self) -> Cells:
        said = self.settings
        if ANSWERS not in said["parts"]:
            return {}
        base = {"group": said["group"][0], "cosine_threshold": said["cosine_threshold"][0]}
        cells = {
            design_id(base["group"], chi2, cosine): design(base["group"], chi2, cosine)
            for chi2, cosine in product(said["chi2_threshold"], said["cosine_threshold"])
        }
        for group in said["group"]:
            chi2, cosine = said["chi2_threshold"][0], base["cosine_threshold"]
            cells[design_id(group, chi2, cosine)] = design(group, chi2, cosine)
        return unpruned() | cells

    def check(self) -> None:
        from vtp_plugin.hosts.transformers.preparing import prepared

        said = self.settings
        if not said["parts"] or set(said["parts"]) - set(PARTS):
            raise PruningError(f"{self.name}: parts must be some of {', '.join(PARTS)}, got {said['parts']}")
        super().check()
        if PHOTOGRAPHS in said["parts"]:
            if taken := {readings.OURS, readings.CONTROL} & set(said["readings"]):
                raise PruningError(f"{self.name}: a reading cannot be called '{taken.pop()}'")
            for fields, chi2 in product(self._readings().values(), said["chi2_threshold"]):
                build(LEADER, {**fields, **readings.at(chi2)})
            for name in said["processors"]:
                readings.unpad(prepared(name))
            self.pictures = readings.photographs(said["pictures"], said["proportions"], said["most"])

    def measure(self) -> dict[str, Any]:
        work = {ANSWERS: self._answers, PHOTOGRAPHS: self._photographs}
        found = [work[part]() for part in PARTS if part in self.settings["parts"]]
        return {key: value for each in found for key, value in each.items()}

    # -- asking a model -------------------------------------------------------------------------------------------

    def _answers(self) -> dict[str, Any]:
        run = self.evaluate(self.planned(), "designs")
        removed = {cell.id: self._removed(run, cell.id) for cell in run if cell.pruning != "none"}
        controls = unpruned() | {
            f"random-{id}": ("random", {"at": "vit", "keep_ratio": round(1 - share, 4)})
            for id, share in removed.items()
        }
        at_random = self.evaluate(controls, "random")
        return {
            "cells": rows(run),
            "removed": removed,
            "removed_by_task": {id: self._removed_by_task(run, id) for id in removed},
            "random": rows(at_random),
            "over_random": {id: self._over_random(run, at_random, id) for id in removed},
        }

    @staticmethod
    def _removed(run: Run, id: str) -> float:
        return removed_share([answer for task in run.tasks for answer in run[id].answers(task).values()])

    @staticmethod
    def _removed_by_task(run: Run, id: str) -> dict[str, float]:
        return {task: removed_share(run[id].answers(task).values()) for task in run.tasks}

    @staticmethod
    def _over_random(run: Run, at_random: Run, id: str) -> dict[str, float]:
        control = at_random[f"random-{id}"]
        return interval([correct(run[id], task) - correct(control, task) for task in run.tasks])

    # -- asking none ----------------------------------------------------------------------------------------------

    def _readings(self) -> dict[str, dict[str, Any]]:
        return {readings.OURS: {}} | self.settings["readings"]

    def _photographs(self) -> dict[str, Any]:
        """Every reading as the first processor prepares the pictures, the defaults as the others do."""
        said = self.settings
        first, *others = said["processors"]
        asked = {first: self._readings()} | {name: {readings.OURS: {}} for name in others}
        found = readings.measure(self.pictures, asked, said["chi2_threshold"], self.once)
        fitted = self.once("calibration", lambda: readings.calibrations(self.pictures, first, self._photographic()))
        return {"photographs": found | {"photographic": self._photographic()}, "calibration": fitted}

    def _photographic(self) -> dict[str, dict[str, float]]:
        """The article's data sets whose pictures are photographs."""
        return {data: self.settings["targets"][data] for data in self.settings["photographic"]}

    # -- what it looks like ---------------------------------------------------------------------------------------

    def tables(self, results: Mapping[str, Any]) -> list[Table]:
        found = [self._designs(results)] if "cells" in results else []
        if "photographs" in results:
            found += readings.tables(results["photographs"], results["photographs"]["photographic"])
        return [*found, self._calibrated(results)] if "calibration" in results else found

    def _designs(self, results: Mapping[str, Any]) -> Table:
        columns = ["group", "chi2", "cosine", "removed", "accuracy", "- unpruned", "random", "- random"]
        table = Table(columns, title="Designs")
        chance = by_id(results["random"])
        for entry in results["cells"]:
            id, fields = entry["id"], entry["pruning_args"]
            if id == "none":
                table.add("-", "-", "-", "0.0", f"{100 * entry['mean']:.1f}", "", "", "")
                continue
            table.add(
                f"{fields['group']}x{fields['group']}",
                f"{fields['chi2_threshold']:g}",
                f"{fields['cosine_threshold']:g}",
                f"{100 * results['removed'][id]:.1f}",
                f"{100 * entry['mean']:.1f}",
                points(entry["difference"]),
                f"{100 * chance[f'random-{id}']['mean']:.1f}",
                points(results["over_random"][id]),
            )
        table.caption = (
            "Removed: share of the visual tokens in %. Accuracy: mean over tasks in %. Random: as many patches, chosen "
            "at random before the first block. Differences in points, paired bootstrap, 95 %."
        )
        return table

    def _calibrated(self, results: Mapping[str, Any]) -> Table:
        table = Table(
            ["article's data", "chi2", "article: removed", "cosine threshold", "here: removed"], title="Calibration"
        )
        for entry in results["calibration"]:
            for chi2, target in entry["targets"].items():
                here = f"{100 * entry['removed'][chi2]:.1f}" if "removed" in entry else "-"
                table.add(
                    entry["data"], chi2, f"{100 * target:.1f}", entry.get("cosine_threshold", "not reachable"), here
                )
        remarks = [entry["remark"] for entry in results["calibration"] if entry.get("remark")]
        table.caption = (
            "In %. The cosine threshold is fitted at the first chi-square threshold of each data set, on our pictures."
            f"{''.join(f' {each[:1].upper()}{each[1:]}.' for each in remarks)}"
        )
        return table

    def figures(self, results: Mapping[str, Any]) -> dict[str, Figure]:
        found = {"designs": self._designs_figure(results)} if "cells" in results else {}
        if "photographs" in results:
            shares = results["photographs"]
            found[PHOTOGRAPHS] = readings.figure(shares, shares["photographic"])
        return found

    @staticmethod
    def _designs_figure(results: Mapping[str, Any]) -> Figure:
        from matplotlib.figure import Figure

        figure = Figure(figsize=(5.5, 3.6), layout="constrained")
        axis, removed = figure.subplots(), results["removed"]
        for name, found in {"vprune": by_id(results["cells"]), "random": by_id(results["random"])}.items():
            ids = {id: id if name == "vprune" else f"random-{id}" for id in removed}
            axis.plot([100 * removed[id] for id in ids], [100 * found[ids[id]]["mean"] for id in ids], "o", label=name)
        axis.axhline(100 * by_id(results["cells"])["none"]["mean"], color="grey", linewidth=0.8, label="unpruned")
        axis.set_xlabel("visual tokens removed, %")
        axis.set_ylabel("mean accuracy, %")
        axis.legend()
        return figure


LEADER = "vprune"


def design(group: int, chi2: float, cosine: float) -> tuple[str, dict[str, Any]]:
    return LEADER, {"group": group, "chi2_threshold": chi2, "cosine_threshold": cosine}


def design_id(group: int, chi2: float, cosine: float) -> str:
    return f"{LEADER}-group{group}-chi2_{chi2:g}-cosine_{cosine:g}"
