"""The study of a second cut: a row costs its budget, counted independently, and is answered as by `generate`."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console

pytest.importorskip("skimage", reason="backgrounds are the photographs of scikit-image")

from PIL import Image

from vtp_plugin import config, prune
from vtp_plugin.errors import PruningError
from vtp_plugin.stages import Stage
from vtp_plugin.studies.study import conduct
from vtp_plugin.tiny.inference import answers
from vtp_plugin.tiny.pool import draw
from vtp_plugin.tiny.questioning import Questions
from vtp_plugin.tiny.scenes import sample_scene
from vtp_plugin.tiny.testset import ask

LAYERS, TOKENS = 8, 144
TWO = [{"strategy": "vtp", "keep_tokens": 72}, {"strategy": "coreprune", "layer": 2, "keep_tokens": 24}]
ROWS = {
    "vtp": {"enters": 1},
    "two cuts": {"enters": 2, "cut": {"strategy": "coreprune", "layer": 2}},
    "fastv": {"cut": {"strategy": "fastv", "layer": 2}},
    "stages": {"cut": {"strategy": "pyramiddrop", "layers": "1 3 5"}},
    "labels": {"cut": {"strategy": "sparsevlm", "layers": "1 2 4"}, "keep": [0.5]},
}


def test_every_row_costs_its_budget(tmp_path: Path) -> None:
    said = {"limit": 2, "batch": 5, "keep": [0.5, 0.25], "rows": ROWS, "form": "two cuts"}
    record = json.loads(conduct("vtp-second-cut", said, tmp_path / "study", Console(quiet=True)).read_text())
    rows = {(row["row"], row["keep"]): row for row in record["results"]["rows"]}
    never = {("two cuts", 0.5), ("fastv", 0.25)}  # everything would enter; two whole layers are the budget
    never |= {("labels", 0.25)}  # not asked for
    assert set(rows) == {("unpruned", 1), *((name, keep) for name in ROWS for keep in (0.5, 0.25))} - never
    for (_, keep), row in rows.items():
        assert row["spent"] == pytest.approx(sum(row["layers"]) / TOKENS / LAYERS)
        assert row["spent"] == pytest.approx(keep, abs=1 / TOKENS)
        assert {len(hits) for hits in row["right"].values()} == {2}
    assert rows["vtp", 0.25]["layers"] == [36] * LAYERS
    assert rows["two cuts", 0.25]["layers"] == [72, 72] + [24] * 6
    assert rows["fastv", 0.5]["layers"] == [144, 144] + [48] * 6
    table = (tmp_path / "study" / "table.md").read_text()
    assert (
        f"| two cuts | 72 → 24 | 25.0 % | {100 * np.mean(rows['two cuts', 0.25]['right']['presence']):.1f} |" in table
    )
    assert "Not to be had at this budget: fastv." in table


def test_answers_and_costs_are_those_of_the_pruned_model() -> None:
    """Against `generate`, question by question, and against the cuts that it reports."""
    seeds = [3, 8]
    questions = Questions(seeds, batch=7)
    strategies = config.resolve(TWO)
    found = questions.answered(strategies)
    right: dict[str, list[float]] = {}
    costs = []
    with prune(questions.model, strategies, processor=questions.processor) as pruned:
        for place, seed in enumerate(seeds):
            scene = sample_scene("validation", seed)
            for task, question in ask(place, seed, scene).items():
                pruned.events.clear()
                (said,) = answers(questions.model, questions.processor, [Image.fromarray(draw(scene))], [question.text])
                right.setdefault(task, []).append(float(said == question.answer))
                costs.append(cost(pruned.events))
    assert found["right"] == right
    assert found["spent"] == pytest.approx(np.mean(costs)) == pytest.approx((2 * 72 + 6 * 24) / TOKENS / LAYERS)
    assert questions.spent(strategies) == pytest.approx(found["spent"])
    assert questions.tokens == TOKENS


@pytest.mark.parametrize("depth", [8, 28, 32])
def test_the_settings_of_two_cuts_spend_a_quarter(depth: int) -> None:
    first, second = config.resolve("vtp:50+coreprune:behind_vtp")
    (layer,), entered = second.cut_layers(depth), first.count(576)
    assert layer * entered + (depth - layer) * second.count(entered) == 576 * depth / 4


def cost(events) -> float:
    """Tokens x layers of one picture by its cuts, of those without any."""
    seen = torch.full((LAYERS,), float(TOKENS))
    for event in events:
        seen[event.layer if event.stage is Stage.LLM else 0 :] = event.after[0]
    return (seen.sum() / TOKENS / LAYERS).item()


@pytest.mark.parametrize(
    ("said", "sentence"),
    [
        ({"rows": {"two cuts": ROWS["two cuts"]}}, "rows need one called 'vtp'"),
        ({"rows": {"vtp": ROWS["vtp"]}}, "rows need one called 'two cuts'"),
        ({"rows": {**ROWS, "unpruned": {"enters": 1}}}, "cannot be called 'unpruned'"),
        ({"rows": {**ROWS, "bad": {}}}, "expected enters, cut, keep of row 'bad'"),
        ({"rows": {**ROWS, "bad": {"keep": [0.5]}}}, "expected enters, cut, keep of row 'bad'"),
        ({"rows": {**ROWS, "bad": {"enter": 2}}}, "expected enters, cut, keep of row 'bad'"),
        ({"rows": {**ROWS, "bad": {"enters": 0}}}, "enters of row 'bad' must be a number above 0, got 0"),
        ({"rows": {**ROWS, "bad": {"enters": "all"}}}, "enters of row 'bad' must be a number"),
        (
            {"rows": {**ROWS, "bad": {"cut": {"strategy": "divprune"}}}},
            "must cut at the llm stage, divprune does not",
        ),
        ({"rows": {**ROWS, "bad": {"cut": {"strategy": "fastv", "layers": 2}}}}, "unknown field 'layers'"),
        ({"rows": {**ROWS, "bad": {"enters": 2, "keep": [0.3]}}}, "keep of row 'bad' must be some of"),
        ({"keep": [0]}, "keep must be keep ratios"),
        ({"batch": 0}, "batch must be a whole number"),
        ({"limit": 1001}, "limit must be from 1 to the 1000"),
    ],
)
def test_what_is_refused(said: dict, sentence: str, tmp_path: Path) -> None:
    with pytest.raises(PruningError, match=sentence):
        conduct("vtp-second-cut", {"form": "two cuts", "rows": ROWS, **said}, tmp_path / "study", Console(quiet=True))
    assert not (tmp_path / "study").exists()
