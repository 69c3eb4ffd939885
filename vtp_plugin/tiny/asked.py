"""Questions of the test set, put to an embedded model in transformers with any strategies attached.

Many strategies are asked about the same few pictures or clips, so that blocks of the tower need not run for each: see
`Once`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from vtp_plugin.pruning import prune
from vtp_plugin.strategy import PruningStrategy
from vtp_plugin.surgery.call import Call
from vtp_plugin.surgery.undo import Undo

from .inference import load


@dataclass(frozen=True)
class Prompts:
    """Prompts about some documents, a question of every task about each, and what should follow them."""

    inputs: dict[str, Tensor]
    answers: Tensor  # [Q] ids, task by task


@dataclass(frozen=True)
class Seen:
    """What a model made of `Prompts`."""

    right: dict[str, list[bool]]  # per task, document by document
    said: list[int]  # first token of every answer
    kept: list[set[int]]  # places of the tokens that were left for every question, without merged ones that have none


class Asked(ABC):
    """The model, and questions about documents of its test set by number."""

    name: ClassVar[str]  # of the embedded model
    kind: ClassVar[str]  # `image` or `video`
    tasks: ClassVar[tuple[str, ...]]
    documents: Sequence[dict[str, Any]]

    def __init__(self) -> None:
        self.model, self.processor = load(self.name)

    @abstractmethod
    def shown(self, rows: Sequence[dict[str, Any]]) -> dict[str, list[Any]]:
        """What the processor is given of these documents, beside text."""

    @abstractmethod
    def parts(self) -> Iterable[nn.Module]:
        """What is costly in the tower's blocks, called with hidden states first."""

    def about(self, numbers: Sequence[int]) -> Prompts:
        rows = [self.documents[number] for number in numbers]
        texts = [self._prompt(row[f"{task}_question"]) for task in self.tasks for row in rows]
        given = {name: list(values) * len(self.tasks) for name, values in self.shown(rows).items()}
        inputs = self.processor(text=texts, return_tensors="pt", padding=True, padding_side="left", **given)
        ids = [self._first(row[f"{task}_answer"]) for task in self.tasks for row in rows]
        return Prompts(dict(inputs.to(self.model.device, self.model.dtype)), torch.tensor(ids))

    def _prompt(self, question: str) -> str:
        content = [{"type": self.kind}, {"type": "text", "text": question}]
        return self.processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)

    def _first(self, answer: str) -> int:
        """Right is an answer whose first token is; those of the tasks are one token long."""
        return self.processor.tokenizer.encode(answer, add_special_tokens=False)[0]

    @torch.no_grad()
    def answered(self, prompts: Prompts, strategies: Sequence[PruningStrategy]) -> Seen:
        """The questions once, with these strategies attached; none: the whole model."""
        kept: list[set[int]] = []

        def note(call: Call) -> None:
            kept.extend({*image.index.tolist()} - {-1} for image in call.images)

        with prune(self.model, list(strategies) or "none", processor=self.processor) as pruned:
            pruned.finished.append(note)
            said = self.model(**prompts.inputs, logits_to_keep=1).logits[:, -1].argmax(-1).cpu()
        hits = (said == prompts.answers).view(len(self.tasks), -1).tolist()
        return Seen(dict(zip(self.tasks, hits, strict=True)), said.tolist(), kept)

    @contextmanager
    def tower_once(self) -> Iterator[None]:
        """While open, what is costly in the tower's blocks runs once for what is shown again and again."""
        with Undo() as undo:
            for part in self.parts():
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
