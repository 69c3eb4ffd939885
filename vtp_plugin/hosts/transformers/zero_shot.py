"""Zero-shot classification with a CLIP or SigLIP of transformers: names become texts, pictures the nearest of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from vtp_plugin.adapters.clip import quietly
from vtp_plugin.errors import PruningError
from vtp_plugin.pruning import prune
from vtp_plugin.reporting.pictures import SUFFIXES, in_bytes, open_picture
from vtp_plugin.strategy import PruningStrategy


@dataclass(frozen=True)
class Classes:
    """What the pictures may show, and which pictures there are of each."""

    names: list[str]
    pictures: list[Any]  # PIL images, or paths of them
    labels: list[int]


def folder_of_classes(folder: str, said: str) -> Classes:
    """One sub-folder per class, as in Imagenette. `said`: a file of `FOLDER NAME` lines, `a,b,c`, or nothing.

    PruningError for a folder without pictures and for names that do not match the folders.
    """
    root = Path(folder)
    if not root.is_dir():
        raise PruningError(f"not a folder: {root}")
    pictures = {sub.name: pictures_of(sub) for sub in sorted(root.iterdir()) if sub.is_dir()}
    pictures = {name: paths for name, paths in pictures.items() if paths}
    if not pictures:
        raise PruningError(f"no pictures in the sub-folders of {root}: one folder per class is expected")
    names = _names(said) or {name: name.replace("_", " ") for name in pictures}
    if set(names) != set(pictures):
        odd = sorted(set(names) ^ set(pictures))
        raise PruningError(f"class names and folders of {root} do not match: {', '.join(odd)}")
    found = [(path, label) for label, name in enumerate(names) for path in pictures[name]]
    return Classes(list(names.values()), [path for path, _ in found], [label for _, label in found])


def pictures_of(folder: Path) -> list[Path]:
    """Every picture in a folder and below."""
    return sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES)


def _names(said: str) -> dict[str, str]:
    """Folder -> name; a single word is both."""
    if not said:
        return {}
    path = Path(said)
    lines = path.read_text().splitlines() if path.is_file() else said.split(",")
    pairs = [line.strip().partition(" ") for line in lines if line.strip()]
    return {folder: name.strip() or folder.replace("_", " ") for folder, _, name in pairs}


class ZeroShot:
    """A loaded encoder with both towers."""

    def __init__(self, checkpoint: str) -> None:
        from transformers import AutoModel, AutoProcessor

        try:
            with quietly():
                self.model: nn.Module = AutoModel.from_pretrained(checkpoint).eval()
                self.processor = AutoProcessor.from_pretrained(checkpoint)
        except (OSError, ValueError) as error:
            reason = str(error).splitlines()[0]
            raise PruningError(f"cannot load an encoder from '{checkpoint}': {reason}") from None
        if not hasattr(self.model, "text_model"):
            raise PruningError(
                f"'{checkpoint}' has no text tower: zero-shot classification compares pictures with texts"
            )
        self.model.to("cuda" if torch.cuda.is_available() else "cpu")

    def texts(self, names: Sequence[str], template: str) -> Tensor:
        """Unit features of the names in the template, [C, D]."""
        said = [template.format(name) for name in names]
        padding = "max_length" if "siglip" in type(self.model).__name__.lower() else True
        inputs = self.processor(text=said, padding=padding, truncation=True, return_tensors="pt").to(self.model.device)
        with torch.no_grad():
            return normalize(self.model.get_text_features(**inputs).pooler_output, dim=-1)

    def pictures(self, pictures: Sequence[Any], strategies: Sequence[PruningStrategy], batch: int = 32) -> Tensor:
        """Unit features of the pictures, pruned by the strategies; with none, the model itself, [P, D]."""
        parts = [pictures[start : start + batch] for start in range(0, len(pictures), batch)]
        if not strategies:
            return torch.cat([self.features(part) for part in parts])
        with prune(self.model, list(strategies), processor=self.processor):
            return torch.cat([self.features(part) for part in parts])

    def features(self, pictures: Sequence[Any]) -> Tensor:
        """Unit features of one batch, [P, D]."""
        with torch.no_grad():
            return self.embedded(self.values(pictures))

    def values(self, pictures: Sequence[Any]) -> Tensor:
        """What the encoder is given of one batch, [P, 3, H, W]."""
        inputs = self.processor(images=[opened(picture) for picture in pictures], return_tensors="pt")
        return inputs["pixel_values"].to(self.model.device)

    def embedded(self, values: Tensor) -> Tensor:
        """Unit features of pixel values [P, 3, H, W], with gradients where they are asked for, [P, D]."""
        return normalize(self.model.get_image_features(values).pooler_output, dim=-1)

    def seen(self, picture: Any) -> Tensor:
        """A picture as it leaves the image processor, without normalisation, [3, H, W] uint8."""
        inputs = self.processor.image_processor(opened(picture), do_normalize=False, return_tensors="pt")
        return (inputs["pixel_values"][0] * 255).round().byte()


def opened(picture: Any) -> Any:
    """The RGB picture of a path, or the picture itself."""
    return open_picture(picture) if isinstance(picture, Path) else in_bytes(picture, "a picture")
