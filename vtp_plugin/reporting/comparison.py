"""Results files of several configurations of one model, side by side."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from vtp_plugin.errors import PruningError
from vtp_plugin.reporting.tables import Table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

BASELINE = "none"
CONTROL = "random"
SCENES = 3


def accuracies(results: Mapping[str, Any]) -> dict[str, float]:
    """Exact-match accuracy of every task of a results file; groups are left out."""
    tasks = {name: scores for name, scores in results["results"].items() if name in results["configs"]}
    return {name: scores["exact_match,none"] for name, scores in tasks.items() if "exact_match,none" in scores}


def table(runs: Mapping[str, Mapping[str, Any]], title: str = "") -> Table:
    """Accuracy per task, tokens kept, FLOPs and prefill time relative to the unpruned model."""
    if BASELINE not in runs:
        raise PruningError("a comparison needs the unpruned run (none)")
    tasks = sorted(accuracies(runs[BASELINE]))
    short = [task.removeprefix("vtp_scenes_") for task in tasks]
    result = Table(["strategy", *short, "mean", "tokens", "FLOPs", "prefill"], title=title)
    baseline = runs[BASELINE]["pruning"]
    for spec, results in runs.items():
        scores, record = accuracies(results), results["pruning"]
        mean = sum(scores[task] for task in tasks) / len(tasks)
        tokens = record["visual_tokens"]
        result.add(
            "unpruned" if spec == BASELINE else spec,
            *(f"{100 * scores[task]:.1f}" for task in tasks),
            f"{100 * mean:.1f}",
            f"{tokens['mean_after']:.0f}/{tokens['mean_before']:.0f}",
            f"{record['prefill_flops']['ratio']:.2f}x",
            f"{_prefill(record) / _prefill(baseline):.2f}x",
        )
    result.caption = caption(runs)
    return result


def summary(runs: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """What the table is made of: per run the accuracies and the pruning record."""
    return {spec: {"accuracy": accuracies(results), "pruning": results["pruning"]} for spec, results in runs.items()}


def caption(runs: Mapping[str, Mapping[str, Any]]) -> str:
    """What the columns are, and which methods do not beat chance."""
    said = [
        "Accuracy in %. Tokens: visual tokens per image, kept (by the last layer) / all.",
        "FLOPs: whole prefill, vision tower included, relative to the same prompts unpruned.",
        "Prefill: time in the decoder layers until the first token, relative to the unpruned run.",
    ]
    if CONTROL in runs:
        behind = [spec for spec in runs if spec not in (BASELINE, CONTROL) and _behind(runs, spec)]
        if behind:
            said.append(f"Not better than random at no fewer tokens: {', '.join(behind)}.")
    return " ".join(said)


def _behind(runs: Mapping[str, Mapping[str, Any]], spec: str) -> bool:
    """Whether a strategy keeps at least as many tokens as random and is not more accurate on average."""
    kept = {name: runs[name]["pruning"]["visual_tokens"]["mean_after"] for name in (spec, CONTROL)}
    mean = {name: sum(accuracies(runs[name]).values()) for name in (spec, CONTROL)}
    return kept[spec] >= kept[CONTROL] and mean[spec] <= mean[CONTROL]


def _prefill(record: Mapping[str, Any]) -> float:
    """Seconds per sample."""
    return record["seconds"]["prefill"] / record["samples"]["total"]


def kept_picture(runs: Mapping[str, Mapping[str, Any]]) -> Figure:
    """What every strategy keeps of the first test scenes."""
    from vtp_plugin import config
    from vtp_plugin.reporting.figures import kept_figure
    from vtp_plugin.reporting.views import view
    from vtp_plugin.tiny.examples import examples
    from vtp_plugin.tiny.inference import load

    model, processor = load()
    return kept_figure(
        [
            [
                view(model, processor, picture, question, config.resolve(spec, fields), spec)
                for spec, fields in {BASELINE: {}, **runs}.items()
            ]
            for picture, question in examples(SCENES)
        ]
    )
