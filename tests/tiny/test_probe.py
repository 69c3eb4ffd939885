"""The probe: it reads sets, its questions and answers are those of the scenes, and its table's parts add up."""

from __future__ import annotations

import numpy as np
import pytest
import torch

pytest.importorskip("skimage", reason="backgrounds are the photographs of scikit-image")
pytest.importorskip("rich")

from vtp_plugin.tiny import probe, train
from vtp_plugin.tiny.examples import pictures
from vtp_plugin.tiny.fitting import Plan, Run
from vtp_plugin.tiny.pool import draw_pool
from vtp_plugin.tiny.questions import TASKS, ask_all
from vtp_plugin.tiny.scenes import sample_scene
from vtp_plugin.tiny.testset import ask, select


def test_different_questions_are_different_words_and_answers_come_back() -> None:
    seen = {}
    for seed in range(150):
        for question in ask_all(sample_scene("train", seed), np.random.default_rng(seed)).values():
            assert probe.SAID[int(probe.encode([[question]])[1])] == question.answer
            assert seen.setdefault(tuple(sorted(probe.words(question))), question.text) == question.text


def test_the_reader_knows_no_order() -> None:
    torch.manual_seed(0)
    reader, tokens = probe.Reader().eval(), torch.randn(2, 20, probe.WIDTH)
    asked, _ = probe.encode(
        [list(ask_all(sample_scene("train", seed), np.random.default_rng(0)).values()) for seed in (0, 1)]
    )
    order = torch.randperm(20)
    with torch.no_grad():
        torch.testing.assert_close(reader(tokens, asked), reader(tokens[:, order], asked), atol=1e-5, rtol=1e-5)


def test_the_probe_sees_what_the_language_model_sees(tmp_path) -> None:
    """Of none all tokens, of a method those that it keeps; both beside the model's own answers."""
    run = Run(tmp_path)
    train.start_from_package(run)
    draw_pool(tmp_path, "train", 30)
    reader = probe.learn(run, lambda shop, features: shop.networks["projector"](features), Plan(2, 1e-3, 4))
    scenes = select()[:2]
    whole = probe.examine(reader, "none", {}, scenes)
    half = probe.examine(reader, "stride", {"keep_ratio": 0.5}, scenes)
    assert (whole["tokens"], half["tokens"]) == (144, 72)
    model, processor = probe.load()
    asked = ask(0, *scenes[0])["presence"].text
    _, tokens = probe.seen_by(model, processor, pictures(1)[0], asked)
    pixels = processor(images=pictures(1)[0], text="USER: <image>", return_tensors="pt").pixel_values
    with torch.no_grad():
        features = model.get_image_features(pixels).pooler_output[0]
    torch.testing.assert_close(tokens, features, atol=1e-5, rtol=1e-5)
    made = probe.table({"scenes": 2, "rows": {"none": whole, "stride 0.5": half}})
    for row in made.rows:
        lost, information, shift = map(float, row[4:7])
        assert lost == pytest.approx(information + shift, abs=0.11)
    assert set(whole["model"]) == set(TASKS)
