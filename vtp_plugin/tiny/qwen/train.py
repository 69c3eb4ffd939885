"""Train `vtp-tiny-qwen`: `python -m vtp_plugin.tiny.qwen.train --out DIR`, on the embedded model's own weights.

`draw` makes the scenes of the embedded model's training. `aim` writes down what its projector says of each, averaged
over the areas of 8 x 8 tokens. `distil` teaches tower and merger to say that; dense heads, thrown away afterwards, ask
for what is under each patch. `answer` goes on with tower and merger, and learns low-rank factors beside the language
model's matrices, from questions, with tokens missing in many steps. `test` answers validation scenes, `export` puts
the weights into the package.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from vtp_plugin.tokens import at

from .. import testset
from ..examining import at_random, table
from ..fitting import Metrics, Plan, Run, fit, go_through, options, progress
from ..language import answer_loss, examine, write_lesson
from ..missing import Sight, renumber, some_missing
from ..modeling import normalize
from ..pool import draw, open_pool, open_scenes, write_features
from ..questions import CHOICES
from ..scenes import GRID, Scene
from ..store import QWEN_WEIGHTS, WEIGHTS, write
from ..train import HARD, draw_pools, start_from_package
from ..vision import dense_loss, look
from ..workshop import Batch, Workshop
from .folder import PARTS, UNITS, qwen_layouts, qwen_tokenizer
from .student import Student, nearest, on_axes, shrunk, student

TRAINS = {"distil": ("visual", "heads"), "answer": ("visual", "factors")}
PLANS = {
    "distil": Plan(steps=1200, rate=1.5e-3, batch=16),
    "answer": Plan(steps=900, rate=4e-4, batch=10, warmup=40, decay=0.01),
}
DENSE = 0.1  # weight of the dense heads beside the rows


def aim(run: Run) -> None:
    """What tower and projector of the embedded model make of every scene, as the merger should say it."""
    networks = Workshop(run).networks
    images = open_pool(run.path, "train")[0]
    with progress(run.console) as bar:
        task = bar.add_task("aims", total=len(images))
        write_features(run.path, images, partial(aimed, networks), partial(bar.advance, task))


@torch.no_grad()
def aimed(networks: nn.ModuleDict, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Tokens [B, 64, D] and what CLS attends to there [B, 64], in half precision."""
    view = look(networks["clip"], normalize(torch.from_numpy(images).to(networks["clip"].device)))
    maps = networks["projector"](view.patches), view.attention[..., None]
    tokens, attention = (shrunk(each).half().cpu().numpy() for each in maps)
    return tokens, attention[..., 0]


def things(labels: Tensor) -> Tensor:
    """Where something is: labels [B, 4, 144] of 12 x 12 patches -> zeros and ones [B, 64]."""
    there = (labels[:, :1] > 0).float().unflatten(2, (GRID, GRID))
    return F.adaptive_max_pool2d(there, UNITS).flatten(1)


def loss_distil(pupil: Student, batch: Batch) -> tuple[Tensor, Metrics]:
    """The unexplained share of the variance of what is wanted, tokens with something on them four times; and labels."""
    wanted = batch.view[0]
    patches, tokens = pupil.look(batch.tensor(batch.shop.images))
    weight = 1.0 + 3.0 * things(batch.labels)
    error = (tokens.float() - wanted).pow(2).mean(-1)  # [B, N]
    rows = (error * weight).sum() / weight.sum() / wanted.var()
    place = nearest().to(patches.device).expand(len(patches), -1)
    labels = batch.labels.gather(2, place[:, None].expand(-1, batch.labels.shape[1], -1))
    told = {name: logits.float() for name, logits in pupil.learned["heads"](patches).items()}
    dense, log = dense_loss(told, labels, place)
    return rows + DENSE * dense, {"rows": rows.item(), "dense": dense.item(), **log}


def loss_answer(pupil: Student, batch: Batch) -> tuple[Tensor, Metrics]:
    """Answers to all there is to see, or to what is left of it."""
    _, tokens = pupil.look(batch.tensor(batch.shop.images))
    sight = some_missing(tokens.to(pupil.reader.dtype), batch.view[1], things(batch.labels), batch.rng)
    if sight.tokens.shape[1] < UNITS**2:
        loss, _ = answer_loss(pupil.reader, on_axes(sight), batch.lesson)
        return loss, {"missing": loss.item()}
    loss, log = answer_loss(pupil.reader, on_axes(sight), batch.lesson, HARD)
    return loss, {"whole": loss.item(), **log}


LOSSES: dict[str, Callable[[Student, Batch], tuple[Tensor, Metrics]]] = {"distil": loss_distil, "answer": loss_answer}


def train(stage: str, run: Run, steps: int | None = None) -> None:
    """One stage by its plan; the matrices that rest in half precision."""
    stages = list(TRAINS)
    pupil = student(run, stages[: stages.index(stage)], torch.bfloat16)
    shop, plan = Workshop(run), PLANS[stage]
    shop.layouts = qwen_layouts(qwen_tokenizer())
    plan = replace(plan, steps=steps or plan.steps)

    def step_of(step: int) -> tuple[Tensor, Metrics]:
        rng = np.random.default_rng([60 + stages.index(stage), step])
        batch = Batch(shop, np.sort(rng.choice(len(shop.images), plan.batch, replace=False)), rng)
        with torch.autocast(torch.device(run.device).type, torch.bfloat16), sdpa_kernel(SDPBackend.MATH):
            return LOSSES[stage](pupil, batch)

    learned = nn.ModuleDict({name: pupil.learned[name] for name in TRAINS[stage]}).requires_grad_(True)
    fit(run, stage, learned, plan, step_of)


# -- how well it answers -----------------------------------------------------------------------------------------------


def trained(run: Run) -> Student:
    """After the last stage, rounded to half precision as it ships."""
    pupil = student(run, tuple(TRAINS))
    pupil.learned.half().float().eval()
    return pupil


@torch.no_grad()
def score(pupil: Student, images: np.ndarray, scenes: list[tuple[int, Scene]], keep: float = 1.0) -> Metrics:
    """Accuracy per task and over all; with a random share of the tokens, at their original positions."""
    layout, device = qwen_layouts(qwen_tokenizer())["plain"], pupil.reader.lm_head.weight.device
    asked = [list(testset.ask(index, seed, scene).values()) for index, (seed, scene) in enumerate(scenes)]
    lessons = [write_lesson(layout, asked[start : start + 25]).to(device) for start in range(0, len(asked), 25)]

    def see(part: slice) -> Sight:
        _, tokens = pupil.look(torch.from_numpy(np.array(images[part])).to(device))
        index = at_random(keep, tokens)
        left = at(tokens, index)
        return on_axes(renumber(left, index, tokens.shape[1], original=True))

    right = examine(pupil.reader, see, lessons)
    accuracy = {task: sum(values) / len(values) for task, values in right.items()}
    return accuracy | {"all": sum(accuracy.values()) / len(accuracy)}


def test(run: Run) -> None:
    """Validation and test scenes, with fewer tokens too, and with another scene's picture."""
    pupil = trained(run)
    numbered = list(enumerate(open_scenes(run.path, "validation")))
    scores = {"validation": score(pupil, open_pool(run.path, "validation")[0], numbered)}
    numbered = testset.select()
    images = np.stack([draw(scene) for _, scene in numbered])
    scores["test"] = score(pupil, images, numbered)
    for keep in (0.5, 0.25, 0.11):
        scores[f"test, random {keep}"] = score(pupil, images, numbered, keep)
    scores["another picture"] = score(pupil, np.roll(images, 1, 0), numbered)
    scores["chance"] = {task: 1 / len(choices) for task, choices in CHOICES.items()}
    sizes = {name: sum(weight.numel() for weight in pupil.learned[name].parameters()) for name in PARTS}
    run.record("parameters", sizes)
    run.record("accuracy", {name: {key: round(value, 4) for key, value in row.items()} for name, row in scores.items()})
    run.say(table(scores))


def export(run: Run) -> None:
    """Tower, merger and factors, in half precision."""
    learned = trained(run).learned
    state = {f"{part}.{name}": value for part in PARTS for name, value in learned[part].state_dict().items()}
    write(WEIGHTS / QWEN_WEIGHTS, state)
    run.say(f"exported {(WEIGHTS / QWEN_WEIGHTS).stat().st_size / 1e6:.1f} MB")


def draw_scenes(run: Run) -> None:
    """The embedded model's weights, and scenes by its recipe."""
    start_from_package(run)
    draw_pools(run)


STAGES: dict[str, Callable[..., None]] = {
    "draw": draw_scenes,
    "aim": aim,
    "distil": partial(train, "distil"),
    "answer": partial(train, "answer"),
    "test": test,
    "export": export,
}


def main(arguments: list[str] | None = None) -> None:
    chosen = options("qwen.train", __doc__, STAGES).parse_args(arguments)
    go_through(Run(chosen.out, chosen.device), chosen, STAGES, TRAINS)


if __name__ == "__main__":
    main()
