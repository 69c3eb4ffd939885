"""Train `vtp-tiny-video`: `python -m vtp_plugin.tiny.clips.train --out DIR`, on the embedded model's own weights.

`draw` makes clips and writes down what the tower makes of their frames, as LLaVA-NeXT-Video pools them. `train` learns
low-rank factors beside the language model's matrices and the projector; the tower rests. A linear head, thrown away
afterwards, asks every visual token halfway through the language model what has come to its place since the frame
before, or left it. `test` answers validation clips, `export` puts the factors into the package.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..examining import shipped
from ..fitting import Metrics, Plan, Run, fit, go_through, options, progress
from ..language import answer_loss, examine, write_lesson
from ..lowrank import adapt
from ..missing import Sight, whole
from ..modeling import LLAMA_WIDTH, normalize
from ..prompts import Layout, layouts, load_llama_tokenizer
from ..scenes import SHAPES, SIZE, Split, Thing
from ..store import CLIP_FACTORS, WEIGHTS, write
from ..vision import look
from .clip import ASKED, FRAMES, Clip, sample_clip
from .folder import CELLS, POOLED
from .missing import Shown, some_missing

POOL = {"validation": 300, "train": 900}
RANK = 16
PLAN = Plan(steps=4700, rate=2e-3, batch=6, warmup=40, decay=0.01)
EXCERPTS = 0.35  # share of the steps whose clips show one change only
BACKWARDS = 0.5  # share of the clips that run from their end to their beginning
HALFWAY, NEWS = 4, 0.5  # the decoder layer behind which tokens are asked for news, and how much that weighs
STAGE = "clips"


# -- clips written down ------------------------------------------------------------------------------------------------


def pooled(maps: Tensor) -> Tensor:  # [T, N, ...] of the tower -> [T, n, ...]
    """Means over squares of patches."""
    squares = maps.unflatten(1, (CELLS, POOLED, CELLS, POOLED))
    return squares.mean((2, 4)).flatten(1, 2)


def covered(thing: Thing) -> np.ndarray:  # bool [n]
    """The tokens of a frame that a thing lies on, at least a quarter of it."""
    edges, side = np.arange(CELLS) * (SIZE // CELLS), SIZE // CELLS
    x0, y0, x1, y1 = thing.box
    columns = np.clip(np.minimum(edges + side, x1) - np.maximum(edges, x0), 0, side) / side
    rows = np.clip(np.minimum(edges + side, y1) - np.maximum(edges, y0), 0, side) / side
    return np.outer(rows, columns).ravel() >= 0.25


def labels(clip: Clip) -> np.ndarray:  # uint8 [2, T, n]
    """Where things are, 1; and news: 1 + shape where one has come to a token, 9 + shape where one has left it."""
    there, news = np.zeros((2, FRAMES, CELLS**2), np.uint8)
    for stay in clip.stays:
        under = covered(stay.thing)
        there[stay.start : stay.stop, under] = 1
        if stay.stop < FRAMES:
            news[stay.stop, under] = 1 + len(SHAPES) + SHAPES.index(stay.thing.shape)
    for stay in clip.stays:
        if stay.start > 0:
            news[stay.start, covered(stay.thing)] = 1 + SHAPES.index(stay.thing.shape)
    return np.stack([there, news])


@torch.no_grad()
def glimpse(clip: nn.Module, frames: np.ndarray) -> tuple[Tensor, Tensor]:
    """Pooled features [T, n, C] and pooled attention of CLS [T, n] of frames, in half precision."""
    with torch.autocast(clip.device.type, torch.bfloat16):
        view = look(clip, normalize(torch.from_numpy(frames).to(clip.device)))
    return pooled(view.patches.float()).half().cpu(), pooled(view.attention.float()).half().cpu()


def draw_clips(run: Run) -> None:
    """Clips, labels and features of both splits."""
    tower = shipped()[0]["clip"].to(run.device)
    for split, size in POOL.items():
        if (run.path / f"{split}-clips.pkl").exists():
            continue
        clips, rows = [], []
        with progress(run.console) as bar:
            for seed in bar.track(range(size), description=f"{split} clips"):
                clips.append(sample_clip(split, seed))
                rows.append((*glimpse(tower, clips[-1].frames()), torch.from_numpy(labels(clips[-1]))))
        features, attention, marks = (torch.stack(column) for column in zip(*rows, strict=True))
        torch.save({"features": features, "attention": attention, "labels": marks}, run.path / f"{split}-seen.pt")
        (run.path / f"{split}-clips.pkl").write_bytes(pickle.dumps(clips))


class Pool:
    """The clips of a split and what the tower made of them."""

    def __init__(self, run: Run, split: Split) -> None:
        self.clips: list[Clip] = pickle.loads((run.path / f"{split}-clips.pkl").read_bytes())
        seen = torch.load(run.path / f"{split}-seen.pt", mmap=True, weights_only=True)
        self.features, self.attention, self.labels = (seen[name] for name in ("features", "attention", "labels"))

    def shown(self, chosen: np.ndarray, projector: nn.Module, orders: np.ndarray | None = None) -> Shown:
        """Clips [B] as the language model is shown them; `orders` [B, T] shows their frames in another order."""
        orders = np.tile(np.arange(FRAMES), (len(chosen), 1)) if orders is None else orders
        device = next(projector.parameters()).device
        parts = (self.features, self.attention, self.labels[:, 0])
        features, attention, there = (part[chosen[:, None], orders].float().flatten(1, 2).to(device) for part in parts)
        return Shown(projector(features), attention, there)


# -- training ----------------------------------------------------------------------------------------------------------


@dataclass
class Student:
    """The language model, frozen, and what is learned: `factors` beside it, the projector, a head for news."""

    llama: nn.Module
    learned: nn.ModuleDict

    @property
    def projector(self) -> nn.Module:
        return self.learned["projector"]


def student(run: Run, dtype: torch.dtype = torch.float32) -> Student:
    """From the package, or as far as it was trained; the matrices that rest in half precision if so asked."""
    torch.manual_seed(0)
    base = shipped()[0].to(run.device)
    llama = base["llama"].to(dtype)
    parts = {"factors": adapt(llama, RANK), "projector": base["projector"].requires_grad_(True)}
    learned = nn.ModuleDict(parts | {"news": nn.Linear(LLAMA_WIDTH, 1 + 2 * len(SHAPES))}).to(run.device)
    if state := run.load(STAGE):
        learned.load_state_dict(state["modules"])
    return Student(llama, learned)


def layout() -> Layout:
    """The ids of LLaVA-NeXT-Video's prompt are those of LLaVA's, with another placeholder."""
    return layouts(load_llama_tokenizer(WEIGHTS))["hf"]


def again(clip: Clip, rng: np.random.Generator, simple: bool) -> tuple[Clip, np.ndarray]:
    """A clip at other times or one change of it, sometimes from its end to its beginning; and which frames show it."""
    clip, order = clip.excerpt(rng) if simple else clip.retimed(rng)
    return (clip.backwards(), order[::-1]) if rng.random() < BACKWARDS else (clip, order)


def train(run: Run, steps: int | None = None) -> None:
    pupil, pool, prompts = student(run, torch.bfloat16), Pool(run, "train"), layout()
    plan = replace(PLAN, steps=steps or PLAN.steps)
    heard: list[Tensor] = []
    pupil.llama.model.layers[HALFWAY - 1].register_forward_hook(lambda layer, args, output: heard.append(output))

    def step_of(step: int) -> tuple[Tensor, Metrics]:
        heard.clear()
        rng = np.random.default_rng([40, step])
        chosen = np.sort(rng.choice(len(pool.clips), plan.batch, replace=False))
        simple = rng.random() < EXCERPTS
        clips, orders = zip(*(again(pool.clips[i], rng, simple) for i in chosen), strict=True)
        asked = [clip.one_change() if simple else [*clip.questions().values()] for clip in clips]
        lesson = write_lesson(prompts, asked).to(run.device)
        sight, index = some_missing(pool.shown(chosen, pupil.projector, np.stack(orders)), rng)
        sight = replace(sight, tokens=sight.tokens.to(pupil.llama.dtype))
        with torch.autocast(torch.device(run.device).type, torch.bfloat16), sdpa_kernel(SDPBackend.MATH):
            loss, log = answer_loss(pupil.llama, sight, lesson)
            told = pupil.learned["news"](heard[0][:, len(lesson.prefix) :][:, : index.shape[1]])
        truth = torch.from_numpy(np.stack([labels(clip)[1] for clip in clips])).flatten(1).long()
        truth = truth.to(run.device).gather(1, index)
        weight = torch.full((told.shape[-1],), 1.0, device=told.device)
        weight[0] = 0.05
        news = F.cross_entropy(told.float().flatten(0, 1), truth.flatten(), weight)
        if index.shape[1] < pool.features.shape[1] * pool.features.shape[2]:
            return loss + NEWS * news, {"missing": loss.item()}
        if simple:
            return loss + NEWS * news, {"excerpt": loss.item(), **{f"one {name}": value for name, value in log.items()}}
        return loss + NEWS * news, {"whole": loss.item(), "news": news.item(), **log}

    fit(run, STAGE, pupil.learned, plan, step_of)


# -- how well it answers -----------------------------------------------------------------------------------------------


def score(llama: nn.Module, clips: list[Clip], sight_of: Callable[[slice], Sight], device: str) -> Metrics:
    """Accuracy per task and the mean of those that need time."""
    asked = [[*clip.questions().values()] for clip in clips]
    lessons = [write_lesson(layout(), asked[start : start + 25]).to(device) for start in range(0, len(asked), 25)]
    with torch.no_grad():
        right = examine(llama, sight_of, lessons)
    accuracy = {task: sum(values) / len(values) for task, values in right.items()}
    return accuracy | {"time": sum(accuracy[task] for task in accuracy if task != "digit") / (len(accuracy) - 1)}


def test(run: Run) -> None:
    """Validation clips: whole, with random tokens, and three controls that take the time away."""
    pupil, pool = student(run), Pool(run, "validation")
    everyone, shape = np.arange(len(pool.clips)), (len(pool.clips), FRAMES)

    def seen(part: slice, keep: float = 1.0, orders: np.ndarray | None = None) -> Sight:
        shown = pool.shown(everyone[part], pupil.projector, None if orders is None else orders[part])
        return at_random(shown.tokens, keep) if keep < 1 else whole(shown.tokens)

    shuffled = np.random.default_rng(7).permuted(np.tile(np.arange(FRAMES), (len(pool.clips), 1)), axis=1)
    ways: dict[str, Callable[[slice], Sight]] = {"validation": seen}
    ways |= {f"validation, random {keep}": partial(seen, keep=keep) for keep in (0.5, 0.25, 0.11)}
    ways |= {
        "frames shuffled": partial(seen, orders=shuffled),
        "the last frame only": partial(seen, orders=np.full(shape, FRAMES - 1)),
        "the first frame only": partial(seen, orders=np.zeros(shape, int)),
    }
    scores = {name: score(pupil.llama, pool.clips, way, run.device) for name, way in ways.items()}
    scores["chance"] = {task: chance for task, (_, chance) in ASKED.items()}
    run.record("accuracy", {name: {key: round(v, 4) for key, v in row.items()} for name, row in scores.items()})
    for name, row in scores.items():
        run.say(f"{name:<26}" + "  ".join(f"{task} {100 * value:5.1f}" for task, value in row.items()))


def at_random(tokens: Tensor, keep: float) -> Sight:
    """A share of the tokens at their original positions."""
    noise = torch.rand(tokens.shape[:2], generator=torch.Generator().manual_seed(0))
    index = noise.topk(round(keep * tokens.shape[1]), 1).indices.sort(1).values.to(tokens.device)
    return Sight(tokens.gather(1, index[..., None].expand(-1, -1, tokens.shape[-1])), index, tokens.shape[1])


def export(run: Run) -> None:
    """The factors and the projector, in half precision."""
    state = {name: value for name, value in student(run).learned.state_dict().items() if not name.startswith("news.")}
    write(WEIGHTS / CLIP_FACTORS, state)
    run.say(f"exported {(WEIGHTS / CLIP_FACTORS).stat().st_size / 1e6:.1f} MB")


STAGES: dict[str, Callable[..., None]] = {"draw": draw_clips, "train": train, "test": test, "export": export}


def main(arguments: list[str] | None = None) -> None:
    chosen = options("clips.train", __doc__, STAGES).parse_args(arguments)
    go_through(Run(chosen.out, chosen.device), chosen, STAGES, {"train"})


if __name__ == "__main__":
    main()
