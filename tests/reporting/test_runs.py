"""Reading a run folder: what is in it, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import runfolder
from runfolder import TASK

from vtp_plugin.errors import PruningError
from vtp_plugin.reporting import runs

TARGETS = ["yes", "no", "yes", "no"]
ANSWERS = {"none": ["yes", "no", "yes", "yes"], "atp-0.25": ["no", "no", "yes", "no"]}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return runfolder.write(tmp_path / "run", ANSWERS, TARGETS)


def test_a_folder_is_read(folder: Path) -> None:
    run = runs.load(folder)
    assert [cell.id for cell in run] == ["none", "atp-0.25"]
    assert run.baseline.id == "none"
    assert run.tasks == [TASK]
    assert (run.failed, run.unfinished) == ([], [])
    cell = run["atp-0.25"]
    assert (cell.keep, cell.seed, cell.pruning_args) == (0.25, None, {"keep_ratio": 0.25})
    assert cell.accuracies == {TASK: 0.75}
    assert cell.record["visual_tokens"]["mean_after"] == 36
    answer = cell.answers(TASK)[0]
    assert (answer.correct, answer.answer, answer.target, answer.question) == (0.0, "no", "yes", "question 0")
    assert answer.report["images"] == [{"before": 144, "after": 36}]


def test_failed_and_unfinished_cells_are_named(folder: Path) -> None:
    path = folder / "cells" / "atp-0.25" / "cell.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"status": "failed", "error": "it broke"}))
    run = runs.load(folder)
    assert [cell.error for cell in run.failed] == ["it broke"]
    assert [cell.id for cell in run] == ["none"]
    path.unlink()
    assert runs.load(folder).unfinished == ["atp-0.25"]


MME = [{"metric": "mme_perception_score"}, {"metric": "mme_cognition_score"}]


@pytest.mark.parametrize(
    ("line", "metrics", "expected"),
    [
        (
            {"exact_match": 0.3, "submission": {"answer": "4"}},
            [{"metric": "exact_match"}, {"metric": "submission"}],
            0.3,
        ),
        ({"pope_accuracy": {"score": 1.0}, "pope_recall": {"score": 0}}, [{"metric": "pope_accuracy"}], 1.0),
        ({"mme_cognition_score": {"score": 1.0, "category": "translation"}}, MME, 1.0),
        ({"exact_match": True}, [{"metric": "exact_match"}], 1.0),
        ({"f1": [True, False], "accuracy": 0.0}, [{"metric": "f1"}, {"metric": "accuracy"}], 0.0),
        ({"wer": 0.2, "score": 0.9}, [{"metric": "wer", "higher_is_better": False}, {"metric": "score"}], 0.9),
        ({"gpt_eval_score": {"prediction": "A", "answer": "B"}}, [{"metric": "gpt_eval_score"}], None),
    ],
)
def test_which_metric_is_the_value(line: dict, metrics: list, expected: float | None) -> None:
    assert runs.value(line, metrics) == expected


def test_of_several_filters_the_first_counts(folder: Path) -> None:
    path = folder / "cells" / "none" / f"samples_{TASK}.jsonl"
    other = [json.dumps(json.loads(line) | {"exact_match": 0.0}) for line in path.read_text().splitlines()]
    path.write_text(path.read_text() + "\n".join(other) + "\n")
    assert runs.load(folder)["none"].accuracies == {TASK: 0.75}


def test_a_task_without_values_is_left_out_by_name(folder: Path) -> None:
    path = folder / "cells" / "none" / "results.json"
    content = json.loads(path.read_text())
    content["configs"][TASK]["metric_list"] = [{"metric": "judged"}]
    path.write_text(json.dumps(content))
    cell = runs.load(folder)["none"]
    assert (cell.unscored, cell.accuracies) == ([TASK], {})
    with pytest.raises(PruningError, match="no value per question"):
        cell.answers(TASK)


def refused(folder: Path) -> str:
    with pytest.raises(PruningError) as error:
        [cell.answers(TASK) for cell in runs.load(folder)]
    assert "\n" not in str(error.value)
    return str(error.value)


def test_an_empty_folder_is_refused(tmp_path: Path, folder: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert "not a run folder" in refused(tmp_path / "empty")
    assert "not a run folder" in refused(tmp_path / "nowhere")
    for path in folder.rglob("cell.json"):
        path.unlink()
    assert "empty run folder" in refused(folder)


@pytest.mark.parametrize("name", ["cell.json", "results.json", f"samples_{TASK}.jsonl"])
@pytest.mark.parametrize("share", [0, 0.5, 0.9])
def test_a_half_written_file_is_refused(folder: Path, name: str, share: float) -> None:
    path = folder / "cells" / "none" / name
    path.write_text(path.read_text()[: int(share * len(path.read_text()))])
    assert "half-written" in refused(folder)


@pytest.mark.parametrize("name", ["results.json", f"samples_{TASK}.jsonl"])
def test_a_missing_file_is_refused(folder: Path, name: str) -> None:
    (folder / "cells" / "none" / name).unlink()
    assert "half-written" in refused(folder)


@pytest.mark.parametrize("value", [None, "text", ["text"], [{}], [{"name": None}], [{"name": "l2", "positions": 3}]])
def test_strategies_of_another_kind_are_refused(folder: Path, value: Any) -> None:
    path = folder / "cells" / "none" / "results.json"
    results = json.loads(path.read_text())
    results["pruning"]["strategies"] = value
    path.write_text(json.dumps(results))
    assert "pruning.strategies" in refused(folder)


@pytest.mark.parametrize(
    "value",
    [None, [], {"images": {"a": 1}}, {"images": [{"before": 1}]}, {"images": [{"before": 2, "after": None}]},
     {"prompt_tokens": None}, {"prompt_tokens": {"mean_over_layers": 3}}],
)  # fmt: skip
def test_a_question_of_another_kind_is_refused(folder: Path, value: Any) -> None:
    path = folder / "cells" / "none" / f"samples_{TASK}.jsonl"
    first, *rest = path.read_text().splitlines()
    path.write_text("\n".join([json.dumps(json.loads(first) | {"pruning": value}), *rest]) + "\n")
    run = runs.load(folder)
    with pytest.raises(PruningError, match=r"line 1: pruning"):
        run.baseline.answers(TASK)


def test_a_missing_question_is_refused(folder: Path) -> None:
    path = folder / "cells" / "none" / f"samples_{TASK}.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:-1]))
    assert f"half-written, 3 of 4 questions of {TASK}" in refused(folder)


def test_different_models_and_tasks_are_refused(tmp_path: Path, folder: Path) -> None:
    other = {"atp-0.25": ANSWERS["atp-0.25"]}
    for what, options in {"models": {"checkpoint": "llava-13b"}, "tasks": {"task": "pope"}}.items():
        foreign = runfolder.write(tmp_path / what, other, TARGETS, **options)
        mixed = runfolder.write(tmp_path / f"mixed-{what}", ANSWERS, TARGETS)
        for path in (foreign / "cells" / "atp-0.25").iterdir():
            (mixed / "cells" / "atp-0.25" / path.name).write_text(path.read_text())
        assert f"results of different {what} in one comparison" in refused(mixed)
