"""The study of where tokens are judged: what is counted, how it is put together, and that the tower is seen once."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console

from vtp_plugin import config, get_strategy, list_strategies, prune
from vtp_plugin.errors import PruningError
from vtp_plugin.reporting import statistics
from vtp_plugin.studies import judged_where
from vtp_plugin.studies.study import conduct, settings_of
from vtp_plugin.tiny.asked import Asked, Once, Seen
from vtp_plugin.tiny.clips import questions as clip_questions
from vtp_plugin.tiny.clips.questions import ClipQuestions
from vtp_plugin.tiny.scene_questions import SceneQuestions

METHODS = {"l2": {"at": "projector"}, "two": {"pruning": "vtp"}}
SAID = {"limit": 5, "batch": 2, "keep": [0.5, 0.25], "methods": METHODS}


class Pretended:
    """Answers that follow from the clip's number, the place and the budget: `before` is right about odd clips, too."""

    asked: list[list[int]] = []

    def about(self, numbers: list[int]) -> list[int]:
        self.asked.append(list(numbers))
        return list(numbers)

    @contextmanager
    def tower_once(self) -> Iterator[None]:
        yield

    def answered(self, numbers: list[int], strategies: list[Any]) -> Seen:
        place = strategies[0].judge if strategies else "whole"
        which = [place != "after" or number % 192 == 0 for number in numbers]
        right = {"which": which, "moves": [True] * len(numbers)}
        kept = {"whole": set(range(9)), "after": {0, 1, 2, 3}, "before": {0, 1, 2, 7}}[place]
        return Seen(right, [*which, *right["moves"]], [kept] * 2 * len(numbers))


@pytest.fixture
def pretended(monkeypatch: pytest.MonkeyPatch) -> type[Pretended]:
    monkeypatch.setattr(clip_questions, "ClipQuestions", Pretended)
    monkeypatch.setattr(Pretended, "asked", [])
    return Pretended


def test_what_was_answered_is_put_together(pretended: type[Pretended], tmp_path: Path) -> None:
    """Five clips in three lots, one of them known from before: 0, 96, 192, 288, 384 of the 480."""
    study = judged_where.JudgedWhere(settings_of("judged-where", SAID), tmp_path / "study")
    study.check()
    study.once("clips-192", lambda: study._answered([192, 288]))
    pretended.asked.clear()
    results = study.measure()
    assert pretended.asked == [[0, 96], [384]]
    assert results["unpruned"] == {"which": "11111", "moves": "11111"}
    assert [(row["method"], row["keep"]) for row in results["rows"]] == [
        ("l2", 0.5), ("two", 0.5), ("l2", 0.25), ("two", 0.25)
    ]  # fmt: skip
    for row in results["rows"]:
        assert (row["after"]["which"], row["before"]["which"]) == ("10101", "11111")
        assert row["both"] == pytest.approx(3 / 4)
        assert row["same"] == pytest.approx(8 / 10)
    together, half, _ = study.tables(results)
    gain = statistics.difference([np.array([0, 1, 0, 1, 0.0]), np.zeros(5)])
    shown = f"+20.0 [{100 * gain.low:+.1f}, {100 * gain.high:+.1f}]"
    assert [row[:4] for row in together.rows] == [
        (name, "80.0", "100.0", shown) for name in ("l2", "two", "all methods")
    ]
    assert half.rows[0][:6] == ("l2", "60.0", "100.0", "100.0", "100.0", shown)
    assert half.rows[0][-2:] == ("80", "75")


def test_a_damaged_part_is_named(tmp_path: Path) -> None:
    study = judged_where.JudgedWhere(settings_of("judged-where", SAID), tmp_path)
    study.once("clips-000", lambda: {"a": 1})
    (tmp_path / "units" / "clips-000.json").write_text('{"a": ')
    with pytest.raises(PruningError, match=r"units.clips-000\.json is damaged: without it the study measures"):
        study.once("clips-000", dict)


def test_p_is_adjusted_for_all_rows_and_the_verdict_names_methods() -> None:
    sure = {"a": 0.01, "b": 0.5, "c": 0.04}
    gains = {
        name: [np.array(values)] for name, values in {"a": [1.0, 0, 1], "b": [1.0, 0, 0], "c": [-1.0, 0, 0]}.items()
    }
    said = judged_where.verdict(gains, sure, gains["b"])
    assert "shown to answer better: a; worse: c. All methods together: +33.3" in said
    assert said.endswith("within chance.")
    assert "better: none; worse: none." in judged_where.verdict(gains, dict.fromkeys(gains, 0.2), gains["b"])


def test_scenes_are_asked_about_by_methods_for_pictures(tmp_path: Path) -> None:
    settings = settings_of("judged-where", {"model": "vtp-tiny-qwen", "limit": 4})
    study = judged_where.JudgedWhere(settings, tmp_path)
    study.check()
    assert study.numbers == [0, 250, 500, 750]
    assert set(settings["methods"]) - set(study.methods) == {"evs", "vidcom2", "flashvid"}


def test_every_method_that_can_judge_is_asked() -> None:
    methods = settings_of("judged-where", {})["methods"]
    asked = {dict(fields).pop("pruning", name) for name, fields in methods.items()}
    assert asked == {name for name in list_strategies() if "judge" in get_strategy(name).fields()}


@pytest.mark.parametrize(
    ("said", "sentence"),
    [
        ({"methods": {}}, "methods need one"),
        ({"methods": {"unpruned": {"pruning": "vtp"}}}, "none called 'unpruned'"),
        ({"methods": {"fastv": {}}}, "unknown field 'judge'"),
        ({"methods": {"dart": {}}}, "method 'dart' must be one strategy at the projector stage"),
        ({"methods": {"vtp": {"scalee": 1}}}, "unknown field 'scalee'"),
        ({"model": "vtp-tiny"}, "unknown model of judged-where 'vtp-tiny'"),
        ({"model": "vtp-tiny-qwen", "methods": {"evs": {}}}, "methods need one that is for pictures"),
        ({"model": "vtp-tiny-qwen", "limit": 1001}, "limit must be from 1 to the 1000"),
        ({"keep": [0]}, "keep must be keep ratios"),
        ({"batch": 0}, "batch must be a whole number"),
        ({"limit": 0}, "limit must be from 1"),
        ({"limit": 481}, "limit must be from 1 to the 480"),
    ],
)
def test_what_is_refused(said: dict[str, Any], sentence: str, tmp_path: Path) -> None:
    with pytest.raises(PruningError, match=sentence):
        conduct("judged-where", {**SAID, **said}, tmp_path / "study", Console(quiet=True))
    assert not (tmp_path / "study").exists()


# -- the questions themselves -----------------------------------------------------------------------------------------


def test_what_is_remembered_is_only_what_was_given_last() -> None:
    calls: list[float] = []

    def double(hidden_states: torch.Tensor, factor: int = 2) -> torch.Tensor:
        calls.append(hidden_states.sum().item())
        return factor * hidden_states

    once, x = Once(double), torch.ones(2)
    for given in (x, x.clone(), 2 * x, x):
        assert torch.equal(once.answer(given), 2 * given)
    assert calls == [2, 4, 2]


@pytest.fixture(scope="module", params=[(ClipQuestions, 288), (SceneQuestions, 64)], ids=["clips", "scenes"])
def shown(request: pytest.FixtureRequest) -> tuple[Asked, int]:
    """Questions, and the tokens of what they are about."""
    questions, tokens = request.param
    return questions(), tokens


def test_answers_are_those_of_generate(shown: tuple[Asked, int]) -> None:
    """With the tower's blocks remembered from another strategy's pass; and the model is as before."""
    asked, tokens = shown
    prompts, strategies = (
        asked.about([1]),
        config.resolve("l2", {"at": "projector", "keep_ratio": 0.1, "judge": "before"}),
    )
    with asked.tower_once():
        whole = asked.answered(prompts, [])
        found = asked.answered(prompts, strategies)
    assert {len(kept) for kept in whole.kept} == {tokens}
    kept: list[list[int]] = []
    with torch.no_grad(), prune(asked.model, strategies, processor=asked.processor) as pruned:
        pruned.finished.append(lambda call: kept.extend(image.index.tolist() for image in call.images))
        output = asked.model.generate(**prompts.inputs, max_new_tokens=1, do_sample=False)
    assert found.said == output[:, -1].tolist()
    assert found.kept == [set(own) for own in kept]
    assert all("forward" not in vars(part) for part in asked.parts())
    words = asked.processor.tokenizer.batch_decode(prompts.answers[:, None])
    document = asked.documents[1]
    assert words == [document[f"{task}_answer"] for task in asked.tasks]
    assert found.right == {
        task: [said == true] for task, said, true in zip(asked.tasks, found.said, prompts.answers.tolist(), strict=True)
    }
