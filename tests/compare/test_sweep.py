"""The sweep: what is run, resumed, and survives a crash. A stand-in takes the host's place, except in the slow test."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import fake_host
import pytest
import runfolder
import warm
import yaml
from commands import at_work, ended
from paths import TESTS
from rich.console import Console
from sweeps import CELLS, FAKE, HOST, SPECS, Folder
from typer.testing import CliRunner

from vtp_plugin import cli, list_strategies
from vtp_plugin.compare import matrix, sweep, sweepfile, tuning
from vtp_plugin.errors import Interrupted, PruningError
from vtp_plugin.hosts.lmms_eval import process as host
from vtp_plugin.reporting import rows, runs


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    return Folder(tmp_path)


@pytest.fixture
def other(tmp_path: Path) -> Folder:
    (tmp_path / "other").mkdir()
    return Folder(tmp_path / "other")


# -- what is run ------------------------------------------------------------------------------------------------------


def test_cells_are_named_and_multiplied() -> None:
    made = matrix.cells(["vprune", "atp", "vprune+fastv", "random", "none"], [0.5, 0.25], seeds=2)
    assert [cell.id for cell in made] == [
        *("none", "vprune", "atp-0.5", "atp-0.25", "vprune+fastv-0.5", "vprune+fastv-0.25"),
        *("random-0.5-seed0", "random-0.5-seed1", "random-0.25-seed0", "random-0.25-seed1"),
    ]
    assert made[-1].pruning_args == {"keep_ratio": 0.25, "seed": 1}
    assert (made[-1].keep, made[-1].seed) == (0.25, 1)
    assert (made[1].keep, made[1].seed, made[1].pruning_args) == (None, None, {})


def test_all_is_the_catalogue() -> None:
    """But for methods that compare the frames of a video: a sweep over videos names them."""
    named, everything = {cell.pruning for cell in matrix.cells(["all"], [0.5])}, {"none", *list_strategies()}
    assert everything - named == {"evs", "flashvid", "vidcom2"}
    assert named < everything


def test_all_methods_of_a_table_number_kept_tokens_alike() -> None:
    """But for what says otherwise: a cell's own settings, a paper's setting that has them."""
    made = [*matrix.cells(["atp", "pyramiddrop"], [0.5]), matrix.cell("fastv", 0.5, positions="compact")]
    shared = [cell.pruning_args.get("positions") for cell in matrix.numbered(made, "shared")]
    assert shared == [None, "original", "original", "compact"]
    assert {cell.pruning_args.get("positions") for cell in matrix.numbered(made, "compact")} == {None, "compact"}
    assert matrix.numbered(made, "own") == made
    assert matrix.numbered(made, "shared", "vllm")[1].pruning_args["positions"] == "compact"  # all that vLLM can
    with pytest.raises(PruningError, match="positions must be one of original, compact, own, shared, got 'new'"):
        matrix.numbered(made, "new")


def test_a_comparison_shares_positions_unless_asked_otherwise(tmp_path: Path) -> None:
    said = {"model": "llava", "model_args": "pretrained=vtp-tiny", "tasks": "vtp_scenes", "pruning": "atp"}
    for more, expected in (({}, "original"), ({"positions": "own"}, None), ({"positions": "compact"}, "compact")):
        cells, _ = sweepfile.planned(said | more)
        assert cells[1].pruning_args.get("positions") == expected


@pytest.mark.parametrize("jobs", [1, 3])
def test_a_sweep_runs_every_cell_once(folder: Folder, jobs: int) -> None:
    run = folder.run(jobs=jobs)
    assert [cell.id for cell in run] == CELLS
    assert folder.started == Counter(CELLS)
    assert len(list((folder.run_dir / "work").iterdir())) == jobs
    for cell in run:
        expected = fake_host.answers(cell.id)
        assert [answer.answer for answer in cell.answers(runfolder.TASK).values()] == expected
    again = run["random-0.25-seed1"].command
    assert again[again.index("--pruning_args") + 1] == "keep_ratio=0.25,seed=1"
    assert again[:2] == FAKE.split()


def test_a_finished_sweep_starts_nothing(folder: Folder) -> None:
    folder.run()
    before = folder.outcome()
    folder.run()
    assert folder.started == Counter(CELLS)
    assert folder.outcome() == before


def test_more_cells_join_a_folder(folder: Folder) -> None:
    folder.run(SPECS[:3])
    assert [cell.id for cell in folder.run([matrix.UNPRUNED, *SPECS[3:5]])] == CELLS[:5]
    assert folder.started == Counter(CELLS[:5])


# -- crashes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["FAKE_KILLED", "FAKE_RAISES", "FAKE_HALF"])
@pytest.mark.parametrize("jobs", [1, 2])
def test_a_bad_cell_costs_nothing_else(folder: Folder, other: Folder, how: str, jobs: int) -> None:
    run = folder.run(environment={how: "l2-0.25"}, jobs=jobs)
    reasons = {
        "FAKE_KILLED": "killed by SIGKILL",
        "FAKE_RAISES": "this cell cannot be run",
        "FAKE_HALF": "half-written",
    }
    (failed,) = run.failed
    assert failed.id == "l2-0.25"
    assert reasons[how] in failed.error
    assert "\n" not in failed.error
    assert [cell.id for cell in run] == [id for id in CELLS if id != "l2-0.25"]
    assert folder.started == Counter(CELLS)
    other.run()
    folder.run()  # only the failed cell is run again, and then all is as if nothing had happened
    assert folder.started == Counter([*CELLS, "l2-0.25"])
    assert folder.outcome() == other.outcome()


def test_a_host_that_does_not_start_fails_every_cell_once(folder: Folder) -> None:
    run = folder.run(launch=f"{sys.executable} -c raise(SystemExit('no_such_thing'))")
    assert [cell.id for cell in run.failed] == CELLS
    assert "exit code 1 without results; its last line: no_such_thing" in run.failed[0].error
    assert len(list((folder.run_dir / "work").iterdir())) == 1


SCRIPT = """
import os, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell lets what it runs in the background ignore it
sys.path.insert(0, {tests!r})
from pathlib import Path
from sweeps import Folder
Path("pid").write_text(str(os.getpid()))
Folder(Path.cwd()).run(environment={{"FAKE_SECONDS": "1"}})
"""


@pytest.mark.parametrize("sign", [signal.SIGKILL, signal.SIGINT])
def test_an_interrupted_sweep_goes_on_where_it_was(folder: Folder, other: Folder, sign: int) -> None:
    here, silent = folder.run_dir.parent, {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    (here / "interrupted.py").write_text(SCRIPT.format(tests=str(TESTS)))
    process = subprocess.Popen([*warm.python(), "-m", "interrupted"], cwd=here, **silent)  # ends as that one does
    filed = folder.run_dir / "cells" / "l2-0.5" / "cell.json"
    wait_for(lambda: folder.started["l2-0.25"] and filed.is_file())  # two cells are done, the third is running
    os.kill(int((here / "pid").read_text()), sign)
    assert process.wait() != 0
    done = {cell.id for cell in runs.load(folder.run_dir)}
    assert done == {"none", "l2-0.5"}
    assert runs.load(folder.run_dir).failed == []
    stamps = {id: stamp(folder, id) for id in done}
    folder.run()
    assert {id: stamp(folder, id) for id in done} == stamps
    assert all(folder.started[id] == (1 if id in done else 2 if id == "l2-0.25" else 1) for id in CELLS)
    other.run()
    assert folder.outcome() == other.outcome()


@pytest.mark.parametrize("sign", [signal.SIGTERM, signal.SIGHUP])
def test_whoever_ends_the_program_ends_what_it_started(folder: Folder, sign: int) -> None:
    """A closed terminal, a job's time that is up: no lmms-eval stays behind on the card."""
    code = f"import signal; signal.signal({sign}, signal.SIG_DFL); {PROGRAM}"
    host = [f"--{key}={value}" for key, value in HOST.items()]
    command = [sys.executable, "-c", code, "compare", "-o", str(folder.run_dir), "--pruning=l2", *host]
    slow = OFFLINE | {"FAKE_SECONDS": "60", "FAKE_LOG": str(folder.log)}
    with subprocess.Popen(command, env=slow, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
        wait_for(lambda: folder.started["none"])
        process.send_signal(sign)
        said = process.communicate()[1]
    assert process.returncode == 130
    assert "stopped; 0 of 2 cells are kept in" in said
    assert not [path for path in Path("/proc").glob("[0-9]*/cmdline") if str(folder.run_dir).encode() in _read(path)]


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:  # it has ended
        return b""


def stamp(folder: Folder, id: str) -> int:
    return (folder.run_dir / "cells" / id / "cell.json").stat().st_mtime_ns


def wait_for(condition: Any, seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


# -- refused ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"model_args": "pretrained=other"}, "holds a comparison with model_args"),
        ({"limit": 4}, "holds a comparison with limit = 8, asked was 4"),
        ({"tasks": "vtp_scenes_count"}, "holds a comparison with tasks"),
        ({"options": {"batch_size": 2}}, "holds a comparison with options"),
    ],
)
def test_a_folder_of_other_settings_is_left_alone(folder: Folder, options: dict, sentence: str) -> None:
    folder.run(SPECS[:2])
    before = {path: path.read_bytes() for path in folder.run_dir.rglob("*") if path.is_file()}
    with pytest.raises(PruningError, match=sentence):
        folder.run(SPECS[:2], **options)
    assert {path: path.read_bytes() for path in folder.run_dir.rglob("*") if path.is_file()} == before


def test_a_cell_of_another_meaning_is_refused(folder: Folder) -> None:
    folder.run(SPECS[:2])
    with pytest.raises(PruningError, match=r"holds another cell of the name 'l2-0\.5'"):
        folder.run([matrix.UNPRUNED, matrix.cell("l2", 0.3, id="l2-0.5")])


def test_a_folder_of_something_else_is_refused(folder: Folder) -> None:
    folder.run_dir.mkdir()
    (folder.run_dir / "thesis.tex").write_text("dear to me")
    with pytest.raises(PruningError, match="is not empty and holds no comparison"):
        folder.run()
    assert [path.name for path in folder.run_dir.iterdir()] == ["thesis.tex"]


def test_two_sweeps_do_not_share_a_folder(folder: Folder) -> None:
    with (
        at_work("folder", folder.run_dir),
        pytest.raises(PruningError, match=r"another process is at work in .*run: wait until it has ended"),
    ):
        folder.run()
    folder.run(SPECS[:2], jobs=2)  # processes of one's own are no others
    assert not (folder.run_dir / ".lock").exists()


BROKEN = f"{sys.executable} -c raise(SystemExit('no_such_thing'))"


def test_where_nothing_was_measured_the_corrected_command_is_taken(folder: Folder) -> None:
    """Whatever was wrong; once a cell has its results, other settings need another folder."""
    assert folder.run(SPECS[:3], launch=BROKEN, model_args="pretrained=fkae", limit=4).done == []
    run = folder.run([SPECS[0], SPECS[2]], options={"batch_size": 2})
    assert [cell.id for cell in run.cells] == ["none", "l2-0.25"]
    assert run.settings["model_args"] == HOST["model_args"]
    with pytest.raises(PruningError, match="holds a comparison with options"):
        folder.run([SPECS[0], SPECS[2]])


def test_a_cell_that_failed_may_be_put_right(folder: Folder) -> None:
    folder.run(SPECS[:2], environment={"FAKE_RAISES": "l2-0.5"})
    run = folder.run([matrix.UNPRUNED, matrix.cell("l2", 0.3, id="l2-0.5")])
    assert run["l2-0.5"].pruning_args == {"keep_ratio": 0.3}
    assert folder.started == Counter(["none", "l2-0.5", "l2-0.5"])


def test_what_is_run_again_has_not_failed_yet(folder: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped before it came to the cell, a run says so, and not how the cell failed under other settings."""
    folder.run(SPECS[:2], environment={"FAKE_RAISES": "l2-0.5"})

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(sweep._Sweep, "work", stop)
    with pytest.raises(Interrupted, match="1 of 2 cells are kept"):
        folder.run(SPECS[:2])
    run = runs.load(folder.run_dir)
    assert ([cell.id for cell in run.failed], run.unfinished) == ([], ["l2-0.5"])


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"limit": 0}, "limit must be"),
        ({"jobs": 0}, "jobs must be"),
        ({"model_args": "pretrained=x,pruning=atp"}, "not as pruning="),
        ({"model_args": "vtp-tiny"}, "model_args must be key=value,..., such as pretrained=FOLDER, got 'vtp-tiny'"),
        ({"model_args": "pretrained=vtp-tny"}, "unknown embedded model 'vtp-tny'. Did you mean 'vtp-tiny'?"),
        ({"launch": "accelrate launch"}, "launch: there is no program 'accelrate'"),
    ],
)
def test_bad_settings_write_nothing(folder: Folder, options: dict, sentence: str) -> None:
    with pytest.raises(PruningError) as error:
        folder.run(**options)
    assert sentence in str(error.value)
    assert not [path for path in folder.run_dir.rglob("*") if path.name != ".lock"]


# -- files ------------------------------------------------------------------------------------------------------------


def test_the_settings_of_a_folder_reproduce_it(folder: Folder, other: Folder) -> None:
    folder.run(options={"batch_size": 2})
    cells, said = sweepfile.planned(sweepfile.read(folder.run_dir / "sweep.yaml"))
    assert cells == SPECS
    assert said["options"] == {"batch_size": 2}
    sweep.run(other.run_dir, cells, **said)
    assert folder.outcome() == other.outcome()


@pytest.mark.parametrize("path", sorted(Path("plugin_configs/sweeps").glob("*.yaml")), ids=lambda path: path.stem)
def test_the_files_of_the_project_are_valid(path: Path) -> None:
    cells, said = sweepfile.planned(sweepfile.read(path))
    assert cells[0] == matrix.UNPRUNED
    assert {cell.pruning for cell in cells} >= {"random", "stride"}
    assert {*sweepfile.NEEDED} <= {*said}


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("model: llava\nkeeep: [1]", "unknown field 'keeep'"),
        ("{", "not valid YAML"),
        ("- a", "expected the fields of a comparison"),
        ("model: llava\nmodel_args: x\npruning: atp", "needs tasks"),
        ("model: llava\nmodel_args: x\ntasks: pope", "needs strategies"),
        ("model: llava\nmodel_args: x\ntasks: pope\npruning: apt", "unknown strategy 'apt'. Did you mean 'atp'?"),
        ("model: llava\nmodel_args: x\ntasks: pope\npruning: atp\nkeep: 1.5", "keep must be in (0, 1], got 1.5"),
        ("model: llava\nmodel_args: x\ntasks: pope\npruning: atp\nkeep: half", "keep must be ratios"),
        ("model: llava\nmodel_args: x\ntasks: pope\npruning: random\nseeds: 0", "seeds must be at least 1"),
        ("model: llava\nmodel_args: x\ntasks: pope\ncells: [{pruning: l2, sed: 1}]", "unknown field 'sed' of a cell"),
        ("model: llava\nmodel_args: x\ntasks: pope\ncells: [{pruning: l2, id: a/b}]", "cannot be the name of a folder"),
        (
            "model: llava\nmodel_args: x\ntasks: pope\ncells: [{pruning: vprune}, {pruning: l2, id: vprune}]",
            "two different cells are named 'vprune'",
        ),
    ],
)
def test_a_bad_file_is_refused(tmp_path: Path, content: str, sentence: str) -> None:
    (tmp_path / "sweep.yaml").write_text(content)
    with pytest.raises(PruningError) as error:
        sweepfile.planned(sweepfile.read(tmp_path / "sweep.yaml"))
    assert sentence in str(error.value)


def test_a_file_may_leave_cells_out() -> None:
    said = {"model": "llava", "model_args": "x", "tasks": "pope", "pruning": "atp,l2", "keep": [0.5, 0.25]}
    cells, _ = sweepfile.planned(said | {"without": ["l2-0.25"]})
    assert [cell.id for cell in cells] == ["none", "atp-0.5", "atp-0.25", "l2-0.5"]
    with pytest.raises(PruningError, match=r"unknown cell 'l2-0.2' in without. Did you mean 'l2-0.25'"):
        sweepfile.planned(said | {"without": ["l2-0.2"]})


def test_cells_of_a_file_carry_their_own_settings(tmp_path: Path) -> None:
    listed = [{"pruning": "vprune", "pruning_args": {"chi2_threshold": 5}, "id": "vprune-5"}, {"pruning": "l2"}]
    said = {"model": "llava", "model_args": "x", "tasks": ["pope"], "cells": listed}
    (tmp_path / "s.yaml").write_text(yaml.safe_dump(said))
    cells, _ = sweepfile.planned(sweepfile.read(tmp_path / "s.yaml"))
    assert [(cell.id, dict(cell.pruning_args)) for cell in cells] == [
        ("none", {}),
        ("vprune-5", {"chi2_threshold": 5, "positions": "original"}),
        ("l2", {"positions": "original"}),
    ]


def test_the_embedded_model_shares_cores_politely(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its processes' threads do not spin while they wait, unless the user says so; other models are left alone."""
    said = {
        "model_args": "pretrained=vtp-tiny",
        "tasks": ["vtp_scenes"],
        "jobs": 1,
        "environment": {},
        "gallery": False,
    }
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)

    def environment(**more: Any) -> dict[str, str]:
        return sweep._Sweep(tmp_path, {**said, **more}, 1, Console(quiet=True))._environment()

    assert environment()["OMP_WAIT_POLICY"] == "PASSIVE"
    assert environment(environment={"OMP_WAIT_POLICY": "ACTIVE"})["OMP_WAIT_POLICY"] == "ACTIVE"
    assert "OMP_WAIT_POLICY" not in environment(model_args="pretrained=liuhaotian/llava-v1.5-7b")
    monkeypatch.setenv("OMP_WAIT_POLICY", "ACTIVE")
    assert "OMP_WAIT_POLICY" not in environment()


# -- tuning -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("first", range(12))
def test_bisection_finds_the_smallest_that_passes(first: int) -> None:
    asked = []
    found = tuning.smallest(range(11), lambda n: asked.append(n) or n >= first)
    assert found == (first if first < 11 else None)
    assert len(asked) == len(set(asked)) <= 5


@pytest.mark.parametrize("drop", [0.0, 0.3, 0.6, 0.95])
def test_tuning_runs_few_cells_and_says_what_it_found(folder: Folder, monkeypatch: Any, drop: float) -> None:
    """A stand-in whose answers are wrong for a share of questions that grows as the ratio falls."""
    monkeypatch.setenv("FAKE_LOG", str(folder.log))
    costs = {"none": 0, **{f"l2-{ratio / 10:g}": 10 - ratio for ratio in range(1, 10)}}
    real = rows.difference

    def difference(row: Any, other: Any, tasks: Any = None) -> Any:
        return real(Shifted(row, costs[row.id] / 10), Shifted(other, 0), tasks)

    monkeypatch.setattr(rows, "difference", difference)
    found = tuning.tune(folder.run_dir, "l2", tuning.grid(0.1), drop, **HOST)
    expected = {0.0: None, 0.3: 0.7, 0.6: 0.4, 0.95: 0.1}[drop]
    assert found.keep == expected
    assert sum(folder.started.values()) == len(found.tried) + 1 <= 6
    said = found.sentence()
    assert said.startswith("l2: no keep ratio stays" if expected is None else f"l2: keep_ratio={expected:g} stays")


class Shifted:
    """A row whose values are known."""

    def __init__(self, row: rows.Row, cost: float) -> None:
        self.tasks = row.tasks
        self.values = {task: dict.fromkeys(values, 1 - cost) for task, values in row.values.items()}


def test_what_has_no_ratio_cannot_be_tuned() -> None:
    with pytest.raises(PruningError, match="vprune has no keep ratio to tune"):
        tuning.check("vprune")
    with pytest.raises(PruningError, match="--step must be in"):
        tuning.grid(0)


# -- the command line, with the real host -----------------------------------------------------------------------------


PROGRAM = "from vtp_plugin.cli import main; main()"
OFFLINE = {**os.environ, **sweep.OFFLINE, "OMP_NUM_THREADS": "1", "NO_COLOR": "1"}


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["compare", "-o", "x"], "a comparison needs model and model_args and tasks"),
        (["compare", "nowhere.yaml", "-o", "x"], "sweep file not found: nowhere.yaml"),
        (["compare", "l2", "-o", "x"], "sweep file not found: l2; strategies are named with --pruning"),
        (["tune", "--max-drop", "2", "--pruning", "atp", "--tasks", "pope", "-o", "x"], "--max-drop must be a share"),
        (["tune", "--max-drop", "1%", "--pruning", "vprune", "--tasks", "pope", "-o", "x"], "no keep ratio to tune"),
    ],
)
def test_bad_input_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], sentence: str
) -> None:
    monkeypatch.chdir(tmp_path)
    cli.vtp_register_commands(cli=cli.app)
    refusal = CliRunner().invoke(cli.app, arguments).exception
    assert isinstance(refusal, PruningError)
    assert sentence in str(refusal)
    assert "\n" not in str(refusal)
    assert not list(tmp_path.iterdir())


def invoke(*arguments: object) -> Any:
    cli.vtp_register_commands(cli=cli.app)
    host = [f"--{key}={value}" for key, value in HOST.items()]
    return CliRunner().invoke(cli.app, [*map(str, arguments), *host], env={"COLUMNS": "200"})


def test_compare_ends_with_a_table_and_an_exit_code(folder: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_LOG", str(folder.log))
    arguments = ["compare", "-o", folder.run_dir, "--pruning", "l2,random", "--keep", "0.5,0.25", "--seeds", 2]
    monkeypatch.setenv("FAKE_RAISES", "l2-0.25")
    said = invoke(*arguments)
    assert said.exit_code == 1
    assert "failed  l2-0.25  this cell cannot be run" in said.output
    monkeypatch.delenv("FAKE_RAISES")
    said = invoke(*arguments, "--gallery", "--batch_size", 1)
    assert isinstance(said.exception, PruningError)  # other options than those of the folder
    said = invoke(*arguments)
    assert said.exit_code == 0, said.output
    assert folder.started == Counter([*CELLS, "l2-0.25"])
    table = (folder.run_dir / "table.md").read_text()
    assert all(name in table for name in ("| unpruned |", "| l2-0.25 |", "| random-0.25 (2 seeds) |"))
    assert "random-0.25 (2 seeds)" in said.output


def test_what_failed_before_is_not_this_command_s_failure(folder: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_LOG", str(folder.log))
    monkeypatch.setenv("FAKE_RAISES", "l2-0.5")
    assert invoke("compare", "-o", folder.run_dir, "--pruning", "l2", "--keep", "0.5").exit_code == 1
    said = invoke("compare", "-o", folder.run_dir, "--pruning", "stride", "--keep", "0.5")
    assert said.exit_code == 0, said.output
    assert "Failed: l2-0.5." in said.output


@pytest.mark.parametrize("failing", ["none", "l2-0.75"])
def test_a_cell_that_failed_is_no_bad_input(folder: Folder, monkeypatch: pytest.MonkeyPatch, failing: str) -> None:
    """Exit code 1, though there is nothing to compare or to tune without it; 2 is for what was asked."""
    monkeypatch.setenv("FAKE_LOG", str(folder.log))
    monkeypatch.setenv("FAKE_RAISES", failing)
    options = [f"--{key}={value}" for key, value in HOST.items()]
    command = ["compare", "--keep=0.5"] if failing == "none" else ["tune", "--max-drop=0", "--step=0.25"]
    said = ended(*command, "-o", folder.run_dir, "--pruning=l2", *options)
    assert said.returncode == 1
    assert f"{failing}" in said.stderr
    assert "failed: this cell cannot be run" in said.stderr
    assert said.stderr.count("\n") == 1


@pytest.mark.parametrize(("drop", "sentence"), [("90%", "l2: keep_ratio=0.25 stays"), ("0", "l2: no keep ratio stays")])
def test_tune_says_what_it_found(folder: Folder, monkeypatch: pytest.MonkeyPatch, drop: str, sentence: str) -> None:
    monkeypatch.setenv("FAKE_LOG", str(folder.log))
    said = invoke("tune", "--max-drop", drop, "-o", folder.run_dir, "--pruning", "l2", "--step", 0.25)
    assert sentence in said.output
    assert said.exit_code == (1 if "no keep" in sentence else 0)
    assert {"none", "l2-0.75"} <= {*folder.started}


REAL = {
    "model": "llava",
    "model_args": "pretrained=vtp-tiny",
    "tasks": "vtp_scenes_presence",
    "limit": 4,
    "gallery": False,
    "pruning": "random",
    "keep": 0.25,
    "cells": [{"pruning": "fastv", "pruning_args": {"layer": 9}, "id": "impossible"}, {"pruning": "l2", "id": "l2"}],
}


@pytest.mark.slow
def test_the_real_host_killed_and_resumed(tmp_path: Path) -> None:
    pytest.importorskip("lmms_eval")
    (tmp_path / "sweep.yaml").write_text(yaml.safe_dump(REAL))
    (tmp_path / "program.py").write_text(PROGRAM)
    python, cold = warm.python(), [sys.executable, "-c", PROGRAM]

    def start(folder: str, program: list[str], *more: str) -> subprocess.Popen[str]:
        log = (tmp_path / f"{folder}.log").open("w")
        command = [*program, "compare", "sweep.yaml", "-o", folder, *more]
        return subprocess.Popen(command, cwd=tmp_path, env=OFFLINE, stdout=log, stderr=log)

    soon = ([*python, "-m", "program"], "--launch", " ".join(python))
    first = start("whole", *soon)
    killed = start("killed", cold)
    wait_for((tmp_path / "killed" / "cells" / "none" / "cell.json").is_file, 280)
    killed.send_signal(signal.SIGKILL)
    assert first.wait() == 1, (tmp_path / "whole.log").read_text()  # one cell fails
    done = {cell.id: stamp_of(cell) for cell in runs.load(tmp_path / "killed")}
    assert "none" in done
    assert start("killed", *soon).wait() == 1
    whole, resumed = runs.load(tmp_path / "whole"), runs.load(tmp_path / "killed")
    assert done.items() <= {cell.id: stamp_of(cell) for cell in resumed}.items()
    assert [cell.id for cell in whole] == [cell.id for cell in resumed] == ["none", "random-0.25", "l2"]
    for a, b in zip(whole, resumed, strict=True):
        assert [x.answer for x in a.answers(TASK).values()] == [x.answer for x in b.answers(TASK).values()]
        assert a.record["visual_tokens"] == b.record["visual_tokens"]
    for run in (whole, resumed):
        (failed,) = run.failed
        assert failed.id == "impossible"
        assert "layer" in failed.error
        assert "Failed: impossible." in (run.folder / "table.md").read_text()
        assert {"table.md", "table.csv", "table.tex", "summary.json"} <= {path.name for path in run.folder.iterdir()}


TASK = "vtp_scenes_presence"


def stamp_of(cell: runs.Cell) -> int:
    return (cell.folder / "cell.json").stat().st_mtime_ns


def test_a_launcher_stands_in_front_of_the_command(tmp_path: Path) -> None:
    launch = ["accelerate", "launch", "--num_processes", "4"]
    made = host.Host([matrix.UNPRUNED], {}, tmp_path, tmp_path / "w", launch)
    assert made.command == [*launch, "-m", "lmms_eval", "--config", str(tmp_path / "w" / "cells.yaml")]
    assert host.Host([matrix.UNPRUNED], {}, tmp_path, tmp_path / "w").command[:3] == [sys.executable, "-m", "lmms_eval"]


def test_the_cell_file_is_what_the_contract_says(folder: Folder) -> None:
    folder.run(SPECS[:2])
    said = json.loads((folder.run_dir / "cells" / "l2-0.5" / "cell.json").read_text())
    assert said.pop("command")
    assert said == {
        "schema": 1, "id": "l2-0.5", "label": "l2-0.5", "pruning": "l2", "pruning_args": {"keep_ratio": 0.5},
        "seed": None, "keep": 0.5, "status": "done", "error": None,
    }  # fmt: skip


# -- folders of any name, and the keyboard ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["bob's", "a,b", "a\nb", 'a "b" [red]', "{x}", "ü"])
def test_a_folder_may_have_any_name(tmp_path: Path, name: str) -> None:
    odd = Folder(tmp_path / name)
    run = odd.run(SPECS[:2])
    assert [cell.id for cell in run] == CELLS[:2]
    assert odd.started == Counter(CELLS[:2])
    assert len(list((odd.run_dir / "work").iterdir())) == 1  # the logs are where they always are


def test_a_stop_from_the_keyboard_says_how_to_go_on(folder: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    folder.run(SPECS[:2])

    def stopped(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(sweep._Sweep, "work", stopped)
    with pytest.raises(Interrupted) as error:
        folder.run()
    assert str(error.value) == f"stopped; 2 of 7 cells are kept in {folder.run_dir}: the same command goes on"


@pytest.mark.parametrize(
    ("field", "value", "sentence"),
    [
        ("limit", True, "limit must be a whole number, got True"),
        ("jobs", "2", "jobs must be a whole number, got '2'"),
        ("tasks", {"a": 1}, "tasks must be text or a list, got {'a': 1}"),
        ("options", {"limit": 2}, "limit is not one of the host's options here"),
        ("environment", {"a=b": "c"}, "is no variable"),
        ("environment", {"a": [1]}, "environment.a must be"),
        ("seeds", 10**9, "seeds must be at most 1000"),
        ("gallery", "yes", "gallery must be true or false"),
        ("cells", {"a": 1}, "cells must be a list"),
        ("cells", [{"pruning": "l2", "id": "a b"}], "cannot be the name of a folder"),
        ("cells", [{"pruning": "l2", "seed": True}], "cells.0.seed must be a whole number, got True"),
        ("schema", 2, "schema must be 1"),
    ],
)
def test_a_field_of_the_wrong_kind_is_named(tmp_path: Path, field: str, value: Any, sentence: str) -> None:
    said = {"model": "llava", "model_args": "pretrained=x", "tasks": "pope", "pruning": "random", field: value}
    (tmp_path / "s.yaml").write_text(yaml.safe_dump(said))

    def compared() -> None:
        cells, host = sweepfile.planned(sweepfile.read(tmp_path / "s.yaml"))
        sweep.run(tmp_path / "run", cells, **host)

    with pytest.raises(PruningError) as error:
        compared()
    assert sentence in str(error.value)
    assert not (tmp_path / "run").exists()
