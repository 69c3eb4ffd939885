"""A run folder as a table: rows, seeds, paired differences, and the warning about controls."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path

import numpy as np
import pytest
import runfolder
from runfolder import TASK

from vtp_plugin.errors import PruningError
from vtp_plugin.reporting import comparison, rows, runs, verdicts

N = 40
TARGETS = ["yes", "no"] * (N // 2)


def answers(wrong: int, shift: int = 0) -> list[str]:
    """So many wrong answers, from question `shift` on."""
    turned = {(shift + number) % N for number in range(wrong)}
    return [("no" if t == "yes" else "yes") if n in turned else t for n, t in enumerate(TARGETS)]


CELLS = {
    "none": answers(2),
    "atp-0.25": answers(4),  # clearly better than random
    "l2-0.25": answers(16),  # not better
    "vprune": answers(30),  # fewer tokens than any control: no verdict
    "random-0.25-seed0": answers(12, 10),
    "random-0.25-seed1": answers(20, 10),
    "stride-0.5": answers(3),
}


@pytest.fixture
def run(tmp_path: Path) -> runs.Run:
    return runs.load(runfolder.write(tmp_path / "run", CELLS, TARGETS, kept={"vprune": 20}))


def values(name: str) -> np.ndarray:
    return np.array([float(a == t) for a, t in zip(CELLS[name], TARGETS, strict=True)])


def test_seeds_are_one_row(run: runs.Run) -> None:
    found = {row.id: row for row in rows.rows(run)}
    assert list(found) == ["none", "atp-0.25", "l2-0.25", "vprune", "random-0.25", "stride-0.5"]
    row = found["random-0.25"]
    assert row.label == "random-0.25 (2 seeds)"
    mean = (values("random-0.25-seed0") + values("random-0.25-seed1")) / 2
    assert list(row.values[TASK].values()) == pytest.approx(list(mean))
    paired = rows.difference(found["atp-0.25"], row)
    assert paired.value == pytest.approx((values("atp-0.25") - mean).mean())
    assert paired.low > 0


def test_the_table_says_what_was_measured(run: runs.Run) -> None:
    table = comparison.table(run)
    assert table.columns == [
        *("strategy", TASK, "mean", "difference", "over random", "lost/won", "p", "same"),
        *("tokens", "KV", "FLOPs", "prefill"),
    ]
    shown = {row[0]: row[1:] for row in table.rows}
    assert shown["unpruned"] == ("95.0", "95.0", "-", "-", "-", "-", "-", "144/144", "1.00x", "1.00x", "1.00x")
    accuracy, mean, difference, chance, turned, p, same, tokens, cache, flops, prefill = shown["l2-0.25"]
    assert (accuracy, mean, turned, same) == ("60.0", "60.0", "14/0", "65.0")
    assert difference.startswith("-35.0 [")
    assert chance.startswith("+0.0 [")
    assert p == "<0.001"  # 2 * 0.5 ** 14
    assert (tokens, cache, flops, prefill) == ("36/144", "0.46x", "0.33x", "1.00x")
    assert shown["random-0.25 (2 seeds)"][3:6] == ("-", "16/2", "-")


def test_who_does_not_beat_a_control_is_named(run: runs.Run) -> None:
    (said,) = verdicts.warnings(run)
    assert said.startswith("WARNING: not shown to be better than random at equal final tokens")
    gain = {row[0]: row[4] for row in comparison.table(run).rows}["l2-0.25"]
    assert said.endswith(f"n = {N} questions; p > 0.05 after Holm's correction): l2 at 0.25 ({gain}).")
    assert verdicts.findings(run) == [
        f"not shown to be better than random at equal final tokens: l2 at 0.25, {gain}, n = {N}"
    ]
    assert "atp" not in said
    assert "vprune" not in said
    assert said in comparison.table(run).caption


def test_the_mean_and_the_time_to_first_token(run: runs.Run) -> None:
    row = comparison.summary(run)["rows"]["atp-0.25"]
    assert row["mean_interval"]["low"] < row["mean"] == row["mean_interval"]["value"] < row["mean_interval"]["high"]
    assert row["ttft_ratio"] == pytest.approx(1.0)
    assert row["command"] == ["lmms-eval"]


def test_without_a_control_nothing_is_said_of_one(tmp_path: Path) -> None:
    cells = {"none": answers(0), "l2-0.25": answers(14)}
    table = comparison.table(runs.load(runfolder.write(tmp_path / "run", cells, TARGETS)))
    assert "over random" not in table.columns
    assert "andom" not in table.markdown()
    assert not table.findings
    assert {len(row) for row in table.rows} == {len(table.columns)}


def test_a_larger_budget_is_held_against_the_nearest_control(tmp_path: Path) -> None:
    cells = {"none": answers(0), "l2-0.75": answers(5), "random-0.5": answers(5), "random-0.25": answers(20)}
    (said,) = verdicts.warnings(runs.load(runfolder.write(tmp_path / "run", cells, TARGETS)))
    assert "correction): l2 at 0.75 (" in said


def test_a_far_smaller_control_says_nothing(tmp_path: Path) -> None:
    cells = {"none": answers(0), "vprune": answers(2), "random-0.25": answers(30)}
    run = runs.load(runfolder.write(tmp_path / "run", cells, TARGETS, kept={"vprune": 129}))
    shown = {row[0]: row[4] for row in comparison.table(run).rows}
    assert shown["vprune"] == "-"
    assert verdicts.warnings(run) == []


@pytest.fixture
def between_layers(tmp_path: Path) -> runs.Run:
    """fastv leaves 36 of 144 tokens, and its four layers see 90 on average."""
    cells = {"none": answers(0), "fastv-0.25": answers(4), "l2-0.25": answers(14)}
    cells |= {"random-0.25": answers(16), "random-0.625": answers(4, 20)}
    folder = runfolder.write(tmp_path / "run", cells, TARGETS)
    (log,) = (folder / "cells" / "fastv-0.25").glob("samples_*.jsonl")
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    for line in lines:
        line["pruning"]["prompt_tokens"]["mean_over_layers"] = 56 + 90
    log.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return runs.load(folder)


def test_what_is_spent_between_layers_has_its_own_table(between_layers: runs.Run) -> None:
    """At equal final tokens fastv beats random, at equal tokens x layers it does not."""
    found = {row.id: row for row in rows.rows(between_layers)}
    assert (found["fastv-0.25"].final, found["fastv-0.25"].spent) == (36, 90)
    assert (found["l2-0.25"].final, found["l2-0.25"].spent) == (36, 36)
    table = comparison.layered(between_layers)
    shown = {row[0]: row[1:] for row in table.rows}
    assert shown["fastv-0.25"][:3] == ("90/144", "36", "90.0")
    assert shown["fastv-0.25"][3].startswith("+0.0 [")
    assert shown["fastv-0.25"][3].endswith(", at 90)")
    assert shown["l2-0.25"][3].endswith(", at 36)")
    said = verdicts.findings(between_layers)
    assert [line.split(":")[0].rpartition("equal ")[2] for line in said if "fastv" in line] == ["tokens x layers"]
    assert [line.split(":")[0].rpartition("equal ")[2] for line in said if "l2" in line] == ["final tokens"]
    row = comparison.summary(between_layers)["rows"]["fastv-0.25"]
    assert row["tokens"]["mean_over_layers"] == 90
    assert row["over"]["random"]["p"] < 0.05 < row["over_at_equal_layers"]["random"]["p"]
    comparison.write(between_layers)
    assert "**At equal tokens x layers**" in (between_layers.folder / "table.md").read_text()


def test_where_no_control_spends_as_much_the_budget_to_add_is_said(between_layers: runs.Run) -> None:
    kept = [cell for cell in between_layers.cells if cell.id != "random-0.625"]
    alone = runs.Run(between_layers.folder, between_layers.settings, kept)
    (said,) = comparison.layered(alone).findings
    assert said.startswith("fastv-0.25 spends 90 of 144 tokens")
    assert said.endswith("add random at --keep 0.625")


def test_without_cuts_between_layers_there_is_one_table(run: runs.Run) -> None:
    assert comparison.layered(run) is None


def test_p_of_many_methods_is_adjusted(run: runs.Run) -> None:
    """Holm, over the four rows without seeds: the smallest p counts four times, and so on."""
    everything = comparison.summary(run)["rows"]
    assert everything["l2-0.25"]["mcnemar_p"] == 2 * 0.5**14
    assert everything["stride-0.5"]["mcnemar_p"] == 1
    shown = {row[0]: row[6] for row in comparison.table(run).rows}
    assert everything["atp-0.25"]["mcnemar_p"] == 0.5
    assert shown["atp-0.25"] == shown["stride-0.5"] == "1.000"


def test_positions_of_a_table_are_said(tmp_path: Path) -> None:
    record = {id: {"strategies": [{"name": "x", "positions": "original"}]} for id in ("l2-0.25", "atp-0.25")}
    same = runs.load(runfolder.write(tmp_path / "same", CELLS, TARGETS, record=record))
    assert "Positions of kept tokens: original, in all rows." in comparison.table(same).caption
    record["l2-0.25"] = {"strategies": [{"name": "x", "positions": "compact"}]}
    mixed = runs.load(runfolder.write(tmp_path / "mixed", CELLS, TARGETS, record=record))
    said = "WARNING: positions of kept tokens are not the same in all rows (original: atp-0.25; compact: l2-0.25)."
    assert said in comparison.table(mixed).caption


def test_one_method_against_every_other(run: runs.Run) -> None:
    table = verdicts.versus(run, "atp")
    shown = {row[0]: row[1:] for row in table.rows}
    assert table.columns == ["atp minus", "at 0.25", "at 0.5"]
    assert shown["l2"][0].startswith("+30.0 [")
    assert shown["random"][0].startswith("+30.0 [")  # both seeds: 12 and 20 wrong
    assert shown["stride"] == ("-", "-")  # no common budget
    with pytest.raises(PruningError, match="unknown method with a budget in this run 'vprune'"):
        verdicts.versus(run, "vprune")


def test_the_summary_has_every_number(run: runs.Run) -> None:
    found = comparison.summary(run)
    json.dumps(found, allow_nan=False)
    row = found["rows"]["atp-0.25"]
    task = row["tasks"][TASK]
    assert task["questions"] == N
    assert task["accuracy"]["value"] == pytest.approx(0.9)
    assert task["accuracy"]["low"] < 0.9 < task["accuracy"]["high"]
    assert (task["lost"], task["won"], task["mcnemar_p"]) == (2, 0, 0.5)
    assert task["agreement"] == pytest.approx(0.95)
    assert task["yes_no"]["yes_ratio"] == pytest.approx(0.5)
    assert task["yes_no"]["precision"] == pytest.approx(18 / 20)
    assert row["difference"]["value"] == pytest.approx(-0.05)
    assert row["tokens"] == {"before": 144.0, "after": 36.0, "mean_over_layers": 36.0}
    assert found["rows"]["random-0.25"]["seeds"] == [0, 1]
    assert found["rows"]["random-0.25"]["mcnemar_p"] is None


def test_what_is_missing_is_said(run: runs.Run) -> None:
    path = run.folder / "cells" / "vprune" / "cell.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"status": "failed", "error": "it broke"}))
    (run.folder / "cells" / "l2-0.25" / "cell.json").unlink()
    caption = comparison.table(runs.load(run.folder)).caption
    assert "Failed: vprune." in caption
    assert "Not run yet: l2-0.25." in caption


def test_without_the_unpruned_run_there_is_no_comparison(tmp_path: Path) -> None:
    folder = runfolder.write(tmp_path / "run", {"atp-0.25": answers(1)}, TARGETS)
    with pytest.raises(PruningError, match="needs the unpruned run"):
        comparison.table(runs.load(folder))


def test_a_failed_unpruned_run_is_the_reason_that_is_given(tmp_path: Path) -> None:
    """Not only that it is missing: the cell's own error, and what to do."""
    folder = runfolder.write(tmp_path / "run", {"none": answers(1), "atp-0.25": answers(1)}, TARGETS)
    path = folder / "cells" / "none" / "cell.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"status": "failed", "error": "filelock is too new"}))
    with pytest.raises(PruningError, match=r"the cell 'none' failed: filelock is too new\. Mend that and run .* again"):
        comparison.table(runs.load(folder))


def test_the_outcome_is_written_four_times(run: runs.Run) -> None:
    table = comparison.write(run, "a title")
    assert (run.folder / "table.md").read_text().startswith("**a title**")
    assert list(csv.reader(io.StringIO((run.folder / "table.csv").read_text())))[1:] == [list(r) for r in table.rows]
    tex = (run.folder / "table.tex").read_text()
    assert r"\begin{tabular}{lrrrrllrlrrr}" in tex
    assert r"vtp\_scenes\_presence" in tex
    assert "$<$0.001" in tex
    assert tex.count(r"\\") == len(table.rows) + 1
    assert json.loads((run.folder / "summary.json").read_text()) == comparison.summary(run)


def test_names_of_tasks_lose_what_they_share() -> None:
    assert comparison.short(["vtp_scenes_count", "vtp_scenes_digit"]) == ["count", "digit"]
    assert comparison.short(["pope", "gqa"]) == ["pope", "gqa"]
    assert comparison.short(["mmbench_en", "mmbench_en_dev"]) == ["en", "en_dev"]
