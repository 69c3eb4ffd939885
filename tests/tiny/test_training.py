"""Training: growing changes nothing, what is shown is labelled right, answers are scored whole, stages go on."""

from __future__ import annotations

import numpy as np
import pytest
import torch

pytest.importorskip("skimage", reason="backgrounds are the photographs of scikit-image")
pytest.importorskip("rich")

from transformers import CLIPModel, LlamaForCausalLM

from vtp_plugin.tiny import train
from vtp_plugin.tiny.fitting import Run
from vtp_plugin.tiny.language import answer_loss, by_task, write_lesson
from vtp_plugin.tiny.missing import whole
from vtp_plugin.tiny.modeling import LLAMA_WIDTH, clip_config, deepen, llama_config
from vtp_plugin.tiny.pool import draw_pool, usable_cores
from vtp_plugin.tiny.prompts import layouts, load_llama_tokenizer
from vtp_plugin.tiny.questions import CHOICES, Question, ask_all
from vtp_plugin.tiny.scenes import GRID, PATCH, SIZE, sample_scene
from vtp_plugin.tiny.store import WEIGHTS
from vtp_plugin.tiny.vision import look, show
from vtp_plugin.tiny.workshop import Workshop


@pytest.fixture(scope="module")
def layout():
    return layouts(load_llama_tokenizer(WEIGHTS))["llava"]


def llama(layers: int) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(llama_config(802, layers)).eval()


def test_a_deeper_model_computes_the_same() -> None:
    shallow, deep = llama(4), llama(8)
    deep.load_state_dict(deepen(shallow.state_dict(), 8))
    ids = torch.randint(0, 800, (2, 30), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(deep(ids).logits, shallow(ids).logits, atol=1e-6, rtol=1e-6)
    learned = deep.model.layers[1].mlp
    assert torch.equal(learned.gate_proj.weight, shallow.model.layers[0].mlp.gate_proj.weight)
    assert not learned.down_proj.weight.any()


def test_a_model_of_the_right_depth_stays_and_others_are_refused() -> None:
    weights = llama(4).state_dict()
    same = deepen(weights, 4)
    assert all(torch.equal(same[name], value) for name, value in weights.items())
    with pytest.raises(ValueError, match="4 layers cannot become 6"):
        deepen(weights, 6)


@pytest.fixture(scope="module")
def clip() -> CLIPModel:
    torch.manual_seed(0)
    return CLIPModel(clip_config(600)).eval()


def test_the_tower_is_transformers_own(clip: CLIPModel) -> None:
    pixels = torch.randn(2, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(1))
    clip.vision_model.set_attn_implementation("eager")
    with torch.no_grad():
        view = look(clip, pixels)
        seen = clip.vision_model(pixels, output_hidden_states=True, output_attentions=True)
    torch.testing.assert_close(view.patches, seen.hidden_states[-2][:, 1:])
    torch.testing.assert_close(view.pooled, seen.pooler_output)
    torch.testing.assert_close(view.attention, seen.attentions[-2].mean(1)[:, 0, 1:])


def test_some_patches_are_those_of_the_whole_picture_before_they_meet(clip: CLIPModel) -> None:
    """All patches in another order give the same; a patch that is missing changes nothing but what is left of it."""
    pixels = torch.randn(2, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(1))
    order = torch.randperm(GRID**2, generator=torch.Generator().manual_seed(2)).expand(2, -1)
    with torch.no_grad():
        straight, shuffled = look(clip, pixels), look(clip, pixels, order)
        few = look(clip, pixels, order[:, :50])
    torch.testing.assert_close(shuffled.patches, straight.patches[:, order[0]], atol=1e-5, rtol=1e-5)
    assert few.patches.shape[1] == 50
    assert not torch.allclose(few.patches, shuffled.patches[:, :50])


def test_pictures_of_other_sizes_know_where_their_patches_are() -> None:
    pixels = torch.zeros(2, 3, SIZE, SIZE)
    pixels[:, :, : SIZE // 2] = 1.0  # the upper half
    sizes = set()
    for seed in range(60):
        shown = show(pixels, np.random.default_rng(seed), blind=0.0, resized=1.0)
        rows, columns = shown.pixels.shape[2] // PATCH, shown.pixels.shape[3] // PATCH
        sizes.add(rows * columns)
        assert shown.place.shape == (2, rows * columns)
        assert (shown.place[0].view(rows, columns).diff(dim=1) >= 0).all()
        assert (shown.place[0].view(rows, columns)[:, 0].diff() >= 0).all()
        light = shown.pixels[0, 0].unfold(0, PATCH, PATCH).unfold(1, PATCH, PATCH).mean((2, 3)).flatten()
        sure = (light - 0.5).abs() > 0.45
        assert torch.equal((light > 0.5)[sure], (shown.place[0] // GRID < GRID // 2)[sure])
    assert min(sizes) < 40
    assert max(sizes) > 200


def test_pictures_are_shown_whole_blind_and_resized_as_often_as_asked() -> None:
    pixels = torch.zeros(1, 3, SIZE, SIZE)
    shown = [show(pixels, np.random.default_rng(seed), blind=0.3, resized=0.3) for seed in range(300)]
    blind = sum(each.seen is not None for each in shown)
    resized = sum(each.pixels.shape != pixels.shape for each in shown)
    assert 60 < blind < 120
    assert 50 < resized < 120
    assert all(torch.equal(each.seen, each.place) for each in shown if each.seen is not None)


def test_every_answer_but_a_caption_is_one_token(layout) -> None:
    encode = layout.tokenizer.encode
    assert all(len(encode(answer, add_special_tokens=False)) == 1 for each in CHOICES.values() for answer in each)


def test_an_answer_of_several_tokens_is_right_when_all_of_it_is(layout) -> None:
    questions = [
        Question("caption", "describe the picture", "star and the digit 7"),
        Question("digit", "what is the digit", "7"),
    ]
    lesson = write_lesson(layout, [questions, questions])
    asked = lesson.kind > 0
    hits = torch.ones(int(asked.sum()))
    assert by_task(hits, asked, lesson) == {"caption": [1.0, 1.0], "digit": [1.0, 1.0]}
    rows, columns = asked.nonzero(as_tuple=True)
    last = ((rows == 1) & (lesson.segment[rows, columns] == 1)).nonzero()[-1]  # </s> of the second caption
    hits[last] = 0.0
    assert by_task(hits, asked, lesson) == {"caption": [1.0, 0.0], "digit": [1.0, 1.0]}


def test_questions_behind_one_picture_do_not_see_each_other(layout) -> None:
    model, rng = llama(2), np.random.default_rng(0)
    questions = [*ask_all(sample_scene("train", 0), rng).values()]
    sight = whole(torch.randn(1, 9, LLAMA_WIDTH, generator=torch.Generator().manual_seed(0)))
    with torch.no_grad():
        together = answer_loss(model, sight, write_lesson(layout, [questions[:2]]))[0]
        alone = [answer_loss(model, sight, write_lesson(layout, [[one]]))[0] for one in questions[:2]]
    assert float(together) == pytest.approx(float(sum(alone)) / 2, rel=1e-5)


def test_a_run_from_the_package_goes_through_its_stages(tmp_path, monkeypatch) -> None:
    """A stage that is called again goes on, and another start changes nothing."""
    run = Run(tmp_path)
    train.start_from_package(run)
    draw_pool(tmp_path, "train", 40)
    began = run.load("shipped")["modules"]
    train.start_from_package(run)
    train.train("sharpen", run, 2)
    train.note_features(run)
    train.train("fit", run, 2)
    train.train("join", run, 2)
    train.train("join", run, 3)
    assert run.load("join")["step"] == 3
    shop = Workshop(run)
    assert shop.features[0].shape == (40, GRID**2, 128)
    own = shop.networks["former_clip"].state_dict()
    assert all(torch.equal(own[name], began[f"clip.{name}"]) for name in own)
    assert not torch.equal(shop.networks["clip"].visual_projection.weight, began["clip.visual_projection.weight"])
    batches = [shop.batch("join", 4, 5) for _ in range(2)]
    assert torch.equal(batches[0].view[0], batches[1].view[0])
    assert usable_cores() >= 1
