"""The rows of a run side by side: accuracy with its interval, the difference from the unpruned model, what it saves."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from vtp_plugin import files
from vtp_plugin.reporting import statistics
from vtp_plugin.reporting.controls import CONTROLS, SPENT, Controls, Held
from vtp_plugin.reporting.rows import Row, difference, rows
from vtp_plugin.reporting.runs import Run, Spec
from vtp_plugin.reporting.tables import Table
from vtp_plugin.reporting.verdicts import findings, left_out, points, warnings

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from vtp_plugin.reporting.views import View

SCHEMA = 1
SCENES = 3

# -- everything, for a program ----------------------------------------------------------------------------------------


def summary(run: Run, controls: Controls | None = None) -> dict[str, Any]:
    """All statistics of every row, per task and over all tasks, with the first cell's record."""
    controls = controls or Controls(rows(run))
    everything = controls.everything
    return {
        "schema": SCHEMA,
        "model": run.settings.get("model"),
        "model_args": run.settings.get("model_args"),
        "limit": run.settings.get("limit"),
        "rows": {row.id: _summarised(row, everything[0], controls) for row in everything},
        "warnings": warnings(run, controls),
    }


def _summarised(row: Row, unpruned: Row, controls: Controls) -> dict[str, Any]:
    cell, (before, after) = row.cells[0], row.tokens
    return {
        "label": row.label,
        "pruning": cell.pruning,
        "pruning_args": {key: value for key, value in cell.pruning_args.items() if key != "seed"},
        "keep": cell.keep,
        "seeds": [cell.seed for cell in row.cells if cell.seed is not None],
        "positions": positions(row),
        "tokens": {"before": before, "after": after, "mean_over_layers": row.spent},
        "kv_ratio": row.cache,
        "flops_ratio": row.flops,
        "prefill_ratio": _ratio(row.prefill, unpruned.prefill),
        "ttft_ratio": _ratio(row.first_token, unpruned.first_token),
        "mean": row.mean,
        "mean_interval": asdict(statistics.difference([list(values.values()) for values in row.values.values()])),
        "difference": asdict(difference(row, unpruned)),
        "over": controls.of(row),
        "over_at_equal_layers": controls.of(row, SPENT),
        **_changes(row, unpruned, row.tasks),
        "tasks": {task: _task(row, unpruned, task) for task in row.tasks},
        "command": list(cell.command),
        "record": cell.record,
    }


def _task(row: Row, unpruned: Row, task: str) -> dict[str, Any]:
    targets = row.targets(task)
    asked = statistics.is_yes_no(targets)
    said = [statistics.yes_no(row.answers(cell, task), targets) for cell in row.cells if asked]
    return {
        "questions": len(targets),
        "accuracy": asdict(statistics.accuracy(list(row.values[task].values()))),
        "difference": asdict(difference(row, unpruned, [task])),
        **_changes(row, unpruned, [task]),
        **({"yes_no": _mean_of([asdict(one) for one in said])} if asked else {}),
    }


def _changes(row: Row, unpruned: Row, tasks: Sequence[str]) -> dict[str, Any]:
    """Flips and agreement against the unpruned answers over some tasks; several seeds: means, and no test."""
    base = unpruned.cells[0]
    found = []
    for cell in row.cells:
        pairs = [(base.answers(task)[n], answer) for task in tasks for n, answer in cell.answers(task).items()]
        turned = statistics.flips([a.correct for a, _ in pairs], [b.correct for _, b in pairs])
        same = statistics.agreement([a.answer for a, _ in pairs], [b.answer for _, b in pairs])
        found.append({"lost": turned.lost, "won": turned.won, "agreement": same, "mcnemar_p": turned.p})
    return found[0] if len(found) == 1 else {**_mean_of(found), "mcnemar_p": None}


def _mean_of(entries: Sequence[Mapping[str, float]]) -> dict[str, float]:
    return {key: float(np.mean([entry[key] for entry in entries])) for key in entries[0]}


def _ratio(part: float | None, whole: float | None) -> float | None:
    return part / whole if part is not None and whole else None


# -- everything, for a reader -----------------------------------------------------------------------------------------


def table(run: Run, title: str = "", notes: Sequence[str] = (), controls: Controls | None = None) -> Table:
    """Accuracy per task, difference from the unpruned model, flips, tokens, FLOPs and prefill time.

    `notes`: further sentences for the caption and among the findings.
    """
    controls = controls or Controls(rows(run))
    everything = controls.everything
    names, chance = short(run.tasks), controls.held() if _controlled(run) else None
    changes = ["difference", *(["over random"] if chance is not None else []), "lost/won", "p", "same"]
    result = Table(["strategy", *names, "mean", *changes, "tokens", "KV", "FLOPs", "prefill"], title=title)
    sure = _mcnemar(everything)
    for row in everything:
        changed = _compared(row, everything[0], chance, sure)
        result.add(row.label, *_accuracies(row), *changed, *_costs(row, everything[0]))
    caption = [said for said in CAPTION if chance is not None or said != OVER_RANDOM]
    result.caption = " ".join([*caption, *_numbered(everything), *left_out(run), *notes, *warnings(run, controls)])
    result.findings = [*left_out(run), *notes, *findings(run, controls)]
    return result


def layered(run: Run, controls: Controls | None = None) -> Table | None:
    """The same methods at equal tokens x layers; None where no control or no method is between decoder layers."""
    controls = controls or Controls(rows(run))
    everything = controls.everything
    if not _controlled(run) or all(abs(row.spent - row.final) < 0.5 for row in everything):
        return None
    there = [control for control in CONTROLS if controls.held(control, SPENT)]
    columns = ["strategy", "tokens x layers", "final tokens", "mean", *(f"over {control}" for control in there)]
    result = Table(columns, title="At equal tokens x layers", caption=LAYERED)
    for row in everything:
        held = [controls.held(control, SPENT).get(row.id) for control in there]
        against = [
            "-" if each is None else f"{points(each.gain)} (p {p_value(each.p)}, {_spends(each)})" for each in held
        ]
        costs = f"{row.spent:.0f}/{row.tokens[0]:.0f}", f"{row.final:.0f}"
        result.add(row.label, *costs, f"{100 * row.mean:.1f}", *against)
    result.findings = [
        f"{row.id} spends {row.spent:.0f} of {row.tokens[0]:.0f} tokens in its mean layer, and no random run spends as "
        f"much: add random at --keep {row.spent / row.tokens[0]:.3g}"
        for row in controls.unmatched()
    ]
    return result


LAYERED = (
    "Tokens x layers: visual tokens per image, averaged over the decoder layers, of all; final: in the last layer. "
    "Over a control: the difference of the means, in points, from its run with as many tokens x layers (named in "
    "brackets) or the next fewer, down to half, with the 95 % interval; p as in the first table."
)


def _spends(held: Held) -> str:
    return f"at {held.control.spent:.0f}"


def _controlled(run: Run) -> bool:
    """Whether there is a random control to hold methods against."""
    return any(cell.pruning == CONTROLS[0] for cell in run)


OVER_RANDOM = (
    "Over random: of the mean from random (all seeds) with as many tokens in the last layer or the next fewer, down to "
    "half, likewise."
)
CAPTION = (
    "Accuracy in %; mean: over the tasks.",
    "Difference: of the mean from the unpruned model, in points, with its 95 % paired bootstrap interval.",
    OVER_RANDOM,
    "Lost/won: answers that turned from right to wrong / from wrong to right; p: McNemar's exact test of these, "
    "adjusted for all rows of the table (Holm);",
    "same: answers equal to the unpruned ones, in %.",
    "Tokens: visual tokens per image, kept (by the last layer) / all.",
    "KV: bytes of the KV cache, so tokens averaged over the layers, text included, relative to the unpruned run.",
    "FLOPs: whole prefill, vision tower included, relative to the same prompts unpruned.",
    "Prefill: time in the decoder layers until the first token, relative to the unpruned run.",
)


def _accuracies(row: Row) -> list[str]:
    means = [np.mean(list(values.values())) for values in row.values.values()]
    return [f"{100 * mean:.1f}" for mean in (*means, np.mean(means))]


def _mcnemar(everything: Sequence[Row]) -> dict[str, float]:
    """Holm's adjusted p of every row that has one."""
    made = {row.id: _changes(row, everything[0], row.tasks)["mcnemar_p"] for row in everything[1:]}
    tested = {id: p for id, p in made.items() if p is not None}
    return dict(zip(tested, statistics.holm(list(tested.values())), strict=True))


def _compared(row: Row, unpruned: Row, chance: Mapping[str, Held] | None, sure: Mapping[str, float]) -> list[str]:
    if row.id == unpruned.id:
        return ["-"] * (4 + (chance is not None))
    changes = _changes(row, unpruned, row.tasks)
    return [
        points(difference(row, unpruned)),
        *([] if chance is None else [points(chance[row.id].gain) if row.id in chance else "-"]),
        f"{changes['lost']:.0f}/{changes['won']:.0f}",
        p_value(sure.get(row.id)),
        f"{100 * changes['agreement']:.1f}",
    ]


def p_value(p: float | None) -> str:
    """As a table says it."""
    return "-" if p is None else "<0.001" if p < 0.001 else f"{p:.3f}"


def _costs(row: Row, unpruned: Row) -> list[str]:
    before, after = row.tokens
    prefill = _ratio(row.prefill, unpruned.prefill)
    times = ["-" if ratio is None else f"{ratio:.2f}x" for ratio in (row.cache, row.flops, prefill)]
    return [f"{after:.0f}/{before:.0f}", *times]


def short(tasks: Sequence[str]) -> list[str]:
    """Names of tasks without what all of them begin with: vtp_scenes_count becomes count."""
    first = tasks[0].split("_") if len(tasks) > 1 else []
    while first and not all(task.startswith("_".join(first) + "_") for task in tasks):
        first.pop()
    return [task.removeprefix("_".join([*first, ""]) if first else "") for task in tasks]


def positions(row: Row) -> str | None:
    """original or compact, as the record says of all of the row's strategies; None where there is nothing to choose."""
    found = {each.get("positions") for each in row.cells[0].record.get("strategies", ())} - {None}
    return " and ".join(sorted(found)) or None


def _numbered(everything: Sequence[Row]) -> list[str]:
    """A sentence on the positions of kept tokens, which have to be one policy for a fair table."""
    named: dict[str, list[str]] = {}
    for row in everything:
        if (policy := positions(row)) is not None:
            named.setdefault(policy, []).append(row.id)
    if len(named) < 2:
        return [f"Positions of kept tokens: {policy}, in all rows." for policy in named]
    said = "; ".join(f"{policy}: {', '.join(ids)}" for policy, ids in named.items())
    return [f"WARNING: positions of kept tokens are not the same in all rows ({said})."]


FILES = ("table.md", "table.csv", "table.tex", "summary.json")


def check(folder: Path) -> None:
    """Refuse a run folder whose results cannot be written, before they are made."""
    for name in FILES if folder.is_dir() else ():
        files.check_output(folder / name)


def write(run: Run, title: str = "", notes: Sequence[str] = ()) -> Table:
    """table.md (with that of equal tokens x layers), table.csv, table.tex and summary.json in the run folder."""
    controls = Controls(rows(run))  # compared once for all of them
    made, second = table(run, title, notes, controls), layered(run, controls)
    pages = "\n\n".join(each.markdown() for each in (made, second) if each is not None)
    texts = (pages + "\n", made.csv(), made.latex(), json.dumps(summary(run, controls), indent=1) + "\n")
    for name, text in zip(FILES, texts, strict=True):
        files.write(run.folder / name, text)
    return made


def kept_picture(specs: Sequence[Spec]) -> Figure:
    """What every configuration keeps of the first test scenes, and whether the answers are right."""
    from vtp_plugin import config
    from vtp_plugin.reporting.figures import kept_figure
    from vtp_plugin.reporting.views import view
    from vtp_plugin.tiny.examples import examples
    from vtp_plugin.tiny.inference import load

    model, processor = load()

    def seen(spec: Spec, picture: Any, question: str, target: str) -> View:
        chosen = config.resolve(spec.pruning, spec.pruning_args)
        return view(model, processor, picture, question, chosen, spec.pruning, target=target)

    return kept_figure([[seen(spec, *scene) for spec in specs] for scene in examples(SCENES)])
