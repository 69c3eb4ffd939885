"""Perturbations: the same picture for every strategy, stronger with severity; an unknown one is refused."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from vtp_plugin.errors import PruningError
from vtp_plugin.hosts.lmms_eval.perturb import DISTRACTORS, NOISE, OCCLUSION, PICTURES, Perturbation

pytest.importorskip("skimage")


def picture(side: int = 168, seed: int = 0) -> Image.Image:
    smooth = np.kron(np.random.default_rng(seed).integers(40, 215, (side // 14, side // 14, 3)), np.ones((14, 14, 1)))
    return Image.fromarray(smooth.astype(np.uint8))


def distance(one: Image.Image, other: Image.Image) -> float:
    return float(np.abs(np.asarray(one, float) - np.asarray(other, float)).mean())


@pytest.mark.parametrize("name", PICTURES)
def test_a_picture_is_changed_more_by_a_higher_severity(name: str) -> None:
    changed = [Perturbation(name, severity).picture(picture()) for severity in (1, 2, 3)]
    distances = [distance(picture(), one) for one in changed]
    assert 0 < distances[0] < distances[1] < distances[2]
    assert all(one.size == (168, 168) for one in changed)


@pytest.mark.parametrize("name", PICTURES)
def test_the_same_picture_is_changed_alike_and_another_one_otherwise(name: str) -> None:
    first, again = (Perturbation(name, 2).picture(picture()) for _ in range(2))
    assert np.array_equal(first, again)
    if name != "blur":  # which has no random numbers
        others = [Perturbation(name, 2).picture(picture(seed=seed)) for seed in range(1, 4)]
        changes = [np.asarray(o, int) - np.asarray(picture(seed=s), int) for s, o in enumerate([first, *others])]
        assert not all(np.array_equal(changes[0] != 0, change != 0) for change in changes[1:])


def test_noise_has_the_stated_deviation_and_occlusion_the_stated_share() -> None:
    grey = Image.fromarray(np.full((200, 200, 3), 128, np.uint8))
    noisy = np.asarray(Perturbation("noise", 1).picture(grey), float) / 255
    assert noisy.std() == pytest.approx(NOISE[0], rel=0.02)
    black = Image.new("RGB", (200, 200))
    for severity, share in enumerate(OCCLUSION, 1):
        covered = np.asarray(Perturbation("occlusion", severity).picture(black)).any(-1).mean()
        assert covered == pytest.approx(share, abs=0.005)


@pytest.mark.parametrize(
    ("question", "expected"),
    [
        ("is there a circle", "do you see a circle"),
        ("Is there a dog in the image?", "can you see a dog in this picture?"),
        ("what color is the ring", "which color has the ring"),
        ("how many stars", "what is the number of stars"),
        ("where is the heart", "in which part is the heart"),
        ("what is the digit", "tell me the digit"),
        ("why is it red", "why is it red"),
    ],
)
def test_a_question_is_said_in_other_words(question: str, expected: str) -> None:
    perturbation = Perturbation("paraphrase")
    assert perturbation.question(question) == expected
    assert (perturbation.changed, perturbation.unchanged) == ((1, 0) if expected != question else (0, 1))


def test_distractors_stand_in_front() -> None:
    assert (
        Perturbation("distractor", 2).question("how many stars") == f"{DISTRACTORS[0]} {DISTRACTORS[1]} how many stars"
    )


def test_a_task_shows_and_asks_what_was_changed() -> None:
    task = SimpleNamespace(doc_to_visual=lambda doc: [picture(), "a path"], doc_to_text=lambda doc: "how many stars")
    Perturbation("noise", 3).install(task)
    seen = task.doc_to_visual({})
    assert distance(seen[0], picture()) > 10
    assert seen[1] == "a path"
    assert task.doc_to_text({}) == "how many stars"
    Perturbation("paraphrase").install(task)
    assert task.doc_to_text({}) == "what is the number of stars"


@pytest.mark.parametrize(("text", "sentence"), [("nois:1", "Did you mean 'noise'"), ("noise:4", "must be 1, 2 or 3")])
def test_an_unknown_perturbation_is_refused(text: str, sentence: str) -> None:
    with pytest.raises(PruningError, match=sentence):
        Perturbation.parse(text)
