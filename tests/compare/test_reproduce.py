"""Papers' tables as data, and what a run says of them, on a stand-in for a table and the embedded model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import runfolder
import yaml
from commands import vtp

from vtp_plugin.cli.reproduce import command as reproduce_command
from vtp_plugin.compare import beside, published, reproduce, sweep
from vtp_plugin.errors import PruningError
from vtp_plugin.reporting import runs

N = 100
TARGETS = ["yes"] * (N // 2) + ["no"] * (N // 2)


def wrong(number: int) -> list[str]:
    """So many answers of no that should be yes."""
    return ["no" if n < number else target for n, target in enumerate(TARGETS)]


def standin(path: Path, task: str = runfolder.TASK, **more: Any) -> Path:
    """A small table of this form: unpruned 90 %, l2 at 36 tokens 80 %."""
    rows = [
        {"source": "paper", "method": "l2", "tokens": 36, "numbers": {"presence": 80.0}},
        {"source": "paper", "method": "atp", "tokens": 36, "numbers": {"presence": 90.0}},
        {"source": "other", "method": "l2", "tokens": 36, "numbers": {"presence": 40.0}},
        {"source": "paper", "method": "pyramiddrop", "tokens": 36, "numbers": {"presence": 70.0}},
    ]
    tables = {
        "title": "a stand-in",
        "tokens": 144,
        "host": {"model": "llava", "model_args": "pretrained=vtp-tiny"},
        "tasks": {"presence": {"task": task, "metric": "exact_match", "note": "a small task"}},
        "sources": {
            "paper": {"title": "A paper", "table": "Table 1", "unpruned": {"presence": 90.0}},
            "other": {"title": "Another", "table": "Table 2", "unpruned": {"presence": 50.0}},
        },
        "settings": {name: {"36": {"pruning": name, "pruning_args": {"keep_tokens": 36}}} for name in ("l2", "atp")},
        "unset": {"pyramiddrop": "no recipe is published"},
        "rows": rows,
    }
    path.write_text(yaml.safe_dump({**tables, **more}, sort_keys=False))
    return path


def shown(path: Path, folder: Path, cells: dict[str, list[str]]) -> dict[tuple[str, ...], tuple[str, ...]]:
    """(method, source) -> paper, ours, interval, difference, verdict."""
    tables = published.read(str(path))
    rows = published.chosen(tables, [], [], [])
    run = runs.load(runfolder.write(folder, cells, TARGETS))
    table = reproduce.table(tables, rows, reproduce.tasks(tables, rows, []), run)
    assert table.columns == reproduce.COLUMNS
    return {(row[1], row[3]): row[4:] for row in table.rows}


# -- the papers' numbers ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", published.names())
def test_every_published_row_can_be_run_or_says_why_not(name: str) -> None:
    tables = published.read(name)
    cells = reproduce.cells(tables, tables.rows)  # resolves every setting
    assert cells[0].pruning == "none"
    for row in tables.rows:
        if tables.setting(row) is None:
            assert row.method in tables.unset, f"{row.method} at {row.budget} has no setting"
        elif isinstance(row.tokens, int) and row.method != "fastv":
            assert 0 < row.tokens < (tables.tokens or 10**9)
    used = {row.source for row in tables.rows}
    assert used == set(tables.sources)
    assert all(source.table and source.unpruned for source in tables.sources.values())
    for row in tables.rows:
        for task, number in row.numbers.items():
            whole = tables.sources[row.source].unpruned[task]
            assert 0.25 * whole < number < 1.1 * whole, f"{row.method} {row.budget} {task}: a slip of a digit?"


def test_an_average_budget_of_fastv_is_the_budget() -> None:
    tables = published.read("llava-1.5-7b")
    for budget, setting in tables.settings["fastv"].items():
        spent = 2 * 576 + 30 * setting.pruning_args["keep_tokens"]
        assert spent / 32 == pytest.approx(int(budget), abs=0.5)


def test_tasks_of_the_tables_are_tasks_of_the_host() -> None:
    lmms_eval = pytest.importorskip("lmms_eval")
    files = {path.stem for path in (Path(lmms_eval.__file__).parent / "tasks").rglob("*.yaml")}
    for name in published.names():
        assert {task.task for task in published.read(name).tasks.values()} <= files


# -- what a run says of them ------------------------------------------------------------------------------------------


def test_verdicts(tmp_path: Path) -> None:
    cells = {"none": wrong(10), "l2-36": wrong(22), "atp-36": wrong(40)}
    found = shown(standin(tmp_path / "table.yaml"), tmp_path / "run", cells)
    assert found["unpruned", "paper"][:2] == ("90", "90.0")
    assert found["unpruned", "paper"][-1] == "reproduced"
    paper, ours, interval, difference, verdict = found["l2", "paper"]
    assert (paper, ours, difference, verdict) == ("80", "78.0", "-2.0", "reproduced")
    low, high = (float(end) for end in interval.strip("[]").split(","))
    assert 68 < low < 72 < 84 < high < 88  # 78 +- 1.96 * sqrt(.78 * .22 / 100)
    assert found["atp", "paper"][-1] == "below the paper"
    assert found["l2", "other"][-1] == "above the paper; the change is reproduced"  # 50 -> 40 there, 90 -> 78 here
    assert found["pyramiddrop", "paper"][1:] == ("-", "-", "-", "no recipe is published")


def test_a_cell_that_failed_or_is_missing_says_so(tmp_path: Path) -> None:
    found = shown(standin(tmp_path / "table.yaml"), tmp_path / "run", {"none": wrong(10)})
    assert found["l2", "paper"][-1] == "not run"


def test_f1_is_resampled_by_question(tmp_path: Path) -> None:
    folder = runfolder.write(tmp_path / "run", {"none": wrong(10)}, TARGETS)
    cell = runs.load(folder).baseline
    cell.results["results"][runfolder.TASK]["pope_f1_score,none"] = 2 * 40 / (40 + 50)
    task = published.Task(task=runfolder.TASK, metric="pope_f1_score")
    ours, change = reproduce.measured(cell, cell, task)
    assert ours.value == pytest.approx(88.9, abs=0.05)
    assert 80 < ours.low < 86 < 92 < ours.high < 96
    assert (change.low, change.value, change.high) == (0, 0, 0)


def test_a_metric_of_more_than_questions_has_no_interval(tmp_path: Path) -> None:
    cell = runs.load(runfolder.write(tmp_path / "run", {"none": wrong(10)}, TARGETS)).baseline
    cell.results["results"][runfolder.TASK] |= {"a,none": 1400.0, "b,none": 350.0}
    ours, _ = reproduce.measured(cell, cell, published.Task(task=runfolder.TASK, metric=["a", "b"], scale=1))
    assert ours == reproduce.Estimate(1750.0)
    assert reproduce.verdict(1740.0, ours, None, ours) == "no interval"
    with pytest.raises(PruningError, match="unknown metric 'c'"):
        reproduce.reported(cell, published.Task(task=runfolder.TASK, metric="c"))


# -- the program ------------------------------------------------------------------------------------------------------


def test_a_dry_run_prints_one_command_per_cell() -> None:
    asked = ("--pruning", "visionzip,fastv", "--tokens", "192,64", "--tasks", "pope,gqa", "--dry-run")
    lines = vtp("reproduce", "llava-1.5-7b", *asked).strip().splitlines()
    assert len(lines) == 5
    assert all("--output_path out/reproduce-llava-1.5-7b/" in line and "--limit" not in line for line in lines)
    assert all("--tasks gqa,pope" in line and "liuhaotian/llava-v1.5-7b" in line for line in lines)
    assert "--pruning none" in lines[0]
    assert any("--pruning fastv --pruning_args layer=2,keep_tokens=166" in line for line in lines)
    assert any("--pruning visionzip:64" in line for line in lines)
    assert not Path("out/reproduce-llava-1.5-7b").exists()


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["llava-1.5"], "unknown published model 'llava-1.5'. Did you mean 'llava-1.5-7b'?"),
        (["llava-1.5-7b", "--pruning", "visonzip"], "unknown method 'visonzip'"),
        (["llava-1.5-7b", "--tokens", "65"], "unknown tokens '65'"),
        (["llava-1.5-7b", "--tasks", "popo"], "unknown task 'popo'"),
        (["llava-1.5-7b", "--pruning", "pyramiddrop"], "nothing to run: its stages are fixed"),
    ],
)
def test_what_is_not_published_is_refused(arguments: list[str], sentence: str) -> None:
    with pytest.raises(PruningError) as refused:
        vtp("reproduce", *arguments)
    assert sentence in str(refused.value)


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        ({"tasks": {"presence": {"task": "x", "metrik": "y"}}}, "metri"),
        ({"unset": {}}, "pyramiddrop has neither settings nor a reason under unset"),
        ({"rows": [{"source": "no", "method": "l2", "tokens": 36, "numbers": {"presence": 1}}]}, "unknown source 'no'"),
    ],
)
def test_a_file_of_another_form_is_refused(tmp_path: Path, more: dict[str, Any], sentence: str) -> None:
    path = standin(tmp_path / "table.yaml", **more)
    with pytest.raises(PruningError) as refused:
        published.read(str(path))
    assert sentence in str(refused.value)
    assert "table.yaml" in str(refused.value)


@pytest.mark.parametrize("spoil", ["a file", "a page that is a folder", "a table that is a folder"])
def test_a_folder_that_cannot_take_the_table_is_refused_before_the_work(
    spoil: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "run"
    if spoil == "a file":
        folder.touch()
    else:
        (folder / ("reproduced.md" if "page" in spoil else "reproduced.csv")).mkdir(parents=True)
    monkeypatch.setattr(sweep, "run", lambda *given, **named: pytest.fail("the work began"))
    with pytest.raises(PruningError, match="cannot write"):
        reproduce_command(str(standin(tmp_path / "table.yaml")), pruning="l2", output=folder)


def test_the_list_says_how_rows_are_run() -> None:
    assert all(name in vtp("reproduce", "--list") for name in published.names())
    listed = vtp("reproduce", "llava-1.5-7b", "--list")
    assert "visionzip:192" in listed
    assert "its stages are fixed by its ratio list" in listed


@pytest.mark.slow
@pytest.mark.usefixtures("waiting_host")
def test_a_stand_in_is_run_through_the_host_and_resumed(tmp_path: Path) -> None:
    path, folder = standin(tmp_path / "table.yaml"), tmp_path / "run"
    said = vtp("reproduce", path, "--pruning", "l2", "--limit", 4, "-o", folder)
    assert "unpruned" in said
    assert (folder / "reproduced.md").read_text().count("| presence |") == 4  # unpruned and l2, of two sources
    written = (folder / "cells" / "l2-36" / "cell.json").stat().st_mtime_ns
    vtp("reproduce", path, "--limit", 4, "-o", folder)
    assert (folder / "cells" / "l2-36" / "cell.json").stat().st_mtime_ns == written
    assert (folder / "cells" / "atp-36" / "cell.json").is_file()


# -- the unpruned model beside what papers print of it ----------------------------------------------------------------


def unpruned(folder: Path, wrong_answers: int, model_args: str, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What a comparison says of its unpruned model, where the stand-in is the only published table."""
    tables = folder / "published"
    tables.mkdir(parents=True)
    standin(tables / "small.yaml", host={"model": "llava", "model_args": "pretrained=liuhaotian/llava-v1.5-7b"})
    monkeypatch.setattr(published, "FOLDER", tables)
    path = runfolder.write(folder / "run", {"none": wrong(wrong_answers)}, TARGETS)
    settings = yaml.safe_load((path / "sweep.yaml").read_text()) | {"model_args": model_args}
    (path / "sweep.yaml").write_text(yaml.safe_dump(settings))
    return beside.lines(runs.load(path))


@pytest.mark.parametrize("checkpoint", ["liuhaotian/llava-v1.5-7b", "llava-hf/llava-1.5-7b-hf"])
def test_the_published_score_stands_beside_ours(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, checkpoint: str
) -> None:
    (said,) = unpruned(tmp_path, 10, f"pretrained={checkpoint},max_pixels=99", monkeypatch)
    assert said.startswith(f"unpruned a stand-in, {runfolder.TASK}, exact_match; max_pixels=99: ours 90.0 [")
    assert said.endswith("], published 90 (paper), 50 (other); a small task.")


def test_a_level_that_is_far_off_is_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (said,) = unpruned(tmp_path, 30, "pretrained=liuhaotian/llava-v1.5-7b", monkeypatch)
    assert said.startswith("WARNING: far from what papers print: unpruned a stand-in")
    assert "pictures as the processor's defaults: ours 70.0 [" in said


def test_another_checkpoint_has_no_published_score(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert unpruned(tmp_path, 10, "pretrained=liuhaotian/llava-v1.5-13b", monkeypatch) == []
