"""The embedded model with a merger: what it begins as, what it is shown, that it answers, and that training goes on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from vtp_plugin import config
from vtp_plugin.errors import PruningError
from vtp_plugin.pruning import prune
from vtp_plugin.tiny import checkpoint, testset, train
from vtp_plugin.tiny.checkpoint import resolve
from vtp_plugin.tiny.examining import shipped
from vtp_plugin.tiny.examples import pictures
from vtp_plugin.tiny.fitting import Plan, Run
from vtp_plugin.tiny.language import read, write_lesson
from vtp_plugin.tiny.lowrank import merged
from vtp_plugin.tiny.missing import renumber, whole
from vtp_plugin.tiny.qwen import train as qwen_train
from vtp_plugin.tiny.qwen.folder import HELPFUL, language_weights, learned_weights, qwen_layouts
from vtp_plugin.tiny.qwen.student import Reader, Student, first_tower, nearest, on_axes, patches, shrunk
from vtp_plugin.tiny.scenes import GRID, PATCH
from vtp_plugin.tiny.store import load_weights

NAME, TOKENS = "vtp-tiny-qwen", 64


@pytest.fixture(scope="module")
def model() -> tuple[Any, Any]:
    from vtp_plugin.tiny.inference import load

    return load(NAME)


def conversation(question: str, system: str = "") -> list[dict[str, Any]]:
    content = [{"type": "image"}, {"type": "text", "text": question}]
    first = [{"role": "system", "content": system}] if system else []
    return [*first, {"role": "user", "content": content}]


def inputs(processor: Any, question: str, picture: Any, system: str = "") -> Any:
    text = processor.apply_chat_template(conversation(question, system), add_generation_prompt=True)
    return processor(images=[picture], text=[text], return_tensors="pt")


# -- what it begins as and what it is to say --------------------------------------------------------------------------


def test_the_tower_begins_as_the_embedded_one_and_its_last_block_says_nothing() -> None:
    from transformers import Qwen2VLForConditionalGeneration

    from vtp_plugin.tiny.qwen.folder import qwen_config, qwen_tokenizer

    clip = shipped()[0]["clip"].vision_model
    visual = Qwen2VLForConditionalGeneration(qwen_config(qwen_tokenizer(), 1)).model.visual.eval()
    lacking, unknown = visual.load_state_dict(first_tower(clip), strict=False)
    assert unknown == []
    assert {name.split(".")[0] for name in lacking} == {"merger"}
    hidden = torch.randn(5, 128)
    still = torch.ones(5, 32), torch.zeros(5, 32)  # no rotation
    for block, layer in zip(visual.blocks, [*clip.encoder.layers[:-1], None], strict=True):
        with torch.no_grad():
            found = block(hidden, cu_seqlens=torch.tensor([0, 5]), position_embeddings=still)
            wanted = hidden if layer is None else layer(hidden[None], attention_mask=None)[0]
        torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)


def test_a_patch_embedding_holds_the_layer_norm_behind_it() -> None:
    """For a patch with the usual deviation it is the norm's, without what is added and without positions."""
    clip = shipped()[0]["clip"].vision_model
    kernel = first_tower(clip)["patch_embed.proj.weight"]
    pixels = torch.randn(1, 3, PATCH, PATCH)
    with torch.no_grad():
        found = torch.einsum("dcthw,cthw->d", kernel, pixels[0, :, None].expand(-1, 2, -1, -1))
        plain = clip.embeddings.patch_embedding(pixels).flatten()
        wanted = (plain - plain.mean()) * clip.pre_layrnorm.weight
    torch.testing.assert_close(found / found.norm(), wanted / wanted.norm(), atol=1e-5, rtol=1e-4)


def test_areas_are_averages_of_overlaps() -> None:
    maps = torch.randn(2, GRID**2, 3)
    edges = np.arange(9) * GRID / 8
    inner = np.arange(GRID)
    overlap = np.clip(np.minimum(edges[1:, None], inner + 1) - np.maximum(edges[:-1, None], inner), 0, 1) / 1.5
    weight = torch.from_numpy(overlap).float()
    wanted = torch.einsum("ur,vc,brcd->buvd", weight, weight, maps.unflatten(1, (GRID, GRID))).flatten(1, 2)
    torch.testing.assert_close(shrunk(maps), wanted, atol=1e-5, rtol=1e-5)


def test_the_patch_below_is_that_of_the_middle() -> None:
    order = nearest().view(8, 8, 2, 2)
    for row, column in ((0, 0), (5, 9), (15, 15)):
        found = int(order[row // 2, column // 2, row % 2, column % 2])
        assert found == int((row + 0.5) * GRID / 16) * GRID + int((column + 0.5) * GRID / 16)


def test_things_are_where_they_touch_a_token() -> None:
    labels = torch.zeros(1, 4, GRID**2, dtype=torch.long)
    labels[0, 0, 4 * GRID + 1] = 3
    assert qwen_train.things(labels)[0].nonzero().flatten().tolist() == [2 * 8, 2 * 8 + 1, 3 * 8, 3 * 8 + 1]


# -- the model --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "system"), [("plain", ""), ("helpful", HELPFUL)])
def test_the_prompt_is_what_training_showed(model: tuple[Any, Any], name: str, system: str) -> None:
    _, processor = model
    before, behind = qwen_layouts(processor.tokenizer)[name].split("what is the digit")
    found = inputs(processor, "what is the digit", pictures(1)[0], system)["input_ids"][0].tolist()
    assert found == [*before, *[processor.image_token_id] * TOKENS, *behind]


def test_pictures_are_what_training_showed(model: tuple[Any, Any]) -> None:
    _, processor = model
    shown = pictures(2)
    given = processor.image_processor(shown, return_tensors="pt")
    assert given["image_grid_thw"].tolist() == [[1, 16, 16]] * 2
    images = torch.from_numpy(np.stack([np.asarray(picture) for picture in shown]))
    torch.testing.assert_close(patches(images), given["pixel_values"], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("positions", ["none", "original", "compact"])
def test_the_host_computes_what_training_did(model: tuple[Any, Any], positions: str) -> None:
    """Tower, merger, M-RoPE of all tokens or of those that are left, and the language model: the same logits."""
    whole_model, processor = model
    question = testset.ask(0, *testset.select(4)[0])["digit"]
    picture = pictures(1)[0]
    reader = Reader(whole_model.model.language_model, whole_model.lm_head)
    pupil = Student(reader, torch.nn.ModuleDict({"visual": whole_model.model.visual}))
    given = inputs(processor, question.text, picture)
    spec, fields = ("none", {}) if positions == "none" else ("random", {"keep_ratio": 0.25, "positions": positions})
    kept: list[torch.Tensor] = []
    with torch.no_grad(), prune(whole_model, spec, processor=processor, **fields) as pruned:
        pruned.finished.append(lambda call: kept.extend(image.index for image in call.images))
        found = whole_model(**given, logits_to_keep=1).logits[0, -1]
    with torch.no_grad():
        _, tokens = pupil.look(torch.from_numpy(np.asarray(picture))[None])
        index = (kept[0] if kept else torch.arange(TOKENS))[None]
        sight = renumber(tokens[:, index[0]], index, TOKENS, original=positions != "compact")
        lesson = write_lesson(qwen_layouts(processor.tokenizer)["plain"], [[question]])
        wanted = reader.lm_head(read(reader, on_axes(sight), lesson))[0, -2]  # behind it stands the answer
    assert config.resolve(spec, fields) == [] or len(index[0]) == TOKENS // 4
    torch.testing.assert_close(found, wanted, atol=2e-3, rtol=1e-3)


def test_original_positions_are_a_row_and_a_column() -> None:
    tokens = torch.zeros(1, TOKENS, 1)
    index = torch.tensor([[0, 9, 63]])
    sight = on_axes(renumber(tokens[:, :3], index, TOKENS, original=True))
    assert (sight.place.tolist(), sight.length) == ([[[0, 0, 0]], [[0, 1, 7]], [[0, 1, 7]]], 8)
    sight = on_axes(renumber(tokens[:, :3], index, TOKENS, original=False))
    assert (sight.place.tolist(), sight.length) == ([[[0, 1, 2]]] * 3, 3)
    assert on_axes(whole(tokens)).length == 8


def test_the_language_model_is_the_embedded_one_with_factors(model: tuple[Any, Any]) -> None:
    whole_model, processor = model
    text = merged(language_weights(processor.tokenizer, load_weights("llama")), learned_weights()["factors"])
    state = whole_model.state_dict()
    for name, value in text.items():
        assert torch.equal(state[name.replace("model.", "model.language_model.", 1)].half(), value.half()), name
    assert not torch.equal(
        text["model.layers.0.mlp.up_proj.weight"], load_weights("llama")["model.layers.0.mlp.up_proj.weight"]
    )


def test_it_answers(model: tuple[Any, Any]) -> None:
    """Far above chance in every task, and from the picture."""
    from vtp_plugin.tiny.inference import answers

    whole_model, processor = model
    shown, scenes = pictures(12), testset.select(1000)[:12]
    asked = [testset.ask(index, *scene) for index, scene in enumerate(scenes)]
    share = {}
    for task in asked[0]:
        said = answers(whole_model, processor, shown, [questions[task].text for questions in asked])
        share[task] = np.mean([text.split()[:1] == [q[task].answer] for text, q in zip(said, asked, strict=True)])
    assert np.mean(list(share.values())) > 0.75, share
    assert min(share.values()) > 0.45, share


def test_only_one_layout_is_offered() -> None:
    with pytest.raises(ValueError, match=r"^unknown layout 'llava' of vtp-tiny-qwen\. Available: hf$"):
        resolve(NAME, "llava")


def test_without_weights_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(checkpoint.LEARNED, NAME, ("none.safetensors", "qwen.train"))
    with pytest.raises(
        PruningError, match=r"^vtp-tiny-qwen is not trained yet: python -m vtp_plugin\.tiny\.qwen\.train"
    ):
        resolve(NAME, "hf")


# -- training ---------------------------------------------------------------------------------------------------------


def test_training_runs_and_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train, "POOL", {"validation": 2, "train": 3})
    plan = Plan(steps=2, rate=1e-3, batch=2, warmup=1)
    monkeypatch.setattr(qwen_train, "PLANS", dict.fromkeys(qwen_train.TRAINS, plan))
    monkeypatch.setattr(testset, "SCENES", 4)
    run = ["--out", str(tmp_path), "--device", "cpu"]
    qwen_train.main([*run, *(f"--stage={name}" for name in ("draw", "aim", "distil", "answer"))])
    distilled, before = (Run(tmp_path).load(name)["modules"] for name in qwen_train.TRAINS)
    for name in ("patch_embed.proj.weight", "merger.mlp.0.weight"):
        assert not torch.equal(distilled[f"visual.{name}"], before[f"visual.{name}"])
    qwen_train.main([*run, "--stage", "answer", "--steps", "3"])
    after = Run(tmp_path).load("answer")
    assert after["step"] == 3
    assert any(not torch.equal(before[name], value) for name, value in after["modules"].items())
    images = np.stack([np.asarray(picture) for picture in pictures(2)])
    said = qwen_train.score(qwen_train.trained(Run(tmp_path)), images, list(testset.select(4))[:2], keep=0.5)
    assert set(said) == {"presence", "attribute", "count", "position", "digit", "all"}
