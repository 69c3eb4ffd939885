"""Pictures are prepared as the model's own image processor does: what is judged is what the model would see."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import checkpoints
import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from torch import Tensor

from vtp_plugin import PruningStrategy, Selection, Stage, VisualTokens, prune
from vtp_plugin.cli import calibrate
from vtp_plugin.errors import PruningError
from vtp_plugin.hosts.transformers.preparing import DEFAULT, prepared, presets

CLIP, BLACK = (122, 116, 104), (0, 0, 0)


def picture(width: int = 120, height: int = 90, seed: int = 0) -> Image.Image:
    levels = np.random.default_rng(seed).integers(0, 256, (height // 6, width // 6, 3), dtype=np.uint8)
    return Image.fromarray(levels).resize((width, height), Image.Resampling.BICUBIC)


@dataclass(kw_only=True)
class Watching(PruningStrategy):
    """Keeps every patch and remembers what it was shown."""

    name = "watching"
    paper = "none"
    stage = Stage.PIXELS
    needs = ("pixels",)
    budgeted = False
    shown: list[Tensor] = field(default_factory=list)

    def select(self, visual: VisualTokens) -> Selection:
        self.shown += [row.cpu() for row in visual.pixels]
        return Selection.everything(visual.index)


FAMILIES = {
    key: host
    for key, host in checkpoints.HOSTS.items()
    if key not in ("llava-1.5", "llava-1.6", "gemma4", "mistral3_vl", "qwen3_vl-A3B")
}


@pytest.fixture
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    checkpoints.HOSTS[request.param].build(tmp_path)
    return tmp_path


@pytest.mark.slow
@pytest.mark.parametrize("folder", FAMILIES, indirect=True)
@pytest.mark.parametrize("size", [(120, 90), (40, 100)], ids=str)
def test_what_is_judged_is_what_the_model_is_shown(folder: Path, size: tuple[int, int]) -> None:
    """A strategy inside the model, called with what its whole processor makes of words and a picture."""
    model = transformers.AutoModelForImageTextToText.from_pretrained(folder).eval()
    processor, seen = transformers.AutoProcessor.from_pretrained(folder), picture(*size)
    said = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what"}]}]
    text = processor.apply_chat_template(said, add_generation_prompt=True)
    watching = Watching()
    with prune(model, watching, processor=processor), torch.no_grad():
        model(**processor(text=text, images=[seen], return_tensors="pt"))
    views = prepared(str(folder))(seen)
    assert len(views) == len(watching.shown) > 0
    for view, shown in zip(views, watching.shown, strict=True):
        assert view.pixels[0].equal(shown)
        assert view.index.shape[1] == view.grid[0] * view.grid[1]


@pytest.mark.parametrize("size", [(120, 90), (61, 200), (77, 77)], ids=str)
def test_the_default_pads_as_the_authors_package_does(size: tuple[int, int]) -> None:
    process_images = pytest.importorskip("llava.mm_utils").process_images
    settings = {"size": {"shortest_edge": 336}, "crop_size": {"height": 336, "width": 336}}
    processor = transformers.CLIPImageProcessor(**settings)
    values = process_images([picture(*size)], processor, SimpleNamespace(image_aspect_ratio="pad"))
    mean, std = (torch.tensor(value).view(3, 1, 1) for value in (processor.image_mean, processor.image_std))
    levels = ((values[0] * std + mean) * 255).round().to(torch.uint8)
    (view,) = prepared(DEFAULT)(picture(*size))
    assert view.grid == (24, 24)
    for number in (0, 25, 300, 575):
        row, column = divmod(number, 24)
        assert view.pixels[0, number].equal(levels[:, 14 * row : 14 * row + 14, 14 * column : 14 * column + 14])


def test_the_authors_checkpoints_are_prepared_by_their_package(tmp_path: Path) -> None:
    process_images = pytest.importorskip("llava.mm_utils").process_images
    checkpoints.HOSTS["llava-1.6"].build(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    processor = transformers.CLIPImageProcessor.from_pretrained(config["mm_vision_tower"])
    tiles = process_images([picture(200, 90)], processor, SimpleNamespace(**config))[0]
    views = prepared(str(tmp_path))(picture(200, 90))
    assert len(views) == len(tiles) > 1
    assert {view.grid for view in views} == {(12, 12)}
    (padded,) = prepared("vtp-tiny")(picture(200, 90))
    assert padded.pixels[0, 0, :, 0, 0].tolist() == list(CLIP)


@pytest.mark.parametrize(
    ("name", "views", "grid", "side"),
    [
        ("llava-1.5", 1, (24, 24), 14),
        ("llava-1.5-hf", 1, (24, 24), 14),
        ("clip-224", 1, (16, 16), 14),
        ("llava-1.6", 3, (24, 24), 14),
        ("llava-onevision", 7, (27, 27), 14),  # 1152 x 768
        ("qwen2.5-vl", 1, (14, 29), 28),  # 392 x 812
        ("qwen3-vl", 1, (12, 25), 32),  # 384 x 800
    ],
)
def test_every_preset_makes_what_its_model_would(name: str, views: int, grid: tuple[int, int], side: int) -> None:
    found = prepared(name)(picture(800, 400))
    assert len(found) == views
    assert {view.grid for view in found} == {grid}
    assert {view.pixels.shape[-1] for view in found} == {side}


def test_the_table_of_presets_is_the_one_that_is_tested_and_offered() -> None:
    named = {mark.args[1][n][0] for mark in test_every_preset_makes_what_its_model_would.pytestmark for n in range(7)}
    assert named == set(presets())
    options = calibrate.command.__annotations__["processor"]
    assert all(f"{name}" in options for name in presets())
    assert DEFAULT in presets()


@pytest.mark.parametrize(
    ("name", "color"), [("llava-1.5", CLIP), ("llava-1.5-hf", None), ("llava-1.6", BLACK), ("qwen2.5-vl", None)]
)
def test_the_colour_that_is_added_is_found(name: str, color: tuple[int, int, int] | None) -> None:
    assert prepared(name).padding == color


def test_another_side_of_a_preset() -> None:
    (view,) = prepared("llava-1.5", size=168, patch=28)(picture())
    assert view.grid == (6, 6)
    assert view.pixels.shape == (1, 36, 3, 28, 28)


@pytest.mark.parametrize(
    ("name", "sides", "sentence"),
    [
        ("llava-15", {}, "unknown processor 'llava-15'. Did you mean 'llava-1.5'"),
        ("qwen2.5-vl", {"size": 224}, "presets of one square, not for 'qwen2.5-vl'"),
        ("vtp-tiny", {"patch": 7}, "presets of one square, not for 'vtp-tiny'"),
        ("llava-1.5", {"size": 0}, "a patch has at least 1 pixel"),
        ("llava-1.5", {"patch": 0}, "a patch has at least 1 pixel"),
        ("llava-1.5", {"size": 5000}, "a patch has at least 1 pixel"),
    ],
)
def test_bad_names_and_sides_are_one_sentence(name: str, sides: dict[str, int], sentence: str) -> None:
    with pytest.raises(PruningError, match=sentence.replace(".", r"\.")):
        prepared(name, **sides)


def test_folders_that_hold_no_processor(tmp_path: Path) -> None:
    with pytest.raises(PruningError, match="holds no image processor that can be loaded"):
        prepared(str(tmp_path))
    (tmp_path / "preprocessor_config.json").write_text("{")
    with pytest.raises(PruningError, match="holds no image processor that can be loaded"):
        prepared(str(tmp_path))


def test_a_processor_without_its_model_has_to_know_its_patches(tmp_path: Path) -> None:
    sizes = {"patch_size": 4, "merge_size": 2, "temporal_patch_size": 2}
    transformers.Qwen2VLImageProcessor(**sizes).save_pretrained(tmp_path / "qwen")
    (view,) = prepared(str(tmp_path / "qwen"))(picture())
    assert view.pixels.shape[-1] == 8
    transformers.CLIPImageProcessor().save_pretrained(tmp_path / "clip")
    with pytest.raises(PruningError, match="does not say what a patch is"):
        prepared(str(tmp_path / "clip"))


@pytest.mark.parametrize("folder", ["mistral3_vl"], indirect=True)
def test_a_family_without_a_pixels_stage_is_refused(folder: Path) -> None:
    with pytest.raises(PruningError, match="has no pixels stage"):
        prepared(str(folder))
