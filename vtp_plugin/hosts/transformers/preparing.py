"""Pictures as a model's own image processor prepares them: what a strategy of the pixels stage sees of each.

A processor is named by a preset (plugin_configs/processors.yaml, nothing is downloaded), by `vtp-tiny`, or by the
folder of a checkpoint, whose image processor is loaded; of the model itself only the shape is made, without weights, so
that the family's adapter says what a patch is, and whether the family has a pixels stage.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vtp_plugin import files, plugins, settings
from vtp_plugin.adapter import find_adapter
from vtp_plugin.errors import PruningError, one_line, unknown
from vtp_plugin.hosts.transformers.checkpoints import TOWER, configuration
from vtp_plugin.hosts.transformers.zero_shot import opened
from vtp_plugin.stages import Stage
from vtp_plugin.surgery.pixels import Pixels, laid_out, patches, squares
from vtp_plugin.tiny import checkpoint
from vtp_plugin.tokens import VisualTokens

DEFAULT = "llava-1.5"
LARGEST = 4096  # pixels of a side
Color = tuple[int, int, int]
Images = Callable[[Any], Mapping[str, Any]]  # PIL picture in RGB -> what the model is given


@dataclass(frozen=True)
class Preparation:
    """How one model's pictures become patches."""

    name: str
    images: Images
    pixels: Pixels  # back from normalised values to levels
    patch: int  # pixels of a side
    square: int = 1  # patches of a side that are one token, and are judged together

    def __call__(self, picture: Any) -> list[VisualTokens]:
        """What is judged of a picture (PIL, or a path), one entry per tile: `pixels` [1, N, 3, p, p] uint8.

        PruningError for a processor whose pictures are of a shape that is not known here.
        """
        made = self.images(opened(picture))
        values = torch.as_tensor(made["pixel_values"])
        if "image_grid_thw" in made:
            return self._packed(values, torch.as_tensor(made["image_grid_thw"])[0].tolist())
        if "target_sizes" in made:
            return self._side_by_side(values[0], torch.as_tensor(made["target_sizes"]).tolist())
        if values.ndim < 4 or values.shape[-3] != 3 or "pixel_attention_mask" in made:
            raise PruningError(f"{self.name}: pixel values of shape {list(values.shape)} are not known here")
        side = self.patch * self.square
        tiles = self.pixels.levels(values.flatten(0, -4))
        grid = (tiles.shape[-2] // side, tiles.shape[-1] // side)
        return [seen(each, grid) for each in patches(tiles, side).split(1)]

    def _packed(self, values: Tensor, grid: list[int]) -> list[VisualTokens]:
        """Patches of one picture in a row, [S, 3 * t * p * p], those of a square side by side."""
        _, rows, columns = grid
        levels = self.pixels.levels(values.unflatten(1, (3, -1, self.patch)))
        units = squares(levels.unflatten(0, (-1, self.square**2)), self.square, self.patch, video=False)
        return [seen(units[None], (rows // self.square, columns // self.square))]

    def _side_by_side(self, values: Tensor, grids: list[list[int]]) -> list[VisualTokens]:
        """Patches of one picture and its slices in a row, [3, p, S p], every one in raster order."""
        levels, views = self.pixels.levels(values[None])[0], []
        for row, grid in zip(levels.split([self.patch * r * c for r, c in grids], -1), grids, strict=True):
            units, (rows, columns) = patches(laid_out(row, *grid)[None], self.patch * self.square), grid
            views.append(seen(units, (rows // self.square, columns // self.square)))
        return views

    @cached_property
    def padding(self) -> Color | None:
        """The colour that is added around a wide picture, None if nothing is: found out with a picture of noise."""
        from PIL import Image

        noise = np.random.default_rng(0).integers(0, 256, (240, 840, 3), dtype=np.uint8)
        corners = [view.pixels[0, -1] for view in self(Image.fromarray(noise))]  # [3, p, p]
        flat = [corner[:, 0, 0].tolist() for corner in corners if (corner == corner[:, :1, :1]).all()]
        return tuple(flat[0]) if flat else None


def seen(pixels: Tensor, grid: tuple[int, int]) -> VisualTokens:
    """A whole picture, or a tile of one, from its patches [1, N, 3, p, p] uint8."""
    return VisualTokens(pixels.flatten(2), grid, torch.arange(pixels.shape[1])[None], pixels=pixels)


def presets() -> dict[str, dict[str, Any]]:
    """The published processors by name."""
    return files.read_yaml(settings.CONFIGS / "processors.yaml")


def prepared(name: str, size: int | None = None, patch: int | None = None) -> Preparation:
    """By the name of a preset, `vtp-tiny`, or the folder of a checkpoint.

    `size`, `patch`: other sides in pixels, for presets of one square. PruningError: no such processor, a size where
    there is none, or a family without a pixels stage.
    """
    if name in presets():
        return _preset(name, size, patch)
    _refuse_sides(name, size, patch)
    folder = checkpoint.resolve() if name == checkpoint.NAME else Path(name)
    if not folder.is_dir():
        raise unknown("processor", name, [*presets(), checkpoint.NAME], listed="A checkpoint's folder, or one of")
    config = files.read_json(folder / "config.json") if (folder / "config.json").is_file() else {}
    made = _authors if TOWER in config and "vision_config" not in config else _checkpoint
    return replace(made(folder, config), name=name)


def _preset(name: str, size: int | None, patch: int | None) -> Preparation:
    import transformers

    preset = presets()[name]
    fields, side = dict(preset["settings"]), preset["patch"] if patch is None else patch
    if set(fields) == {"size", "crop_size"}:
        whole = fields["crop_size"]["height"] if size is None else size
        if not 1 <= side <= whole <= LARGEST:
            raise PruningError(f"a patch has at least 1 pixel, a picture from a patch to {LARGEST}: {side}, {whole}")
        fields = {"size": {"shortest_edge": whole}, "crop_size": {"height": whole, "width": whole}}
    else:
        _refuse_sides(name, size, patch)
    processor = getattr(transformers, preset["class"])(**fields)
    plain = _called(processor)
    images = (lambda picture: plain(squared(picture, processor))) if preset.get("squared") else plain
    return Preparation(name, images, Pixels.of(processor), side, preset.get("square", 1))


def _refuse_sides(name: str, size: int | None, patch: int | None) -> None:
    if size is not None or patch is not None:
        raise PruningError(f"another size or patch is for presets of one square, not for '{name}'")


def _called(processor: Any, **more: Any) -> Images:
    return lambda picture: processor(images=[picture], return_tensors="pt", **more)


def squared(picture: Any, processor: Any) -> Any:
    """A picture in the middle of a square of the processor's mean colour, as LLaVA-1.5 prepares it."""
    from PIL import Image

    side = max(picture.size)
    square = Image.new("RGB", (side, side), tuple(int(mean * 255) for mean in processor.image_mean))
    square.paste(picture, ((side - picture.width) // 2, (side - picture.height) // 2))
    return square


# -- checkpoints ------------------------------------------------------------------------------------------------------


def _authors(folder: Path, config: Mapping[str, Any]) -> Preparation:
    """The authors' LLaVA: the processor of its tower, called by its own package as `image_aspect_ratio` says."""
    from vtp_plugin.hosts.llava.pictures import processing

    tower = config[TOWER]
    processor = _loaded("AutoImageProcessor", tower)
    vision = (configuration(tower) or {}).get("vision_config", {})
    if "patch_size" not in vision:
        raise PruningError(f"'{tower}', the vision tower of {folder}, has no configuration with a patch size")
    return Preparation(str(folder), processing(processor, config), Pixels.of(processor), vision["patch_size"])


def _checkpoint(folder: Path, config: Mapping[str, Any]) -> Preparation:
    """A checkpoint in transformers' format."""
    whole = _loaded("AutoProcessor" if _has_words(folder) else "AutoImageProcessor", folder)
    processor = getattr(whole, "image_processor", whole)
    defaults = _defaults(whole)
    patch, square = _tower(folder) if config else _own(folder, processor)
    return Preparation(str(folder), _called(processor, **defaults), Pixels.of(processor), patch, square)


def _has_words(folder: Path) -> bool:
    return any((folder / file).is_file() for file in ("tokenizer_config.json", "tokenizer.json", "tokenizer.model"))


def _defaults(processor: Any) -> dict[str, Any]:
    """What a processor of pictures and words tells its image processor on every call."""
    said = dict(getattr(processor, "images_kwargs", None) or {})
    said |= getattr(getattr(processor, "valid_processor_kwargs", None), "_defaults", {}).get("images_kwargs", {})
    return {key: value for key, value in said.items() if key != "return_tensors"}


def _loaded(kind: str, folder: Path | str) -> Any:
    import transformers

    try:
        return getattr(transformers, kind).from_pretrained(str(folder))
    except Exception as error:  # whatever a damaged or foreign folder makes its loaders raise
        said = one_line(str(error).splitlines()[0] if str(error) else type(error).__name__)
        raise PruningError(f"'{folder}' holds no image processor that can be loaded: {said}") from None


def _own(folder: Path, processor: Any) -> tuple[int, int]:
    """Patch and square of an image processor that lies alone in its folder and knows them."""
    patch, square = (getattr(processor, name, None) for name in ("patch_size", "merge_size"))
    if not isinstance(patch, int) or not isinstance(square, int):
        raise PruningError(f"{folder} has no config.json, and its image processor does not say what a patch is")
    return patch, square


def _tower(folder: Path) -> tuple[int, int]:
    """Patch and square as the family's adapter knows them, from the model's shape."""
    import transformers

    config = transformers.AutoConfig.from_pretrained(str(folder))
    named = [getattr(transformers, name, None) for name in config.architectures or ()]
    if not named or named[0] is None:
        raise PruningError(f"{folder}: transformers knows no model of its configuration ({config.architectures})")
    with torch.device("meta"):
        model = named[0](config)
    adapter = find_adapter(model, None, plugins.adapters())
    if why := adapter.stages[Stage.PIXELS]:
        raise PruningError(f"{folder}: {adapter.models} has no pixels stage: {why}")
    return adapter.tower.patch_size, adapter.tower.block
