"""The studies of design: what they count is what the strategies keep, and their tables say what was measured."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console

pytest.importorskip("skimage", reason="backgrounds are the photographs of scikit-image")

from vtp_plugin import config, prune
from vtp_plugin.errors import PruningError
from vtp_plugin.studies import atp_design
from vtp_plugin.studies.evaluated import hits
from vtp_plugin.studies.study import conduct
from vtp_plugin.tiny import probe, reading
from vtp_plugin.tiny.fitting import Run
from vtp_plugin.tiny.inference import answer, answers, load
from vtp_plugin.tiny.pool import draw
from vtp_plugin.tiny.scenes import PLATE, SIZE, Thing, sample_scene
from vtp_plugin.tiny.testset import ask

SCENE = replace(
    sample_scene("test", 0),
    things=(Thing("star", "red", 0, 0, 28), Thing("ring", "blue", 84, 84, 28), Thing(PLATE, "", 140, 140, 28, digit=7)),
)


def results(name: str, said: dict, folder: Path) -> tuple[dict, str]:
    record = json.loads(conduct(name, said, folder, Console(quiet=True)).read_text())
    return record["results"], (folder / "table.md").read_text()


# -- atp-design --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", [12, 24, 6])
def test_patches_of_an_object(side: int) -> None:
    """On every grid the object of 28 pixels in the corner has the patches of that corner."""
    edge = round(28 / SIZE * side)
    found = atp_design.parts(SCENE, "star", (side, side))
    assert found["asked"] == {row * side + column for row in range(edge) for column in range(edge)}
    assert len(found["others"]) == 2 * edge**2
    assert set().union(*found.values()) == set(range(side**2))
    assert sum(map(len, found.values())) == side**2


def test_shares_and_moves_by_hand() -> None:
    """The star has patches 0, 1, 12, 13; the ring 78, 79, 90, 91. Nothing that is not there is counted."""
    asked = [
        atp_design.Asked(0, "attribute", "what color is the star", "red", "star"),
        atp_design.Asked(0, "position", "where is the ring", "right", "ring"),
        atp_design.Asked(0, "presence", "is there a heart", "no", ""),
    ]
    kept = [[0, 1, 12, 78], [0, 78, 79, 90], [5]]
    found = atp_design.followed([SCENE], asked, kept, (12, 12))
    assert found["asked"] == pytest.approx((3 / 4 + 3 / 4) / 2)
    assert found["others"] == pytest.approx((1 / 8 + 1 / 8) / 2)
    assert found["ground"] == 0
    assert found["moves"] == pytest.approx(1 - 2 / 4)


def test_the_class_token_s_attention_does_not_move_and_the_question_does(tmp_path: Path) -> None:
    readings = {"random": {"pruning": "random", "at": "projector"}, "attention": {"alpha": 0}, "text": {"alpha": 1}}
    said = {"limit": 3, "keep": [0.25], "readings": readings, "reader": {}}
    found, table = results("atp-design", said, tmp_path / "study")
    rows = {row["reading"]: row for row in found["rows"]}
    assert {rows["unpruned"][where] for where in atp_design.WHERE} == {1}
    assert rows["unpruned"]["moves"] == rows["attention"]["moves"] == 0
    assert rows["text"]["moves"] > 0
    assert all(0 < rows["random"][where] < 1 for where in atp_design.WHERE)
    assert {len(hits) for hits in rows["text"]["right"].values()} == {3}
    assert f"| text | {100 * np.mean(rows['text']['right']['presence']):.1f} |" in table
    assert "Information" not in table


def test_the_reader_is_shown_what_the_language_model_is(tmp_path: Path) -> None:
    """The rows that were kept, in the study as in the probe by itself; a reader that was trained is used again."""
    said = {"model": "vtp-tiny", "batch": 2, "reader": {"scenes": 2, "steps": 1}}
    study, scene = atp_design.AtpDesign(said, tmp_path), sample_scene("validation", 3)
    asked = list(ask(0, 3, scene).values())[1:2]
    study.scenes, study.questions = [scene], [atp_design.Asked(0, q.task, q.text, q.answer, "") for q in asked]
    study.model, study.processor = load()
    shown, reader = [], study.reader
    study.reader = lambda tokens, asked: shown.append(tokens[0]) or reader(tokens, asked)
    stride = {"at": "projector", "keep_ratio": 0.25, "positions": "original"}
    read = study._read([[*range(0, 144, 4)]])
    with prune(study.model, "stride", processor=study.processor, **stride):
        for number, question in enumerate(asked):
            _, seen = probe.seen_by(study.model, study.processor, scene.render(), question.text)
            torch.testing.assert_close(shown[number], seen, rtol=1e-4, atol=1e-5)
            words, answer = probe.encode([[question]])
            assert read[number] == bool(reader(seen[None], words).argmax(-1) == answer)
    before = (tmp_path / "reader" / "probe.pt").stat().st_mtime_ns
    again = probe.trained(Run(tmp_path / "reader"), scenes=2, steps=1)
    assert (tmp_path / "reader" / "probe.pt").stat().st_mtime_ns == before
    assert not list((tmp_path / "reader").glob("train-*"))
    assert all(map(torch.equal, again.state_dict().values(), reader.state_dict().values()))


def test_information_and_shift_are_what_is_lost() -> None:
    """Of ten questions a reading answers five less than all tokens do, of which the reader misses three."""

    def row(name: str, keep: float, right: int, read: int) -> dict:
        return {
            "reading": name,
            "keep": keep,
            "right": hits(right),
            "read": hits(read),
            "moves": 0,
            "asked": 1,
            "others": 1,
            "ground": 1,
        }

    def hits(number: int) -> dict:
        return {"count": [True] * number + [False] * (10 - number)}

    study = atp_design.AtpDesign({"keep": [0.5], "readings": {"random": {}, "as printed": {}, "poor": {}}}, Path())
    rows = [row("unpruned", 1, 10, 9), row("random", 0.5, 8, 8), row("as printed", 0.5, 5, 6), row("poor", 0.5, 2, 0)]
    *_, split = study.tables({"scenes": 10, "questions": 10, "rows": rows})
    found = {name: cells for name, *cells in split.rows}
    assert [cell.split()[0] for cell in found["as printed"]] == ["+50.0", "+30.0", "+20.0", "+20.0"]
    assert [cell.split()[0] for cell in found["random"]] == ["+20.0", "+10.0", "+10.0", "+10.0"]
    assert "At 0.5, shown to keep more information than random: none; less: *poor*." in split.caption


@pytest.mark.parametrize(
    ("said", "sentence"),
    [
        ({"reader": {"steps": 3}}, "reader must be {}, or whole numbers of scenes and steps"),
        ({"reader": {"scenes": 0, "steps": 3}}, "reader must be {}, or whole numbers"),
        ({"model": "somewhere/else"}, "the reader reads vtp-tiny's tokens: say reader={} with another model"),
        ({"readings": {"random": {}, "p": {"pruning": "pooling"}}}, "'p' merges tokens, the reader is shown"),
        ({"readings": {"as printed": {}}}, "readings need one called 'random'"),
        ({"readings": {"random": {}, "unpruned": {}}}, "cannot be called 'unpruned'"),
        ({"readings": {"random": {"alhpa": 1}}}, "alhpa"),
        ({"keep": [2]}, "keep ratios"),
        ({"batch": 0}, "batch must be a whole number"),
        ({"limit": 0}, "limit must be from 1"),
    ],
)
def test_what_atp_design_refuses(said: dict, sentence: str, tmp_path: Path) -> None:
    with pytest.raises(PruningError, match=sentence):
        conduct("atp-design", said, tmp_path / "study", Console(quiet=True))
    assert not (tmp_path / "study").exists()


def test_a_batch_answers_as_one_by_one() -> None:
    model, processor = load()
    scenes = [sample_scene("validation", seed) for seed in range(3)]
    asked = ["what is the digit", f"how many {scenes[1].counted}s", "is there a star"]
    pictures = [scene.render() for scene in scenes]
    alone = [answer(model, processor, *pair) for pair in zip(pictures, asked, strict=True)]
    assert answers(model, processor, pictures, asked) == alone


# -- vtp-design --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", reading.LAYOUTS)
def test_a_reading_is_that_of_the_pruned_model(name: str) -> None:
    """What strategies keep, and what is answered: read once for all questions, and by the pruned model, one by one."""
    reader, numbered = reading.Reading(name), [(seed, sample_scene("validation", seed)) for seed in range(4)]
    visual = reader.shown([scene for _, scene in numbered])
    asked = [list(ask(place, seed, scene).values()) for place, (seed, scene) in enumerate(numbered)]
    for spec, fields in ((None, {}), ("vtp", {}), ("scope", {}), ("divprune", {}), ("stride", {"at": "projector"})):
        strategies = config.resolve(spec, {"keep_ratio": 0.11, "positions": "original", **fields}) if spec else []
        strategy = strategies[0] if spec else None
        columns = reader.kept(visual, strategy)
        kept, said = [], []
        with prune(reader.model, strategies or "none", processor=reader.processor) as pruned:
            pruned.finished.append(lambda call, kept=kept: kept.append(call.images[0].index.tolist()))
            for (_, scene), questions in zip(numbered, asked, strict=True):
                picture = Image.fromarray(draw(scene))
                said.append([answer(reader.model, reader.processor, picture, q.text) == q.answer for q in questions])
        assert kept == [row.tolist() for row in visual.index.gather(1, columns) for _ in asked[0]]
        right = reader.answered(visual, strategy, reader.lesson(asked))
        assert [list(map(bool, hits)) for hits in right.values()] == list(map(list, zip(*said, strict=True)))


def test_rows_of_vtp_design(tmp_path: Path) -> None:
    parts = {"vtp": {}, "stride": {"pruning": "stride", "at": "projector"}}
    found, table = results("vtp-design", {"limit": 6, "keep": [0.11], "parts": parts}, tmp_path / "study")
    rows = {row["part"]: hits(row["right"]) for row in found["rows"]}
    assert list(rows) == ["unpruned", "vtp", "stride"]
    assert all(len(one) == 6 for right in rows.values() for one in right.values())
    assert np.mean(rows["unpruned"]["attribute"]) > 0.8
    assert f"| vtp | {100 * np.mean(rows['vtp']['presence']):.1f} |" in table


@pytest.mark.parametrize(
    ("said", "sentence"),
    [
        ({"parts": {"stride": {}}}, "need one called 'vtp'"),
        ({"parts": {"vtp": {}, "fastv": {"pruning": "fastv"}}}, "'fastv' must choose in front of the projector"),
        ({"parts": {"vtp": {"at": "llm"}}}, "'vtp' must choose in front of the projector"),
        ({"parts": {"vtp": {}, "pooling": {"pruning": "pooling"}}}, "'pooling' must choose in front"),
        ({"model": "vtp-tiny-video"}, "unknown model of vtp-design 'vtp-tiny-video'"),
        ({"limit": 0}, "limit must be from 1"),
        ({"limit": 1001}, "limit must be from 1 to the 1000"),
        ({"keep": []}, "keep must be keep ratios"),
    ],
)
def test_what_vtp_design_refuses(said: dict, sentence: str, tmp_path: Path) -> None:
    with pytest.raises(PruningError, match=sentence):
        conduct("vtp-design", said, tmp_path / "study", Console(quiet=True))
    assert not (tmp_path / "study").exists()
