"""Questions about validation scenes, put to the embedded model in transformers with any strategies attached."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from vtp_plugin.metrics import counting
from vtp_plugin.pruning import Pruned, prune
from vtp_plugin.strategy import PruningStrategy
from vtp_plugin.surgery.call import Call

from .inference import load
from .pool import draw
from .scenes import sample_scene
from .testset import ask


@dataclass(frozen=True)
class Batch:
    """Prompts that are read together, and what should follow them."""

    inputs: dict[str, Tensor]
    tasks: list[str]
    answers: Tensor  # [B] ids


class Questions:
    """One question of every task about each of the scenes with these seeds, prepared once."""

    def __init__(self, seeds: Sequence[int], batch: int) -> None:
        self.model, self.processor = load()
        asked = [(seed, *pair) for place, seed in enumerate(seeds) for pair in _questions(place, seed)]
        self.batches = [self._batch(asked[start : start + batch]) for start in range(0, len(asked), batch)]

    def _batch(self, asked: Sequence[tuple[int, str, Any]]) -> Batch:
        from PIL import Image

        pictures = {seed: Image.fromarray(draw(sample_scene("validation", seed))) for seed, _, _ in asked}
        texts, tasks = [], [task for _, task, _ in asked]
        for _, _, question in asked:
            content = [{"type": "image"}, {"type": "text", "text": question.text}]
            turn = [{"role": "user", "content": content}]
            texts.append(self.processor.apply_chat_template(turn, add_generation_prompt=True))
        shown = [pictures[seed] for seed, _, _ in asked]
        inputs = self.processor(images=shown, text=texts, return_tensors="pt", padding=True, padding_side="left")
        ids = [self.processor.tokenizer.encode(q.answer, add_special_tokens=False)[0] for _, _, q in asked]
        return Batch(dict(inputs.to(self.model.device, self.model.dtype)), tasks, torch.tensor(ids))

    @cached_property
    def tokens(self) -> int:
        """Visual tokens of a picture."""
        return int(self._asked([], self.batches[:1])["layers"][0])

    def spent(self, strategies: Sequence[PruningStrategy]) -> float:
        """Share of the unpruned model's visual tokens x layers, for the first question."""
        first = self.batches[0]
        one = Batch({name: value[:1] for name, value in first.inputs.items()}, first.tasks[:1], first.answers[:1])
        return self._asked(strategies, [one])["spent"]

    def answered(self, strategies: Sequence[PruningStrategy]) -> dict[str, Any]:
        """`right`: per task, 1 or 0 for every scene; `layers`: visual tokens in each, on average; `spent`: their share.

        Right is an answer whose first token is; answers are one token long.
        """
        return self._asked(strategies, self.batches)

    @torch.no_grad()
    def _asked(self, strategies: Sequence[PruningStrategy], batches: Sequence[Batch]) -> dict[str, Any]:
        right: dict[str, list[float]] = {}
        layers: list[Tensor] = []
        totals: list[int] = []
        with prune(self.model, list(strategies) or "none", processor=self.processor) as pruned:

            def count(call: Call) -> None:
                for row, image in enumerate(call.images):
                    layers.append(visual(pruned, call, row))
                    totals.append(image.total)

            pruned.finished.append(count)
            for batch in batches:
                logits = self.model(**batch.inputs, logits_to_keep=1).logits[:, -1]
                hits = (logits.argmax(-1).cpu() == batch.answers).tolist()
                for task, hit in zip(batch.tasks, hits, strict=True):
                    right.setdefault(task, []).append(float(hit))
        seen = torch.stack(layers)  # [images, layers]
        spent = (seen.mean(1).sum() / sum(totals)).item()
        return {"right": right, "layers": seen.mean(0).tolist(), "spent": spent}


def visual(pruned: Pruned, call: Call, row: int) -> Tensor:
    """How many visual tokens of a prompt with one image every decoder layer saw."""
    lengths = torch.tensor(counting.decoder_lengths(pruned.adapter, call, row), dtype=torch.float64)
    return lengths - lengths[0] + counting.entered(call, row)


def _questions(place: int, seed: int) -> list[tuple[str, Any]]:
    return list(ask(place, seed, sample_scene("validation", seed)).items())
