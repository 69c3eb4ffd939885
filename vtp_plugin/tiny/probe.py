"""How much of what a method loses was in the tokens, and how much is the model's trouble with what is left.

`python -m vtp_plugin.tiny.probe --out DIR` trains a reader on the embedded model's visual tokens, whole and missing in
all patterns of `missing`, which is asked the same questions. It reads a set: no order, no positions, no prompt, so a
set of any size is as good to it as another. Where it answers worse than from all tokens, *information* is gone; what
the embedded model loses beyond that is *shift*. DIR is a folder of `vtp_plugin.tiny.train` that has features and fit.
Rows that the results have already are kept.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vtp_plugin import config
from vtp_plugin.pruning import prune
from vtp_plugin.reporting.tables import Table

from . import testset
from .examples import pictures
from .fitting import Metrics, Plan, Run, fit
from .inference import answer, load
from .missing import some_missing
from .modeling import LLAMA_WIDTH
from .pool import draw_pool, open_features
from .prompts import layouts
from .questions import CHOICES, TASKS, Question, ask_all
from .scenes import SHAPES, Scene
from .train import note_features, start_from_package
from .workshop import Workshop

PLAN = Plan(steps=3000, rate=1.5e-3, batch=24, warmup=100)
WIDTH, HEADS, LAYERS = LLAMA_WIDTH, 6, 3
WORDS = (*TASKS, *SHAPES)
SAID = tuple(dict.fromkeys(choice for choices in CHOICES.values() for choice in choices))
METHODS = ("random", "stride", "l2", "visionzip", "atp", "divprune", "vtp", "pooling", "downsample")
KEEPS = (0.5, 0.25, 0.11)


def words(question: Question) -> list[int]:
    """What a question asks, as numbers in WORDS."""
    said = question.text.split()
    named = [shape for shape in SHAPES if said[-1] in (shape, f"{shape}s", f"{shape}es")]
    return [WORDS.index(word) for word in (question.task, *named)]


class Reader(nn.Module):
    """Questions that look at a set of tokens, in a few layers, by softmax (what is there) and by sums (how much)."""

    def __init__(self) -> None:
        super().__init__()
        self.ask = nn.Embedding(len(WORDS), WIDTH)
        self.norm = nn.LayerNorm(WIDTH)
        self.layers = nn.ModuleList(Glance() for _ in range(LAYERS))
        self.say = nn.Linear(WIDTH, len(SAID))

    def forward(self, tokens: Tensor, asked: Tensor) -> Tensor:  # [B, K, D], [B, Q, len(WORDS)] -> [B, Q, len(SAID)]
        tokens, state = self.norm(tokens), asked @ self.ask.weight
        for layer in self.layers:
            state = layer(tokens, state)
        return self.say(state)


class Glance(nn.Module):
    """One look of every question at all tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.keys = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(WIDTH, 3 * WIDTH)
        self.out = nn.Linear(2 * WIDTH, WIDTH)
        self.think = nn.Sequential(
            nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH)
        )
        self.before = nn.LayerNorm(WIDTH)

    def forward(self, tokens: Tensor, state: Tensor) -> Tensor:
        q1, q2 = (_heads(part) for part in self.query(self.before(state)).chunk(2, -1))
        k1, k2, v = (_heads(part) for part in self.keys(tokens).chunk(3, -1))
        there = (q1 @ k1.transpose(2, 3) / k1.shape[-1] ** 0.5).softmax(-1) @ v
        much = (q2 @ k2.transpose(2, 3) / k2.shape[-1] ** 0.5 - 3).sigmoid() @ v / 10
        state = state + self.out(torch.cat([there, much], -1).transpose(1, 2).flatten(2))
        return state + self.think(state)


def _heads(values: Tensor) -> Tensor:  # [B, N, H d] -> [B, H, N, d]; questions join what they found by head
    return values.unflatten(-1, (HEADS, -1)).transpose(1, 2)


def encode(questions: Sequence[Sequence[Question]]) -> tuple[Tensor, Tensor]:
    """What is asked, [B, Q, len(WORDS)] of zeros and ones, and the answers [B, Q] in SAID."""
    asked = torch.zeros(len(questions), len(questions[0]), len(WORDS))
    for b, row in enumerate(questions):
        for q, question in enumerate(row):
            asked[b, q, words(question)] = 1.0
    return asked, torch.tensor([[SAID.index(question.answer) for question in row] for row in questions])


def learn(run: Run, tokens_of: Any, plan: Plan = PLAN) -> Reader:
    """Train the reader on a run's scenes; `tokens_of` turns features into what the language model is shown."""
    torch.manual_seed(0)
    shop, reader = Workshop(run), Reader()

    def step(number: int) -> tuple[Tensor, Metrics]:
        batch = shop.batch("join", plan.batch, 100_000 + number)
        features, attention = batch.view
        things = (batch.labels[:, 0] > 0).float()
        with torch.no_grad():
            sight = some_missing(tokens_of(shop, features), attention, things, batch.rng)
        asked, target = encode([[*ask_all(scene, batch.rng).values()] for scene in batch.scenes])
        logits = reader(sight.tokens, asked)
        hit = (logits.argmax(-1) == target).float().mean().item()
        whole = sight.tokens.shape[1] == features.shape[1]
        return F.cross_entropy(logits.flatten(0, 1), target.flatten()), {"whole" if whole else "missing": hit}

    fit(run, "probe", nn.ModuleDict({"reader": reader}), plan, step)
    return reader.eval()


def trained(run: Run, scenes: int, steps: int) -> Reader:
    """A reader of the package's own model, of the first scenes of the training split; in a run of its own.

    An interrupted training goes on; of a finished one the scenes are not kept.
    """
    if (run.load("probe") or {"step": 0})["step"] < steps:
        start_from_package(run)
        if not (run.path / "train-images.npy").exists():
            draw_pool(run.path, "train", scenes)
        if open_features(run.path) is None:
            note_features(run)
        plan = replace(PLAN, steps=steps, batch=min(PLAN.batch, scenes))
        learn(run, lambda shop, features: shop.networks["projector"](features), plan)
        for pool in run.path.glob("train-*"):
            pool.unlink()
    reader, modules = Reader(), run.load("probe")["modules"]
    reader.load_state_dict({name.removeprefix("reader."): value for name, value in modules.items()})
    return reader.eval()


# -- what methods leave ------------------------------------------------------------------------------------------------


def seen_by(model: nn.Module, processor: Any, picture: Any, question: str) -> tuple[str, Tensor]:
    """The model's answer and the visual tokens [K, D] that its language model was given."""
    given: list[Tensor] = []
    decoder = model.model.language_model
    hook = decoder.register_forward_pre_hook(
        lambda module, args, kwargs: given.append(kwargs["inputs_embeds"]), with_kwargs=True
    )
    try:
        text = answer(model, processor, picture, question)
    finally:
        hook.remove()
    before, behind = layouts(processor.tokenizer)["hf"].split(question)
    return text, given[0][0, len(before) : given[0].shape[1] - len(behind)]


@torch.no_grad()
def reads(reader: Reader, tokens: Tensor, question: Question) -> bool:
    """Whether the reader answers a question from these tokens [K, D]."""
    asked, target = encode([[question]])
    return bool(reader(tokens[None], asked).argmax(-1) == target)


def examine(reader: Reader, spec: str, fields: dict[str, Any], scenes: Sequence[tuple[int, Scene]]) -> dict[str, Any]:
    """Per task, the share that the model and the reader answer, from the same tokens."""
    model, processor = load()
    hits: dict[str, list[tuple[bool, bool]]] = {task: [] for task in TASKS}
    counts = []
    with prune(model, spec, processor=processor, **fields):
        for index, (picture, (seed, scene)) in enumerate(zip(pictures(len(scenes)), scenes, strict=True)):
            for task, question in testset.ask(index, seed, scene).items():
                text, tokens = seen_by(model, processor, picture, question.text)
                hits[task].append((text.lower().split()[:1] == [question.answer], reads(reader, tokens, question)))
                counts.append(tokens.shape[0])
    rates = {task: [float(np.mean([pair[who] for pair in pairs])) for who in (0, 1)] for task, pairs in hits.items()}
    return {"tokens": float(np.mean(counts)), "model": {t: r[0] for t, r in rates.items()},
            "probe": {t: r[1] for t, r in rates.items()}}  # fmt: skip


def table(record: dict[str, Any]) -> Table:
    """Points lost against all tokens, and their two parts."""
    made = Table(["method", "tokens", "model", "probe", "lost", "information", "shift", "shift in counting"])
    whole = record["rows"]["none"]
    for name, row in record["rows"].items():
        model, probe = (
            {task: 100 * (whole[who][task] - row[who][task]) for task in TASKS} for who in ("model", "probe")
        )
        lost, gone = (float(np.mean(list(points.values()))) for points in (model, probe))
        accuracy = (100 * float(np.mean(list(row[who].values()))) for who in ("model", "probe"))
        parts = (f"{lost:.1f}", f"{gone:.1f}", f"{lost - gone:.1f}", f"{model['count'] - probe['count']:.1f}")
        made.add(name, f"{row['tokens']:.0f}", *(f"{each:.1f}" for each in accuracy), *parts)
    made.caption = (
        f"{record['scenes']} test scenes, {len(TASKS)} questions each. Accuracy in %, mean of the tasks; lost: points "
        "below none. Information: what a reader of the kept tokens loses, which knows no order and no positions. "
        "Shift: the rest; negative where the reader loses more than the model."
    )
    return made


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m vtp_plugin.tiny.probe", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder of a training run; the probe stays there")
    parser.add_argument("--results", type=Path, required=True, help="folder for table.md and probe.json")
    parser.add_argument("--scenes", type=int, default=100, help="test scenes, a question of every task each")
    parser.add_argument("--methods", default=",".join(METHODS), help="that cut before the language model")
    chosen = parser.parse_args(arguments)
    run = Run(chosen.out)
    reader = learn(run, lambda shop, features: shop.networks["projector"](features))
    scenes, done = testset.select()[: chosen.scenes], chosen.results / "probe.json"
    rows = json.loads(done.read_text())["rows"] if done.exists() else {}
    cells = {"none": ("none", {})} | {
        f"{method} {keep:g}": (method, {"keep_ratio": keep}) for method in chosen.methods.split(",") for keep in KEEPS
    }
    for name, (spec, fields) in cells.items():
        config.resolve(spec, fields)
        if name not in rows:
            rows[name] = examine(reader, spec, fields, scenes)
            run.say(f"{name:<20}{rows[name]}")
        record = {"scenes": chosen.scenes, "rows": {name: rows[name] for name in cells if name in rows}}
        chosen.results.mkdir(parents=True, exist_ok=True)
        done.write_text(json.dumps(record, indent=1) + "\n")
        (chosen.results / "table.md").write_text(table(record).markdown() + "\n")


if __name__ == "__main__":
    main()
