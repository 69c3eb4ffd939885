"""Stages B and C: the LLaMA learns to answer, first from symbolic scenes, then from the CLIP's features."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from .missing import Sight
from .modeling import LLAMA_WIDTH
from .prompts import EOS, Layout
from .questions import CHOICES, Question
from .scenes import GRID
from .vision import CLASSES

Metrics = dict[str, float]
KEY, ANSWER, END = 1, 2, 3  # what a supervised position is asked for


class Symbols(nn.Module):
    """A scene without pictures: each patch is the sum of the embeddings of its labels, its row and its column."""

    def __init__(self) -> None:
        super().__init__()
        self.labels = nn.ModuleList(nn.Embedding(classes, LLAMA_WIDTH) for classes in CLASSES.values())
        self.row, self.column = nn.Embedding(GRID, LLAMA_WIDTH), nn.Embedding(GRID, LLAMA_WIDTH)
        for table in self.modules():
            if isinstance(table, nn.Embedding):
                nn.init.normal_(table.weight, std=0.02)

    def forward(self, labels: Tensor) -> Tensor:  # [B, 4, N] -> [B, N, D]
        meaning = sum(table(label) for table, label in zip(self.labels, labels.unbind(1), strict=True))
        position = torch.arange(GRID * GRID, device=labels.device)
        return meaning + self.row(position // GRID) + self.column(position % GRID)


@dataclass(frozen=True)
class Lesson:
    """A batch of images, the same number of questions packed behind each. Text only; the image comes between."""

    prefix: Tensor  # [P] ids before the image, the same for all
    ids: Tensor  # [B, L] ids behind it
    segment: Tensor  # [B, L] which question a column belongs to, from 1; 0 is padding
    position: Tensor  # [B, L] counted from the end of the image, anew for every question
    target: Tensor  # [B, L] id to predict, -100 where nothing is asked
    kind: Tensor  # [B, L] KEY, ANSWER or END
    tasks: tuple[tuple[str, ...], ...]  # [B][Q]

    def to(self, device: str) -> Lesson:
        tensors = {name: value.to(device) for name, value in vars(self).items() if isinstance(value, Tensor)}
        return Lesson(**tensors, tasks=self.tasks)


def write_lesson(layout: Layout, questions: Sequence[Sequence[Question]]) -> Lesson:
    """Pack each image's questions; the answer is asked for at the key word, at the prompt's end, and then `</s>`."""
    rows = [write_row(layout, asked) for asked in questions]
    ids, segment, position, target, kind = (
        nn.utils.rnn.pad_sequence([torch.tensor(row[column]) for row in rows], True, padding)
        for column, padding in enumerate((0, 0, 0, -100, 0))
    )
    tasks = tuple(tuple(question.task for question in asked) for asked in questions)
    return Lesson(torch.tensor(layout.prefix), ids, segment, position, target, kind, tasks)


def write_row(layout: Layout, asked: Sequence[Question]) -> tuple[list[int], ...]:
    """ids, segment, position, target, kind of one image's questions; a caption is asked for at the end only."""
    columns: tuple[list[int], ...] = ([], [], [], [], [])
    for number, question in enumerate(asked, 1):
        prompt = layout.split(question.text)[1]
        answer = layout.tokenizer.encode(question.answer, add_special_tokens=False)
        if len(answer) != 1 and question.task in CHOICES:
            raise ValueError(f"answer {question.answer!r} has {len(answer)} tokens, not one")
        silent, keyed = len(prompt) - 2, question.task != "caption"
        new = (
            [*prompt, *answer],
            [number] * (len(prompt) + len(answer)),
            range(len(prompt) + len(answer)),
            [-100] * silent + [answer[0] if keyed else -100] + [*answer, EOS],
            [0] * silent + [KEY if keyed else 0, ANSWER] + [END] * len(answer),
        )
        for column, values in zip(columns, new, strict=True):
            column.extend(values)
    return columns


def attention_mask(lesson: Lesson, before: int) -> Tensor:  # bool [B, 1, T, T], True may look
    """Causal; a question sees what is before it in common and itself, never another question."""
    common = lesson.segment.new_zeros(len(lesson.ids), before)
    segment = torch.cat([common, lesson.segment.masked_fill(lesson.segment == 0, -1)], 1)  # [B, T]
    same = (segment[:, None, :] == segment[:, :, None]) | (segment[:, None, :] == 0)
    return (same & torch.ones_like(same[0]).tril())[:, None]


def read(llama: LlamaForCausalLM, sight: Sight, lesson: Lesson) -> Tensor:  # -> [B, L, D]
    """Hidden states behind the image."""
    embed = llama.get_input_embeddings()
    visual, start = sight.tokens, len(lesson.prefix)
    prefix = embed(lesson.prefix).expand(len(visual), -1, -1)
    before = start + visual.shape[1]
    axes = sight.place.shape[:-1]
    parts = (torch.arange(start, device=visual.device), start + sight.place, start + sight.length + lesson.position)
    hidden = llama.model(
        inputs_embeds=torch.cat([prefix, visual, embed(lesson.ids)], 1),
        attention_mask=attention_mask(lesson, before),
        position_ids=torch.cat([part.expand(*axes, -1) for part in parts], -1),
        use_cache=False,
    ).last_hidden_state
    return hidden[:, before:]


def answer_loss(
    llama: LlamaForCausalLM, sight: Sight, lesson: Lesson, weights: Mapping[str, float] | None = None
) -> tuple[Tensor, Metrics]:
    """Cross-entropy where something is asked, weighted by task; the accuracy of the answers at the prompt's end."""
    hidden = read(llama, sight, lesson)
    asked = lesson.kind > 0
    logits, target, kind = llama.lm_head(hidden[asked]), lesson.target[asked], lesson.kind[asked]
    hits = (logits.argmax(-1) == target).float()
    of_question = logits.new_tensor([(weights or {}).get(task, 1.0) for row in lesson.tasks for task in row])
    weight = of_question[questions(lesson, asked)]
    loss = (F.cross_entropy(logits, target, reduction="none") * weight).sum() / weight.sum()
    accuracy = {task: sum(values) / len(values) for task, values in by_task(hits, asked, lesson).items()}
    return loss, {"key": hits[kind == KEY].mean().item(), **accuracy}


def questions(lesson: Lesson, asked: Tensor) -> Tensor:  # [A]
    """Which of all B x Q questions every asked position belongs to."""
    row, column = asked.nonzero(as_tuple=True)
    return row * len(lesson.tasks[0]) + lesson.segment[row, column] - 1


def by_task(hits: Tensor, asked: Tensor, lesson: Lesson) -> dict[str, list[float]]:
    """Per task, whether each answer is right, `</s>` with it: 1 or 0; from the hits at all asked positions."""
    names = [task for row in lesson.tasks for task in row]
    final = lesson.kind[asked] > KEY
    whole = hits.new_ones(len(names)).scatter_reduce(0, questions(lesson, asked)[final], hits[final], "amin")
    of_task = defaultdict(list)
    for name, hit in zip(names, whole.tolist(), strict=True):
        of_task[name].append(hit)
    return dict(of_task)


@torch.no_grad()
def examine(
    llama: LlamaForCausalLM, sight_of: Callable[[slice], Sight], lessons: Sequence[Lesson]
) -> dict[str, list[float]]:
    """Per task, whether each answer is right, over all lessons; `sight_of` gives the tokens of a slice of the pool."""
    total, start = defaultdict(list), 0
    for lesson in lessons:
        part = slice(start, start + len(lesson.ids))
        start = part.stop
        asked = lesson.kind > 0
        hits = llama.lm_head(read(llama, sight_of(part), lesson)[asked]).argmax(-1) == lesson.target[asked]
        for name, values in by_task(hits.float(), asked, lesson).items():
            total[name] += values
    return dict(total)
