"""atp-efficiency: what ATP saves and costs at keep 0.6, and over alpha, keep ratio and the sign of the relevance.

Source: ATP, arXiv 2512.12701, which leaves alpha, K and positions open and labels its own numbers preliminary.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import product
from typing import TYPE_CHECKING, Any

from vtp_plugin.reporting.tables import Table
from vtp_plugin.studies.evaluated import Cells, Evaluated, by_id, points, rows, short, unpruned

if TYPE_CHECKING:
    from matplotlib.figure import Figure


LABELS = {
    ("atp", "original"): "ATP",
    ("atp", "compact"): "ATP, positions renumbered",
    ("random", "original"): "random",
    ("random", "compact"): "random, positions renumbered",
}


class AtpEfficiency(Evaluated):
    """Tokens, FLOPs, time and accuracy, then the grid that the paper leaves open."""

    name = "atp-efficiency"
    source = "ATP (arXiv 2512.12701): 256 -> 150 tokens (60 %), 0.6x FLOPs, about 1.5x faster, less than 1 % lost"

    def planned(self) -> Cells:
        paper, grid = self.settings["keep"], self.settings["grid"]
        cells = unpruned() | {
            named(paper, name, positions): (name, {"keep_ratio": paper, "positions": positions})
            for name, positions in LABELS
        }
        for keep, alpha, sign in product(grid["keep"], grid["alpha"], grid["relevance_sign"]):
            if alpha > 0 or sign == grid["relevance_sign"][0]:  # without the question there is no sign
                cells[cell_id(keep, alpha, sign)] = (
                    "atp",
                    {"keep_ratio": keep, "alpha": alpha, "relevance_sign": sign, "positions": grid["positions"]},
                )
        for keep in grid["keep"]:
            cells[f"random-{keep:g}"] = ("random", {"keep_ratio": keep, "positions": grid["positions"]})
        return cells

    def measure(self) -> dict[str, Any]:
        return {"cells": rows(self.evaluate(self.planned()))}

    def tables(self, results: Mapping[str, Any]) -> list[Table]:
        return [self._paper(results), *(self._grid(results, sign) for sign in self.settings["grid"]["relevance_sign"])]

    def _paper(self, results: Mapping[str, Any]) -> Table:
        """The paper's only row, with the control that it lacks."""
        found, paper = by_id(results["cells"]), self.settings["keep"]
        whole = found["none"]
        tasks = list(whole["accuracy"])
        table = Table(
            ["", "tokens", "FLOPs", "TTFT", *map(short, tasks), "mean", "difference"], title="ATP against full"
        )
        pruned = {label: named(paper, *of) for of, label in LABELS.items()}
        for label, id in {"full": "none", **pruned}.items():
            entry = found[id]
            table.add(
                label,
                f"{entry['tokens']['after']:.0f}",
                f"{entry['flops_ratio']:.2f}x",
                f"{ttft(entry) / ttft(whole):.2f}x",
                *(f"{100 * entry['accuracy'][task]:.1f}" for task in tasks),
                f"{100 * entry['mean']:.1f}",
                "" if id == "none" else points(entry["difference"]),
            )
        table.caption = (
            f"Keep {paper:g}. Accuracy in %, captions in % F1; differences to full in points, paired bootstrap, 95 %. "
            "TTFT: tower, selection and prefill, per sample."
        )
        return table

    def _grid(self, results: Mapping[str, Any], sign: int) -> Table:
        found, grid = by_id(results["cells"]), self.settings["grid"]
        title = f"Mean accuracy, relevance sign {sign:+d} ({'as printed' if sign > 0 else 'corrected'})"
        table = Table(["keep", *(f"alpha {alpha:g}" for alpha in grid["alpha"]), "random"], title=title)
        for keep in grid["keep"]:
            signs = [sign if alpha > 0 else grid["relevance_sign"][0] for alpha in grid["alpha"]]
            ids = [cell_id(keep, alpha, s) for alpha, s in zip(grid["alpha"], signs, strict=True)]
            table.add(f"{keep:g}", *(cell(found[id]) for id in [*ids, f"random-{keep:g}"]))
        table.caption = "In %; in brackets the difference to the unpruned model in points, paired bootstrap, 95 %."
        return table

    def figures(self, results: Mapping[str, Any]) -> dict[str, Figure]:
        from matplotlib.figure import Figure

        found, grid = by_id(results["cells"]), self.settings["grid"]
        figure = Figure(figsize=(8, 3.4), layout="constrained")
        for axis, sign in zip(figure.subplots(1, 2, sharey=True), grid["relevance_sign"], strict=True):
            for alpha in grid["alpha"]:
                ids = [cell_id(keep, alpha, sign if alpha > 0 else grid["relevance_sign"][0]) for keep in grid["keep"]]
                axis.plot(grid["keep"], [100 * found[id]["mean"] for id in ids], marker="o", label=f"alpha {alpha:g}")
            chance = [100 * found[f"random-{keep:g}"]["mean"] for keep in grid["keep"]]
            axis.plot(grid["keep"], chance, "k--", label="random")
            axis.axhline(100 * found["none"]["mean"], color="grey", linewidth=0.8, label="unpruned")
            axis.set_title(f"relevance sign {sign:+d}")
            axis.set_xlabel("keep ratio")
        figure.axes[0].set_ylabel("mean accuracy, %")
        figure.axes[0].legend(fontsize=7)
        return {"grid": figure}


def named(keep: float, name: str, positions: str) -> str:
    return f"{name}-{keep:g}-{positions}"


def cell_id(keep: float, alpha: float, sign: int) -> str:
    return f"atp-{keep:g}-alpha{alpha:g}-{'plus' if sign > 0 else 'minus'}"


def cell(entry: Mapping[str, Any]) -> str:
    low, high = (100 * entry["difference"][end] for end in ("low", "high"))
    return f"{100 * entry['mean']:.1f} [{low:+.1f}, {high:+.1f}]"


def ttft(entry: Mapping[str, Any]) -> float:
    """Seconds of a sample until its first token: what is timed outside the tower and the decoder comes on top."""
    return sum(entry["seconds"].get(part, 0.0) for part in ("tower", "selector", "prefill"))
