"""Looking on while a model is pruned, and the gallery of a run."""

from __future__ import annotations

import io
import json
import os
import subprocess
from pathlib import Path
from typing import Any

import families
import numpy as np
import pytest
import torch
import warm
from PIL import Image

from vtp_plugin import get_strategy, prune
from vtp_plugin.errors import PruningError
from vtp_plugin.reporting import gallery, overlays
from vtp_plugin.reporting.figures import kept_figure
from vtp_plugin.reporting.gallery import Recorder
from vtp_plugin.reporting.observations import Observation, Observer, view_of
from vtp_plugin.reporting.views import view
from vtp_plugin.surgery.call import Image as Passing
from vtp_plugin.tiny.inference import answer, load


@pytest.fixture(scope="module")
def tiny() -> tuple[Any, Any]:
    return load()


@pytest.fixture(scope="module")
def scene() -> Image.Image:
    levels = np.random.default_rng(0).integers(0, 255, (12, 12, 3), dtype=np.uint8)
    return Image.fromarray(levels).resize((168, 168), Image.Resampling.NEAREST)


def looked(
    tiny: tuple[Any, Any], scene: Image.Image, spec: str, **fields: Any
) -> tuple[Observation, list[Any], list[Any]]:
    """The look at the scene, and the call's events and decisions."""
    with prune(tiny[0], spec, processor=tiny[1], **fields) as pruned:
        observer, found, calls = Observer(pruned), [], []
        pruned.finished.append(lambda call: (found.extend(observer.observe(call)), calls.append(call)))
        answer(*tiny, scene, "is there a circle")
    return found[0], calls[0].events, calls[0].decisions


@pytest.mark.parametrize("spec", ["atp", "l2", "visionzip", "pooling", "fastv", "l2+fastv", "sparsevlm", "prumerge"])
def test_a_look_says_what_the_events_say(tiny: tuple[Any, Any], scene: Image.Image, spec: str) -> None:
    look, events, _ = looked(tiny, scene, spec)
    kept = events[-1].kept[0]
    assert look.left == len(kept)
    assert look.kept == sorted(kept[kept >= 0].tolist())
    assert (look.grid, look.total) == ((12, 12), 144)


def test_the_unpruned_model_shows_everything(tiny: tuple[Any, Any], scene: Image.Image) -> None:
    look, events, decisions = looked(tiny, scene, "none")
    assert not events
    assert not decisions
    assert look.kept == list(range(144))
    assert look.scores is None
    assert look.into == []


def test_the_picture_is_what_the_processor_made(tiny: tuple[Any, Any], scene: Image.Image) -> None:
    look, *_ = looked(tiny, scene, "l2")
    made = tiny[1].image_processor(scene, do_normalize=False, return_tensors="pt")["pixel_values"][0]
    assert torch.equal(look.pixels, (made * 255).round().byte())


@pytest.mark.parametrize("spec", ["atp", "random", "fastv", "l2"])
def test_the_kept_tokens_have_the_highest_scores(tiny: tuple[Any, Any], scene: Image.Image, spec: str) -> None:
    look, *_ = looked(tiny, scene, spec, keep_ratio=0.25)
    ranked = sorted(range(144), key=lambda i: (-look.scores[i].item(), i))
    assert sorted(ranked[:36]) == look.kept
    assert look.scored_by == spec


def test_scores_of_several_cuts_are_those_of_the_first(tiny: tuple[Any, Any], scene: Image.Image) -> None:
    look, _, decisions = looked(tiny, scene, "pyramiddrop")
    assert len(decisions) > 1
    assert torch.equal(look.scores, decisions[0].selection.scores[0].float())


def test_a_merged_token_went_where_the_method_put_it(tiny: tuple[Any, Any], scene: Image.Image) -> None:
    """VisionZip: the kept contextual token whose key is most similar; pooling: the middle of its 2 x 2 cell."""
    look, *_ = looked(tiny, scene, "pooling", keep_ratio=0.25)
    assert {i for i, to in enumerate(look.into) if to < 0} == set(look.kept)
    for place, to in enumerate(look.into):
        if to >= 0:
            assert (place // 24, place % 12 // 2) == (to // 24, to % 12 // 2)
    look, *_ = looked(tiny, scene, "visionzip", keep_ratio=0.25)
    dropped = set(range(144)) - set(look.kept)
    assert {i for i, to in enumerate(look.into) if to >= 0} == dropped
    assert {to for to in look.into if to >= 0} <= set(look.kept)


def test_chains_of_merges_end_where_the_last_one_ends(tiny: tuple[Any, Any], scene: Image.Image) -> None:
    look, *_ = looked(tiny, scene, "sparsevlm")
    assert all(look.into[to] in (-1, to) for to in look.into if to >= 0)


def test_nothing_is_kept_when_nobody_looks(tiny: tuple[Any, Any], scene: Image.Image) -> None:
    hooks = len(tiny[0].model.vision_tower._forward_pre_hooks)
    calls = []
    with prune(tiny[0], "atp", processor=tiny[1]) as pruned:
        pruned.finished.append(calls.append)
        answer(*tiny, scene, "is there a circle")
    assert calls[0].decisions is None
    looked(tiny, scene, "atp")
    assert len(tiny[0].model.vision_tower._forward_pre_hooks) == hooks


def test_the_view_of_a_picture_of_tiles() -> None:
    index = torch.arange(0)
    tower = type("Tower", (), {"grid": (6, 6), "block": 2})
    assert view_of(Passing(total=9, index=index), tower, 0) == ((3, 3), 0, "")
    said = "the whole picture, one of 4 tiles"
    assert view_of(Passing(total=40, index=index, tiles=4), tower, 0) == ((3, 3), 0, said)
    assert view_of(Passing(total=36, index=index, tiles=4), tower, -1) == ((3, 3), 27, said)
    assert view_of(Passing(total=36, index=index, tiles=4, grid=(12, 3)), tower, -1) == ((3, 3), 27, said)
    assert view_of(Passing(total=4, index=index), tower, 0) is None
    assert view_of(Passing(total=9, index=index, kind="video"), tower, 0) is None


@pytest.mark.parametrize("name", sorted(families.FAMILIES))
def test_every_family_with_a_grid_can_be_looked_at(name: str) -> None:
    family = families.FAMILIES[name]
    inputs, found, calls = family.batch([family.sample(0, 1)]), [], []
    with prune(family.build("sdpa"), "random", keep_ratio=0.5, processor=families.Processor()) as pruned:
        observer = Observer(pruned)
        pruned.finished.append(lambda call: (found.extend(observer.observe(call)), calls.append(call)))
        with torch.no_grad():
            pruned.model(**inputs)
    for look, image in zip(found, calls[0].images, strict=True):
        rows, columns = look.grid
        assert look.left == len(image.index) + image.fixed
        assert not look.scores.isnan().any()
        assert look.pixels.shape[1] * columns == look.pixels.shape[2] * rows  # square patches
        if not look.view:
            assert look.kept == sorted(image.index.tolist())
            assert sorted(look.scores.sort(descending=True).indices[: len(look.kept)].tolist()) == look.kept


# -- the gallery ------------------------------------------------------------------------------------------------------


def test_what_is_written_reads_back(tiny: tuple[Any, Any], scene: Image.Image, tmp_path: Path) -> None:
    environment = {"VTP_GALLERY": str(tmp_path), "VTP_GALLERY_SAMPLES": "2"}
    found: list[Observation] = []
    with prune(tiny[0], "visionzip", processor=tiny[1]) as pruned:
        recorder = Recorder.wanted(pruned, environment)
        looks = recorder.observer.observe
        recorder.observer.observe = lambda call: found.extend(looks(call)) or found[-1:]
        documents = iter([("task", 0), ("task", 0), ("task", 7), ("other", 1)])
        pruned.finished.append(lambda call: recorder.add(call, [next(documents)]))
        for _ in range(4):
            answer(*tiny, scene, "is there a circle")
    recorder.write()
    read = gallery.read(tmp_path)
    assert set(read.documents) == {("task", 0), ("other", 1)}
    shown, look = read.documents["task", 0][0], found[0]
    assert shown.kept.flatten().nonzero()[0].tolist() == look.kept
    assert shown.into.flatten().tolist() == look.into
    spread = look.scores.max() - look.scores.min()
    restored = shown.scores.flatten() * spread.item() + look.scores.min().item()
    assert np.abs(restored - look.scores.numpy()).max() <= spread.item() / 254
    assert len(list((tmp_path / "pictures").iterdir())) == 1  # the same picture, once
    seen = np.array(Image.open(io.BytesIO(read.picture(shown.picture))), dtype=float)
    assert np.abs(seen - look.pixels.permute(1, 2, 0).numpy()).mean() < 20


def test_no_folder_no_recorder(tiny: tuple[Any, Any]) -> None:
    with prune(tiny[0], "l2", processor=tiny[1]) as pruned:
        assert Recorder.wanted(pruned, {}) is None
        with pytest.raises(PruningError, match="VTP_GALLERY_SAMPLES must be a whole number, got 'many'"):
            Recorder.wanted(pruned, {"VTP_GALLERY": "x", "VTP_GALLERY_SAMPLES": "many"})
        assert not pruned.keep_decisions


def test_scores_are_quantised_from_end_to_end() -> None:
    assert gallery.quantised(np.array([1.0, np.nan, 3.0, 2.0], dtype=np.float32)).tolist() == [0, 255, 254, 127]
    assert gallery.quantised(np.full(3, 7.0)).tolist() == [0, 0, 0]


# -- pictures ---------------------------------------------------------------------------------------------------------


def test_the_figure_has_a_row_of_scores_only_if_asked(tiny: tuple[Any, Any], scene: Image.Image) -> None:
    panels = [view(*tiny, scene, "is there a circle", [get_strategy(n)()], n) for n in ("atp", "visionzip", "divprune")]
    plain, scored = kept_figure([panels]), kept_figure([panels], scores=True)
    assert len(plain.axes) == 3
    titles = [axis.get_title() for axis in scored.axes]
    assert titles[3:] == ["scores of atp", "scores of visionzip", "not ranked by one score"]
    merged = sum(to >= 0 for to in panels[1].look.into)
    assert [sum(len(c.get_segments()) for c in axis.collections[:1]) for axis in plain.axes[1:2]] == [merged]


@pytest.mark.slow
def test_the_real_host_writes_a_gallery(tmp_path: Path) -> None:
    command = [*warm.python(), "-m", "lmms_eval", "--model", "llava", "--model_args", "pretrained=vtp-tiny"]
    command += ["--tasks", "vtp_scenes_count,vtp_scenes_digit", "--limit", "3", "--pruning", "visionzip"]
    command += ["--pruning_args", "keep_ratio=0.25", "--log_samples", "--output_path", str(tmp_path / "out")]
    said = {"VTP_GALLERY": str(tmp_path / "gallery"), "VTP_GALLERY_SAMPLES": "2"}
    environment = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", **said}
    ran = subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True, timeout=600)
    assert ran.returncode == 0, ran.stderr[-2000:]
    read = gallery.read(tmp_path / "gallery")
    assert set(read.documents) == {(f"vtp_scenes_{task}", n) for task in ("count", "digit") for n in (0, 1)}
    for (task, number), images in read.documents.items():
        log = next((tmp_path / "out").rglob(f"*samples_{task}.jsonl")).read_text().splitlines()
        line = next(json.loads(one) for one in log if json.loads(one)["doc_id"] == number)
        assert [{"before": i.total, "after": i.left} for i in images] == line["pruning"]["images"]
        assert read.picture(images[0].picture)
    pictures = {images[0].picture for images in read.documents.values()}
    assert len(list((tmp_path / "gallery" / "pictures").iterdir())) == len(pictures) == 2  # tasks share scenes


def test_dropped_patches_are_veiled_and_answers_marked(tiny: tuple[Any, Any], scene: Image.Image) -> None:
    strategies = [get_strategy("l2")()]
    panels = [view(*tiny, scene, "is there a circle", strategies, "l2", target=said) for said in ("yes", "no")]
    figure = kept_figure([panels])
    right, wrong = (axis.get_xlabel() for axis in figure.axes)
    assert {right.split("\n")[1][0], wrong.split("\n")[1][0]} == {"\u2713", "\u2717"}
    picture, veil = (image.get_array() for image in figure.axes[0].images)
    assert np.abs(np.asarray(picture) * 255 - panels[0].look.pixels.permute(1, 2, 0).numpy()).max() < 1  # not darkened
    dropped = np.ones(144, dtype=bool)
    dropped[panels[0].look.kept] = False
    colours = np.asarray(veil).reshape(144, 4)
    assert (colours[dropped] == overlays.VEIL).all()
    assert (colours[~dropped, 3] == 0).all()


# -- a run folder from somebody else ----------------------------------------------------------------------------------


def test_pictures_come_from_inside_the_run_folder_only(tmp_path: Path) -> None:
    secret, run = tmp_path / "secret.jpg", tmp_path / "run"
    secret.write_bytes(gallery.jpeg(torch.zeros(3, 4, 4, dtype=torch.uint8)))
    (run / "pictures").mkdir(parents=True)
    (run / "pictures" / "own.jpg").write_bytes(secret.read_bytes())
    (run / "pictures" / "linked.jpg").symlink_to(secret)
    (run / "pictures" / "text.jpg").write_text("no picture")
    read = gallery.Gallery(folders=[run / "pictures"])
    assert read.picture("own.jpg") == secret.read_bytes()
    for name in ("../../secret.jpg", str(secret), "linked.jpg", "text.jpg", "", "..", "own.jpg\0"):
        assert read.picture(name) is None
    (run / "gallery").symlink_to(tmp_path)
    with pytest.raises(PruningError, match="from inside the run folder only"):
        gallery.read(run / "gallery", run / "pictures")
