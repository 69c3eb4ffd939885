"""The clips say what they show, tokens go missing in every way, and the video model tells what only time tells."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as parquet
import pytest
import torch
from matrix import FULL
from PIL import Image

pytest.importorskip("skimage", reason="backgrounds are the photographs of scikit-image")
pytest.importorskip("rich")

from vtp_plugin.errors import PruningError
from vtp_plugin.tiny import checkpoint
from vtp_plugin.tiny.checkpoint import resolve
from vtp_plugin.tiny.clips import clip as clips
from vtp_plugin.tiny.clips import missing as clip_missing
from vtp_plugin.tiny.clips import testset as clip_testset
from vtp_plugin.tiny.clips import train as clip_train
from vtp_plugin.tiny.clips.clip import ASKED, FRAMES, SIDES, Clip, read_stays, sample_clip
from vtp_plugin.tiny.clips.missing import LEFT, PATTERNS, Shown
from vtp_plugin.tiny.clips.testset import PARQUET, TASKS, Stored, read
from vtp_plugin.tiny.fitting import Plan, Run
from vtp_plugin.tiny.lowrank import adapt, merged
from vtp_plugin.tiny.modeling import llama_config
from vtp_plugin.tiny.scenes import MIDLINE, NUMBERS, PLATE, SHAPES, SIZE, Scene
from vtp_plugin.tiny.store import CLIP_FACTORS, WEIGHTS, load_weights

pytestmark = pytest.mark.long

ROWS = parquet.read_table(PARQUET).to_pylist()


@cache
def drawn(seed: int) -> Clip:
    return sample_clip("train", seed)


@pytest.fixture
def clip(request: pytest.FixtureRequest) -> Clip:
    return drawn(request.param)


# -- what they show ---------------------------------------------------------------------------------------------------


def things(clip: Clip, time: int) -> dict[str, Any]:
    """What a frame shows, by shape."""
    return {stay.thing.shape: stay.thing for stay in clip.stays if stay.start <= time < stay.stop}


def test_a_seed_is_one_clip_and_splits_share_none() -> None:
    first, again = sample_clip("test", 5), sample_clip("test", 5)
    assert first == again
    assert np.array_equal(first.frames(), again.frames())
    assert len({sample_clip(split, 5).stays for split in ("train", "validation", "test")}) == 3


@pytest.mark.parametrize("clip", range(8), indirect=True)
def test_frames_are_scenes_and_noise(clip: Clip) -> None:
    """Every frame is the picture of a scene with the things that are there, up to the grain."""
    frames = clip.frames()
    assert frames.shape == (FRAMES, SIZE, SIZE, 3)
    for time, frame in enumerate(frames):
        drawn = np.asarray(Scene(clip.ground, tuple(things(clip, time).values())).render()).astype(float)
        inside = (drawn > 20) & (drawn < 235)  # where the noise is not cut off
        error = (frame - drawn)[inside]
        assert abs(error.mean()) < 0.1
        assert abs(error.std() - clips.NOISE) < 0.1


@pytest.mark.parametrize("clip", range(40), indirect=True)
def test_answers_are_what_the_frames_show(clip: Clip) -> None:
    """From the shapes and places of all frames alone."""
    shown = [things(clip, time) for time in range(FRAMES)]
    places = [{shape: (thing.x, thing.y) for shape, thing in frame.items()} for frame in shown]
    (came,) = set(places[-1]) - set(places[0])
    (went,) = set(places[0]) - set(places[-1])
    (moved,) = {s for s in SHAPES if len({frame[s] for frame in places if s in frame}) > 1}
    happens = [time for time in range(1, FRAMES) if places[time] != places[time - 1]]
    moves = sum(places[time][moved] != places[time - 1][moved] for time in range(1, FRAMES))
    before, after = places[happens[0] - 1], places[happens[0]]
    at = next((before.get(shape) or after[shape])[0] for shape in SHAPES if before.get(shape) != after.get(shape))
    said = {task: question.answer for task, question in clip.questions().items()}
    digit = str(shown[0][PLATE].digit)
    assert said == {"came": came, "went": went, "moved": moved, "moves": NUMBERS[moves - 1], "digit": digit} | {
        "first": SIDES[at + 18 > SIZE / 2]  # things are 28 to 36 wide and keep clear of the middle
    }
    assert len(happens) == moves + 2  # one change at a time


def test_a_clip_runs_backwards() -> None:
    clip = drawn(1)
    turned = clip.backwards()
    assert (turned.came, turned.went, turned.moved, turned.moves) == (clip.went, clip.came, clip.moved, clip.moves)
    assert all(things(turned, time) == things(clip, FRAMES - 1 - time) for time in range(FRAMES))
    assert turned.backwards() == clip


@pytest.mark.parametrize("clip", range(20), indirect=True)
def test_a_clip_at_other_times_shows_its_own_frames(clip: Clip) -> None:
    other, order = clip.retimed(np.random.default_rng(clip.grain))
    assert all(things(other, time) == things(clip, int(order[time])) for time in range(FRAMES))
    asked, before = other.questions(), clip.questions()
    assert asked == before  # the order of what happens is the same, and so is every answer
    assert len(other.changes) == len(clip.changes)


@pytest.mark.parametrize("clip", range(20), indirect=True)
def test_an_excerpt_shows_one_change(clip: Clip) -> None:
    part, order = clip.excerpt(np.random.default_rng(clip.grain))
    assert all(things(part, time) == things(clip, int(order[time])) for time in range(FRAMES))
    assert len(part.changes) == 1
    what, first, digit = part.one_change()
    assert what.answer == getattr(clip, what.task)
    assert (first.answer, digit.answer) == (part.first, str(clip.digit))


@pytest.mark.parametrize("clip", range(40), indirect=True)
def test_no_frame_tells_by_itself(clip: Clip) -> None:
    """Four shapes at the beginning, four at the end; what came and what went are on opposite sides."""
    assert len(things(clip, 0)) == len(things(clip, FRAMES - 1)) == 5  # with the plate
    side = {shape: stays[0].side for shape, stays in clip.of_shape.items()}
    assert side[clip.came] != side[clip.went]
    assert {stay.side for stay in clip.of_shape[clip.moved]} == {side[clip.moved]}


@pytest.mark.parametrize("clip", range(40), indirect=True)
def test_nothing_is_ever_where_something_was(clip: Clip) -> None:
    for index, stay in enumerate(clip.stays):
        assert min(stay.thing.box) >= 0
        assert max(stay.thing.box) <= SIZE
        assert min(abs(value - SIZE / 2) for value in stay.thing.center) >= MIDLINE
        assert not any(stay.thing.overlaps(other.thing) for other in clip.stays[:index])
        same = clip.of_shape[stay.thing.shape][0].thing
        assert stay.thing == replace(same, x=stay.thing.x, y=stay.thing.y)


def test_the_documents_are_the_test_clips() -> None:
    assert len(ROWS) == clip_testset.CLIPS >= 200
    for index in (0, 1, 2, 299):
        row, clip = ROWS[index], read(ROWS[index])
        assert clip == sample_clip("test", row["clip"], Stored(row["ground"]))
        asked = clip.questions()
        asked["which"] = asked[clips.VERBS[index % 3]]
        for task in TASKS:
            assert (row[f"{task}_question"], row[f"{task}_answer"]) == (asked[task].text, asked[task].answer)


@pytest.mark.parametrize(("task", "choices"), [("moves", 3), ("first", 2)])
def test_answers_are_balanced(task: str, choices: int) -> None:
    answers = [row[f"{task}_answer"] for row in ROWS]
    assert {answers.count(answer) for answer in answers} == {len(ROWS) // choices}
    assert ASKED[task][1] == 1 / choices


def test_a_clip_is_read_as_it_was_written() -> None:
    assert read_stays(json.loads(json.dumps(drawn(3).as_json()))) == drawn(3).stays


def test_the_addition_is_small() -> None:
    files = (WEIGHTS / CLIP_FACTORS, *clip_testset.FOLDER.iterdir())
    assert sum(file.stat().st_size for file in files if file.is_file()) < 2e6


# -- tokens that are missing ------------------------------------------------------------------------------------------


def shown(seed: int = 0, b: int = 3, n: int = 36, d: int = 8) -> Shown:
    generator = torch.Generator().manual_seed(seed)
    tokens, attention = torch.randn(b, FRAMES * n, d, generator=generator), torch.rand(b, FRAMES * n)
    return Shown(tokens, attention, (attention > 0.7).float())


@pytest.mark.parametrize("name", PATTERNS)
@pytest.mark.parametrize("share", LEFT[[0, 5, 9]])
def test_every_pattern_leaves_tokens_in_order(name: str, share: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clip_missing, "PATTERNS", {name: PATTERNS[name]})
    count = round(288 * share)
    index = clip_missing.draw(shown(), count, np.random.default_rng(1))
    assert index.shape == (3, count)
    assert (index.diff(dim=1) > 0).all()
    assert 0 <= int(index.min()) <= int(index.max()) < 288


def test_patterns_of_time() -> None:
    batch, rng = shown(), np.random.default_rng(0)
    whole = PATTERNS["frames"](batch, rng).topk(2 * 36).indices // 36
    assert all(len(set(row.tolist())) == 2 for row in whole)
    tubes = PATTERNS["places"](batch, rng).topk(3 * FRAMES).indices % 36
    assert all(len(set(row.tolist())) == 3 for row in tubes)
    a, b = batch.tokens[1, 36 + 7], batch.tokens[1, 7]
    change = PATTERNS["most changed"](batch, rng)[1, 36 + 7]
    assert float(change) == pytest.approx(1 - float(a @ b / a.norm() / b.norm()), abs=1e-5)


def test_positions_are_the_whole_clips_or_counted_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clip_missing, "WHOLE", 0.0)
    found = set()
    for seed in range(30):
        sight, index = clip_missing.some_missing(shown(), np.random.default_rng(seed))
        original = torch.equal(sight.place, index) and sight.length == 288
        anew = torch.equal(sight.place[0], torch.arange(index.shape[1])) and sight.length == index.shape[1]
        assert original or anew
        found.add(original)
    assert found == {True, False}


# -- training ---------------------------------------------------------------------------------------------------------


def test_merged_factors_compute_the_same() -> None:
    from transformers import LlamaForCausalLM

    torch.manual_seed(0)
    plain, adapted = (LlamaForCausalLM(llama_config(60, 2)).eval() for _ in range(2))
    adapted.load_state_dict(plain.state_dict())
    ids = torch.randint(0, 60, (2, 9))
    beside = adapt(adapted, 4)
    with torch.no_grad():
        torch.testing.assert_close(adapted(ids).logits, plain(ids).logits, rtol=0, atol=0)  # zero at first
        for name, value in beside.named_parameters():
            value.normal_(std=0.1 if name.endswith("up") else 0.2)
        changed = adapted(ids).logits
        plain.load_state_dict(merged(plain.state_dict(), beside.state_dict()))
        torch.testing.assert_close(plain(ids).logits, changed, atol=1e-4, rtol=1e-4)
    assert (changed - LlamaForCausalLM(llama_config(60, 2))(ids).logits).abs().max() > 0.01
    assert [name for name, value in adapted.named_parameters() if value.requires_grad] == []


@pytest.mark.parametrize("clip", range(4), indirect=True)
def test_news_is_where_something_comes_or_leaves(clip: Clip) -> None:
    there, news = clip_train.labels(clip)
    assert there.shape == news.shape == (FRAMES, 36)
    assert not news[0].any()
    for time in range(1, FRAMES):
        before, after = things(clip, time - 1), things(clip, time)
        said = set(news[time][news[time] > 0].tolist())
        new = {1 + SHAPES.index(s) for s in SHAPES if s in after and after[s] != before.get(s)}
        old = {9 + SHAPES.index(s) for s in SHAPES if s in before and before[s] != after.get(s)}
        assert new <= said <= new | old  # what comes hides what leaves the same token


def test_training_runs_and_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clip_train, "POOL", {"validation": 3, "train": 4})
    monkeypatch.setattr(clip_train, "PLAN", Plan(steps=2, rate=1e-3, batch=2, warmup=1))
    run = ["--out", str(tmp_path), "--device", "cpu"]
    clip_train.main([*run, "--stage", "draw", "--stage", "train", "--stage", "test"])
    before = Run(tmp_path).load(clip_train.STAGE)["modules"]
    clip_train.main([*run, "--stage", "train", "--steps", "3"])
    after = Run(tmp_path).load(clip_train.STAGE)
    assert after["step"] == 3
    assert any(not torch.equal(before[name], value) for name, value in after["modules"].items())


# -- the model --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def video_model() -> tuple[Any, Any]:
    from vtp_plugin.tiny.inference import load

    return load("vtp-tiny-video")


def prompt(processor: Any, question: str) -> str:
    content = [{"type": "video"}, {"type": "text", "text": question}]
    return processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)


def ask(model: Any, processor: Any, asked: list[tuple[np.ndarray, str]]) -> list[str]:
    """Greedy answers to questions about frames, as many at once."""
    texts = [prompt(processor, question) for _, question in asked]
    frames = [[Image.fromarray(frame) for frame in shown] for shown, _ in asked]
    inputs = processor(text=texts, videos=frames, padding=True, padding_side="left", return_tensors="pt")
    with torch.inference_mode():
        ids = model.generate(**inputs.to(model.device, model.dtype), max_new_tokens=4, do_sample=False)
    said = processor.tokenizer.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return [text.strip() for text in said]


def test_the_prompt_is_what_training_showed(video_model: tuple[Any, Any]) -> None:
    _, processor = video_model
    before, behind = clip_train.layout().split("left or right first")
    frames = [Image.fromarray(frame) for frame in drawn(0).frames()]
    inputs = processor(text=[prompt(processor, "left or right first")], videos=[frames], return_tensors="pt")
    video = [processor.tokenizer.convert_tokens_to_ids("<video>")] * (FRAMES * 36)
    assert inputs["input_ids"][0].tolist() == [*before, *video, *behind]


def test_only_the_language_model_and_the_projector_differ(video_model: tuple[Any, Any]) -> None:
    model, _ = video_model
    tower = {name.removeprefix("vision_model."): value for name, value in load_weights("clip").items()}
    state = model.model.vision_tower.state_dict()
    same = [name for name in state if torch.equal(state[name].half(), tower[name.removeprefix("vision_model.")])]
    assert len(same) == len(state)


def test_only_one_layout_is_offered() -> None:
    with pytest.raises(ValueError, match=r"^unknown layout 'llava' of vtp-tiny-video\. Available: hf$"):
        resolve("vtp-tiny-video", "llava")


def test_without_factors_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(checkpoint.LEARNED, "vtp-tiny-video", ("none.safetensors", "clips.train"))
    with pytest.raises(
        PruningError, match=r"^vtp-tiny-video is not trained yet: python -m vtp_plugin\.tiny\.clips\.train"
    ):
        resolve("vtp-tiny-video", "hf")


def test_time_is_what_it_answers_from(video_model: tuple[Any, Any]) -> None:
    """Far above what the question, the last frame or shuffled ones give away; it has not learnt what was first."""
    right: dict[tuple[str, str], list[bool]] = {}
    for row in ROWS[: 40 if FULL else 20]:
        frames, rng = read(row).frames(), np.random.default_rng(row["clip"])
        shown = {"in time": frames, "last": frames[[-1] * FRAMES], "shuffled": frames[rng.permutation(FRAMES)]}
        asked = [(way, task) for way in shown for task in ("which", "moves")]
        said = ask(*video_model, [(shown[way], row[f"{task}_question"]) for way, task in asked])
        for case, answer in zip(asked, said, strict=True):
            right.setdefault(case, []).append(answer == row[f"{case[1]}_answer"])
    share = {case: sum(hits) / len(hits) for case, hits in right.items()}
    assert share["in time", "which"] > 0.8, share
    assert share["in time", "which"] > share["shuffled", "which"] + 0.25, share
    assert share["in time", "which"] > share["last", "which"] + 0.5, share
    assert share["in time", "moves"] > share["last", "moves"] + 0.1, share
