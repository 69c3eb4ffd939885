"""The scenes say what they show: labels, boxes, questions and captions agree, and the splits never meet."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

pytest.importorskip("skimage", reason="backgrounds are the photographs of scikit-image")

import itertools

from vtp_plugin.tiny.photos import PHOTOS, REGIONS, load
from vtp_plugin.tiny.questions import (
    CHOICES,
    LOOKALIKES,
    ask_all,
    ask_eight,
    ask_presence,
    caption_part,
    caption_scene,
    facts,
)
from vtp_plugin.tiny.scenes import COLORS, GRID, MIDLINE, NUMBERS, PATCH, PLATE, SHAPES, SIZE, sample_scene
from vtp_plugin.tiny.testset import PARQUET, ask, rows, select

SPLITS = ("train", "validation", "test")
SCENES = [sample_scene("train", seed) for seed in range(60)]


def test_a_seed_is_one_scene():
    first, again = sample_scene("test", 5), sample_scene("test", 5)
    assert first == again
    assert np.array_equal(np.asarray(first.render()), np.asarray(again.render()))
    assert first.render().size == (SIZE, SIZE)


def test_splits_share_no_scene_and_no_background():
    edges = sorted(REGIONS.values())
    assert all(left[1] <= right[0] for left, right in itertools.pairwise(edges))
    assert len({sample_scene(split, 7).things for split in SPLITS}) == 3
    for split in SPLITS:
        for crop in (sample_scene(split, seed).background for seed in range(60)):
            width = load(crop.file).width
            left, right = (round(edge * width) for edge in REGIONS[split])
            assert left <= crop.x
            assert crop.x + crop.side <= right


def test_every_photograph_is_there_with_its_terms():
    assert all(load(photo.file).mode == "RGB" and photo.source and photo.licence for photo in PHOTOS)


@pytest.mark.parametrize("scene", SCENES[:20])
def test_things_keep_apart_and_inside(scene):
    for index, thing in enumerate(scene.things):
        assert min(thing.box) >= 0
        assert max(thing.box) <= SIZE
        assert min(abs(value - SIZE / 2) for value in thing.center) >= MIDLINE
        assert not any(thing.overlaps(other, gap=0) for other in scene.things[index + 1 :])


@pytest.mark.parametrize("scene", SCENES[:20])
def test_a_scene_has_one_plate_one_to_four_counted_and_others_once(scene):
    assert [thing.shape for thing in scene.things].count(PLATE) == 1
    assert 1 <= scene.counts[scene.counted] <= len(NUMBERS)
    assert 1 <= len(scene.counts) - 1 <= 3
    assert all(number == 1 for shape, number in scene.counts.items() if shape != scene.counted)


@pytest.mark.parametrize("scene", SCENES[:20])
def test_patch_labels_match_the_boxes(scene):
    labels = scene.patch_labels()
    for thing in scene.things:
        column, row = (int(value // PATCH) for value in thing.center)
        under = row * GRID + column
        assert labels.center[under]
        assert labels.shape[under] == 1 + (*SHAPES, PLATE).index(thing.shape)
        assert labels.color[under] == (1 + list(COLORS).index(thing.color) if thing.color else 0)
        assert labels.digit[under] == (0 if thing.digit is None else 1 + thing.digit)
    assert labels.center.sum() == len(scene.things)


def test_the_picture_shows_the_things():
    """A disc's centre has its colour; the rest of the picture is the background."""
    scene = next(scene for scene in SCENES if "circle" in scene.unique)
    thing, picture = scene.unique["circle"], np.asarray(scene.render())
    x, y = (int(value) for value in thing.center)
    assert np.abs(picture[y, x].astype(int) - thing.tint).max() <= 2
    free = np.ones((SIZE, SIZE), bool)
    for x0, y0, x1, y1 in (thing.box for thing in scene.things):
        free[y0:y1, x0:x1] = False
    assert np.array_equal(picture[free], np.asarray(scene.background.render(SIZE))[free])


def test_questions_are_true_and_end_with_the_word_that_is_asked_for():
    rng = np.random.default_rng(0)
    for scene in SCENES:
        for question in ask_eight(scene, rng):
            word = question.text.split()[-1]
            assert word.isalpha()
            assert question.answer in CHOICES[question.task]
            if question.task == "presence":
                assert (question.answer == "yes") == (word in scene.counts)
            if question.task in ("attribute", "position"):
                assert question.answer in (scene.unique[word].color, scene.unique[word].corner)


def test_hard_negatives_ask_for_a_lookalike():
    rng = np.random.default_rng(0)
    for scene in SCENES:
        word = ask_presence(scene, rng, present=False, hard=True).text.split()[-1]
        available = [shape for shape in scene.counts if LOOKALIKES[shape] not in scene.counts]
        assert word not in scene.counts
        assert not available or LOOKALIKES[word] in scene.counts


def test_answers_are_balanced():
    answers = {task: Counter() for task in CHOICES}
    rng = np.random.default_rng(0)
    for seed in range(600):
        for task, question in ask_all(sample_scene("validation", seed), rng).items():
            answers[task][question.answer] += 1
    for task, choices in CHOICES.items():
        assert set(answers[task]) == set(choices)
        assert max(answers[task].values()) < 1.6 * 600 / len(choices)


def test_captions_are_true():
    rng = np.random.default_rng(0)
    for scene in SCENES:
        for caption in (caption_scene(scene, rng), caption_part(scene, rng)):
            assert set(caption.claims) <= facts(scene)


def test_the_shipped_test_set_is_the_generator_s():
    datasets = pytest.importorskip("datasets")
    shipped = datasets.Dataset.from_parquet(str(PARQUET)).remove_columns("image").to_dict()
    chosen = select()
    assert shipped["scene"] == [seed for seed, _ in chosen]
    assert len(chosen) == 1000
    assert Counter(shipped["presence_answer"]) == {"yes": len(chosen) // 2, "no": len(chosen) // 2}
    assert set(Counter(shipped["count_answer"]).values()) == {len(chosen) // len(NUMBERS)}
    for index, (seed, scene) in enumerate(chosen):
        for task, question in ask(index, seed, scene).items():
            assert shipped[f"{task}_question"][index] == question.text
            assert shipped[f"{task}_answer"][index] == question.answer


def test_a_row_is_a_picture_and_five_questions():
    first = rows(4)[0]
    assert first["image"]["bytes"][:2] == b"\xff\xd8"
    assert {key.split("_")[0] for key in first} == {"scene", "image", "caption", *CHOICES}
