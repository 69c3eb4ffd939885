"""One picture, one question, one set of strategies: what was kept, and what the model answered."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from vtp_plugin.pruning import prune
from vtp_plugin.strategy import PruningStrategy
from vtp_plugin.tiny.inference import answer


@dataclass(frozen=True)
class View:
    """What `kept_figure` draws in one panel."""

    label: str
    picture: Any  # PIL image as the model sees it: resized and cropped
    question: str
    answer: str
    before: int
    after: int
    kept: list[int]  # raster positions of the patches that are left at the end
    grid: tuple[int, int]


def view(
    model: nn.Module,
    processor: Any,
    picture: Any,
    question: str,
    strategies: Sequence[PruningStrategy],
    label: str,
) -> View:
    """Ask the pruned model about the picture."""
    with prune(model, list(strategies), processor=processor) as pruned:
        said = answer(model, processor, picture, question)
        grid = pruned.adapter.tower.grid
    everything = list(range(grid[0] * grid[1]))
    kept = pruned.events[-1].kept[0].tolist() if pruned.events else everything
    patches = [position for position in kept if position >= 0]
    return View(label, seen_by(processor, picture), question, said, len(everything), len(kept), patches, grid)


def seen_by(processor: Any, picture: Any) -> Any:
    """The picture as it leaves the image processor, without normalisation."""
    from PIL import Image

    pixels = processor.image_processor(picture, do_normalize=False, return_tensors="pt")["pixel_values"][0]
    return Image.fromarray((pixels * 255).round().byte().permute(1, 2, 0).numpy())
