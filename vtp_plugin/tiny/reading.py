"""Scenes that are read once for all questions about them: what strategies keep of them, and what is answered from that.

The embedded model runs in transformers; a strategy that keeps everything notes what it is shown. Others choose from the
same tokens and signals, and the model's own language model reads what they keep, at the original positions, all
questions about a scene side by side (language.py). The answers are those of the pruned model, in less time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from vtp_plugin.pruning import prune
from vtp_plugin.stages import Stage
from vtp_plugin.strategy import PruningStrategy
from vtp_plugin.tokens import Selection, VisualTokens, at

from .inference import load
from .language import Lesson, examine, write_lesson
from .missing import Sight
from .pool import draw
from .prompts import layouts
from .questions import Question
from .qwen.folder import qwen_layouts
from .qwen.student import Reader, on_axes
from .scenes import Scene

SIGNALS = ("projected", "cls_attention", "fingerprint")  # what strategies may need
LAYOUTS = {  # model: how its processor asks, and positions as its language model counts them
    "vtp-tiny": (lambda tokenizer: layouts(tokenizer)["hf"], lambda sight: sight),
    "vtp-tiny-qwen": (lambda tokenizer: qwen_layouts(tokenizer)["plain"], on_axes),
}


@dataclass(kw_only=True)
class Noting(PruningStrategy):
    """Keeps everything, and notes it. It has a budget, so that pictures pass the tower together."""

    name = "noting"
    paper = "none"
    stage = Stage.PROJECTOR
    needs = SIGNALS

    keep_ratio: float | None = 1.0
    noted: list[VisualTokens] = field(default_factory=list)

    def decide(self, visual: VisualTokens) -> Selection:
        self.noted.append(visual)
        return Selection.everything(visual.index)

    @property
    def keeps_everything(self) -> bool:
        return False


class Reading:
    """An embedded model, by name."""

    def __init__(self, name: str = "vtp-tiny") -> None:
        self.model, self.processor = load(name)
        layout, self.placed = LAYOUTS[name]
        self.layout = layout(self.processor.tokenizer)
        self.reader = Reader(self.model.model.language_model, self.model.lm_head)

    @torch.no_grad()
    def shown(self, scenes: Sequence[Scene]) -> VisualTokens:
        """The visual tokens of scenes on their way into the language model, and their signals."""
        from PIL import Image

        pictures = [Image.fromarray(draw(scene)) for scene in scenes]
        text = self.layout.text.format(question="")
        given = self.processor(images=pictures, text=[text] * len(pictures), return_tensors="pt")
        noting = Noting()
        with prune(self.model, [noting], processor=self.processor):
            self.model(**given.to(self.model.device, self.model.dtype), logits_to_keep=1)
        (visual,) = noting.noted
        return visual

    def lesson(self, asked: Sequence[Sequence[Question]]) -> Lesson:
        """Questions about each of some scenes."""
        return write_lesson(self.layout, asked).to(self.model.device)

    def answered(
        self, visual: VisualTokens, strategy: PruningStrategy | None, lesson: Lesson
    ) -> dict[str, list[float]]:
        """Per task, 1 or 0 for every scene, from the tokens that the strategy keeps; None keeps all."""
        columns = self.kept(visual, strategy)
        left = at(visual.projected, columns)
        sight = Sight(left, visual.index.gather(1, columns), visual.index.shape[1])
        return examine(self.reader, lambda _: self.placed(sight), [lesson])

    def kept(self, visual: VisualTokens, strategy: PruningStrategy | None) -> Tensor:
        """The columns [B, K] of what a strategy keeps."""
        selection = Selection.everything(visual.index) if strategy is None else strategy.decide(visual)
        return torch.stack(selection.sources)
