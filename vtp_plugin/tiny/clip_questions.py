"""Questions about test clips, put to the embedded video model in transformers with any strategies attached.

Many strategies are asked about the same few clips, so that blocks of the tower need not run for each: see `Once`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vtp_plugin.pruning import prune
from vtp_plugin.strategy import PruningStrategy
from vtp_plugin.surgery.call import Call
from vtp_plugin.surgery.undo import Undo

from .clip_testset import documents, read
from .inference import load

TASKS = ("which", "moves")  # that need time and that the model has learnt
NAME = "vtp-tiny-video"


@dataclass(frozen=True)
class Clips:
    """Prompts about some clips, a question of every task about each, and what should follow them."""

    inputs: dict[str, Tensor]
    answers: Tensor  # [Q] ids, task by task


@dataclass(frozen=True)
class Seen:
    """What a model made of `Clips`."""

    right: dict[str, list[bool]]  # per task, clip by clip
    said: list[int]  # first token of every answer
    kept: list[set[int]]  # places of the tokens that were left for every question, without merged ones that have none


class ClipQuestions:
    """The model, and questions about clips of the test set by number."""

    def __init__(self) -> None:
        self.model, self.processor = load(NAME)
        self.documents = documents()

    def about(self, numbers: Sequence[int]) -> Clips:
        from PIL import Image

        rows = [self.documents[number] for number in numbers]
        films = [[Image.fromarray(frame) for frame in read(row).frames()] for row in rows]
        texts = [self._prompt(row[f"{task}_question"]) for task in TASKS for row in rows]
        inputs = self.processor(
            videos=films * len(TASKS), text=texts, return_tensors="pt", padding=True, padding_side="left"
        )
        ids = [self._first(row[f"{task}_answer"]) for task in TASKS for row in rows]
        return Clips(dict(inputs.to(self.model.device, self.model.dtype)), torch.tensor(ids))

    def _prompt(self, question: str) -> str:
        content = [{"type": "video"}, {"type": "text", "text": question}]
        return self.processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)

    def _first(self, answer: str) -> int:
        """Right is an answer whose first token is; those of TASKS are one token long."""
        return self.processor.tokenizer.encode(answer, add_special_tokens=False)[0]

    @torch.no_grad()
    def answered(self, clips: Clips, strategies: Sequence[PruningStrategy]) -> Seen:
        """The questions once, with these strategies attached; none: the whole model."""
        kept: list[set[int]] = []

        def note(call: Call) -> None:
            kept.extend({*image.index.tolist()} - {-1} for image in call.images)

        with prune(self.model, list(strategies) or "none", processor=self.processor) as pruned:
            pruned.finished.append(note)
            said = self.model(**clips.inputs, logits_to_keep=1).logits[:, -1].argmax(-1).cpu()
        hits = (said == clips.answers).view(len(TASKS), -1).tolist()
        return Seen(dict(zip(TASKS, hits, strict=True)), said.tolist(), kept)

    @contextmanager
    def tower_once(self) -> Iterator[None]:
        """While open, what is costly in the tower's blocks runs once for pictures that are shown again and again."""
        with Undo() as undo:
            for block in self.model.model.vision_tower.encoder.layers:
                for part in (block.self_attn, block.mlp):
                    once = Once(part.forward)
                    undo.override(part, "forward", once.answer)
            yield


class Once:
    """A function of hidden states that remembers what it answered last, and answers it again for equal ones."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function, self.given, self.made = function, None, None

    def answer(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        if self.given is None or not torch.equal(self.given, hidden_states):
            self.given, self.made = hidden_states, self.function(hidden_states, *args, **kwargs)
        return self.made
