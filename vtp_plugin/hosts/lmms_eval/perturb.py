"""Harder inputs for any lmms-eval task: `--pruning_args perturb=noise:2` corrupts pictures or rewords questions.

Corruptions are scikit-image's, with the strengths of ImageNet-C (arXiv 1903.12261) at its severities 1, 3 and 5 where
it has them. A picture's random numbers follow from its own pixels, so every strategy sees the same corrupted picture.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from vtp_plugin.errors import PruningError, unknown

if TYPE_CHECKING:
    from PIL.Image import Image

SEVERITIES = (1, 2, 3)
NOISE = (0.08, 0.18, 0.38)  # standard deviation, of levels in [0, 1]
BLUR = (1.0, 3.0, 6.0)  # standard deviation in pixels, of a picture whose shorter side is 224
OCCLUSION = (0.05, 0.15, 0.30)  # share of the picture under one grey square
PARAPHRASES = (  # the first that matches; the word that is asked for stays where it is
    (r"^is there (an?) (.+?) in the (?:image|picture)\?", r"can you see \1 \2 in this picture?"),
    (r"^is there (.+)", r"do you see \1"),
    (r"^are there (.+)", r"do you see \1"),
    (r"^what colou?r (?:is|are) (.+)", r"which color has \1"),
    (r"^how many (.+)", r"what is the number of \1"),
    (r"^where (?:is|are) (.+)", r"in which part is \1"),
    (r"^what is (.+)", r"tell me \1"),
    (r"^what (.+)", r"which \1"),
    (r"^describe (.+)", r"say what you see in \1"),
)
DISTRACTORS = (
    "My friend has a new book on the table.",
    "The weather was good and many people came to look.",
    "There are three dogs and a cat in another photo.",
)


@dataclass
class Perturbation:
    """One kind of change at one severity (1, 2 or 3); `paraphrase` has no severity."""

    name: str
    severity: int = 1
    changed: int = field(default=0, init=False)  # pictures or questions
    unchanged: int = field(default=0, init=False)

    @classmethod
    def parse(cls, text: str) -> Perturbation:
        """From `name` or `name:severity`; PruningError if there is no such thing."""
        name, _, severity = str(text).partition(":")
        if name not in (*PICTURES, *QUESTIONS):
            raise unknown("perturbation", name, (*PICTURES, *QUESTIONS))
        if severity not in ("", *map(str, SEVERITIES)):
            raise PruningError(f"perturb={name}: the severity must be 1, 2 or 3, got '{severity}'")
        return cls(name, int(severity or 1))

    def install(self, task: Any) -> None:
        """Change what an lmms-eval task shows (`doc_to_visual`) or asks (`doc_to_text`)."""
        if self.name in PICTURES:
            show = task.doc_to_visual
            task.doc_to_visual = lambda doc: self.pictures(show(doc))
        else:
            ask = task.doc_to_text
            task.doc_to_text = lambda doc: self.question(ask(doc))

    def pictures(self, visuals: list[Any] | None) -> list[Any] | None:
        """PIL pictures changed, everything else as it is."""
        return visuals and [self.picture(v) if hasattr(v, "convert") else v for v in visuals]

    def picture(self, picture: Image) -> Image:
        from PIL import Image

        from vtp_plugin.reporting.pictures import in_bytes

        pixels = np.asarray(in_bytes(picture, "a picture", picture.format))
        rng = np.random.default_rng([self.severity, zlib.crc32(pixels.tobytes())])
        changed = PICTURES[self.name](pixels / 255, self.severity - 1, rng)
        self._count(True)
        return Image.fromarray((changed.clip(0, 1) * 255).round().astype(np.uint8))

    def question(self, text: str) -> str:
        changed = QUESTIONS[self.name](text, self.severity)
        self._count(changed != text)
        return changed

    def _count(self, changed: bool) -> None:
        self.changed += changed
        self.unchanged += not changed

    def as_json(self) -> dict[str, Any]:
        """For the record."""
        return dict(vars(self))


def _noise(pixels: np.ndarray, strength: int, rng: np.random.Generator) -> np.ndarray:
    from skimage.util import random_noise

    return random_noise(pixels, "gaussian", rng=rng, var=NOISE[strength] ** 2)


def _blur(pixels: np.ndarray, strength: int, rng: np.random.Generator) -> np.ndarray:
    from skimage.filters import gaussian

    return gaussian(pixels, BLUR[strength] * min(pixels.shape[:2]) / 224, channel_axis=-1)


def _occlusion(pixels: np.ndarray, strength: int, rng: np.random.Generator) -> np.ndarray:
    from skimage.draw import rectangle

    height, width = pixels.shape[:2]
    side = min(height, width, round((OCCLUSION[strength] * height * width) ** 0.5))
    corner = rng.integers(height - side + 1), rng.integers(width - side + 1)
    covered = pixels.copy()
    covered[rectangle(corner, extent=(side, side), shape=(height, width))] = 0.5
    return covered


def _paraphrase(text: str, severity: int) -> str:
    for pattern, replacement in PARAPHRASES:
        if re.match(pattern, text, re.IGNORECASE):
            return re.sub(pattern, replacement, text, count=1, flags=re.IGNORECASE)
    return text


def _distract(text: str, severity: int) -> str:
    return " ".join([*DISTRACTORS[:severity], text])


PICTURES: dict[str, Callable[..., np.ndarray]] = {"noise": _noise, "blur": _blur, "occlusion": _occlusion}
QUESTIONS: dict[str, Callable[[str, int], str]] = {"paraphrase": _paraphrase, "distractor": _distract}
