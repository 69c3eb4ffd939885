"""Train the embedded default from nothing: `python -m vtp_plugin.tiny.train --out DIR`.

`draw` makes the scenes. Then every stage trains what TRAINS names and keeps its own checkpoint: `vision` the CLIP, from
patch labels and captions; `symbols` the LLaMA, from symbolic scenes; `sharpen` the CLIP once more; `fit` the projector,
from the CLIP's features to the symbols; `join` projector and LLaMA, from pictures; `caption` the same, captions among
the questions. `test` answers the questions, `export` puts the weights into the package, `testset` its test scenes.
"""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from . import testset
from .checkpoint import WEIGHTS, export, load_weights
from .fitting import Metrics, Plan, Run, fit, progress
from .language import Lesson, Symbols, answer_loss, examine, write_lesson
from .modeling import build, normalize
from .pool import draw, draw_pool, open_pool
from .prompts import Layout, layouts, load_llama_tokenizer
from .questions import CHOICES, Question, ask_caption, ask_eight
from .scenes import Scene, sample_scene
from .tokenizers import corpus, load_clip_tokenizer, train_clip_tokenizer, train_llama_tokenizer
from .vision import Captions, DenseHeads, look, vision_loss, write_captions

POOL = {"validation": 1000, "train": 16000}
TRAINS = {
    "vision": ("clip", "heads"),
    "symbols": ("symbols", "llama"),
    "sharpen": ("clip", "heads"),
    "fit": ("projector",),
    "join": ("projector", "llama"),
    "caption": ("projector", "llama"),
}
PLANS = {
    "vision": Plan(steps=1500, rate=1e-3, batch=32),
    "symbols": Plan(steps=1400, rate=1.5e-3, batch=16),
    "sharpen": Plan(steps=850, rate=1e-3, batch=32),
    "fit": Plan(steps=250, rate=3e-3, batch=32, warmup=10),
    "join": Plan(steps=1200, rate=1e-3, batch=16, warmup=40),
    "caption": Plan(steps=800, rate=6e-4, batch=16, warmup=40),
}
SHIPPED = ("clip", "projector", "llama")


class Workshop:
    """The pool, the tokenizers and the networks as the stages so far left them."""

    def __init__(self, run: Run, until: str = "") -> None:
        self.run, self.device = run, run.device
        self.clip_tokenizer = load_clip_tokenizer(run.path / "clip")
        self.llama_tokenizer = load_llama_tokenizer(run.path)
        self.layouts = layouts(self.llama_tokenizer)
        self.images, self.labels = open_pool(run.path, "train")
        networks = build(len(self.clip_tokenizer), len(self.llama_tokenizer))
        self.networks = nn.ModuleDict(networks | {"heads": DenseHeads(), "symbols": Symbols()}).to(self.device)
        for stage in list(TRAINS)[: list(TRAINS).index(until) if until else None]:
            self.adopt(stage)
        self.networks.eval().requires_grad_(False)

    def adopt(self, stage: str) -> None:
        """Take over what a stage trained, if it has run."""
        state = self.run.load(stage)
        for name in TRAINS[stage] if state else ():
            prefix, modules = f"{name}.", state["modules"]
            own = {key.removeprefix(prefix): value for key, value in modules.items() if key.startswith(prefix)}
            self.networks[name].load_state_dict(own)

    def batch(self, stage: str, size: int, step: int) -> Batch:
        rng = np.random.default_rng([10 + list(TRAINS).index(stage), step])
        return Batch(self, np.sort(rng.choice(len(self.images), size, replace=False)), rng, stage == "caption")


@dataclass
class Batch:
    """Some scenes of the pool; what a stage does not read is not made."""

    shop: Workshop
    chosen: np.ndarray  # [B] seeds
    rng: np.random.Generator
    captioned: bool = False

    @cached_property
    def scenes(self) -> list[Scene]:
        return [sample_scene("train", int(seed)) for seed in self.chosen]

    @cached_property
    def pixels(self) -> Tensor:  # [B, 3, H, W]
        return normalize(torch.from_numpy(self.shop.images[self.chosen]).to(self.shop.device))

    @cached_property
    def labels(self) -> Tensor:  # [B, 4, N]
        return torch.from_numpy(self.shop.labels[self.chosen]).long().to(self.shop.device)

    @cached_property
    def captions(self) -> Captions:
        return write_captions(self.scenes, self.shop.clip_tokenizer, self.rng).to(self.shop.device)

    @cached_property
    def lesson(self) -> Lesson:
        """Eight questions about each scene, in one of the hosts' layouts."""
        prompts = list(self.shop.layouts.values())
        layout = prompts[self.rng.integers(len(prompts))]
        return write_lesson(layout, [self.ask(scene) for scene in self.scenes]).to(self.shop.device)

    def ask(self, scene: Scene) -> list[Question]:
        return ask_eight(scene, self.rng) + [ask_caption(scene)] * self.captioned


# -- what each stage minimises -----------------------------------------------------------------------------------------


def loss_vision(nets: nn.ModuleDict, batch: Batch) -> tuple[Tensor, Metrics]:
    return vision_loss(nets["clip"], nets["heads"], look(nets["clip"], batch.pixels), batch.labels, batch.captions)


def loss_symbols(nets: nn.ModuleDict, batch: Batch) -> tuple[Tensor, Metrics]:
    return answer_loss(nets["llama"], nets["symbols"](batch.labels), batch.lesson)


def loss_fit(nets: nn.ModuleDict, batch: Batch) -> tuple[Tensor, Metrics]:
    """The unexplained share of the symbols' variance; patches with something on them count four times."""
    wanted = nets["symbols"](batch.labels)
    error = (nets["projector"](look(nets["clip"], batch.pixels).patches) - wanted).pow(2).mean(-1)  # [B, N]
    weight = 1.0 + 3.0 * (batch.labels[:, 0] > 0)
    return (error * weight).sum() / weight.sum() / wanted.var(), {}


def loss_join(nets: nn.ModuleDict, batch: Batch) -> tuple[Tensor, Metrics]:
    return answer_loss(nets["llama"], nets["projector"](look(nets["clip"], batch.pixels).patches), batch.lesson)


LOSSES = {
    "vision": loss_vision,
    "symbols": loss_symbols,
    "sharpen": loss_vision,
    "fit": loss_fit,
    "join": loss_join,
    "caption": loss_join,
}


# -- stages ------------------------------------------------------------------------------------------------------------


def draw_pools(run: Run) -> None:
    """Tokenizers and pictures."""
    if not (run.path / "clip").exists():
        lines = corpus()
        train_llama_tokenizer(run.path / "tokenizer.model", lines)
        train_clip_tokenizer(run.path / "clip", lines)
    for split, size in POOL.items():
        if not (run.path / f"{split}-images.npy").exists():
            with progress(run.console) as bar:
                task = bar.add_task(f"drawing {split} scenes", total=size)
                draw_pool(run.path, split, size, partial(bar.advance, task))


def train(stage: str, run: Run, steps: int | None = None) -> None:
    """One stage by its plan."""
    shop, plan = Workshop(run, stage), PLANS[stage]
    plan = replace(plan, steps=steps) if steps else plan
    learned = nn.ModuleDict({name: shop.networks[name] for name in TRAINS[stage]}).requires_grad_(True)
    fit(run, stage, learned, plan, lambda step: LOSSES[stage](shop.networks, shop.batch(stage, plan.batch, step)))


def start_from_package(run: Run) -> None:
    """Checkpoints and tokenizers of the shipped model, as if `sharpen` and `join` had just ended."""
    shutil.copytree(WEIGHTS, run.path, dirs_exist_ok=True)
    for stage, names in {"sharpen": ("clip",), "join": ("projector", "llama")}.items():
        modules = {name: value.float() for name, value in load_weights(*names, prefixed=True).items()}
        heads = {f"heads.{name}": value for name, value in DenseHeads().state_dict().items()}
        run.save(stage, {"modules": modules | (heads if stage == "sharpen" else {})})


def trained(run: Run) -> nn.ModuleDict:
    """The networks after the last stage, rounded to half precision as they ship."""
    return Workshop(run).networks.half().float()


def export_weights(run: Run) -> None:
    """Put the weights and the tokenizers into the package."""
    networks = trained(run)
    export(*(networks[name] for name in SHIPPED), source=run.path)
    run.say(f"exported {sum(file.stat().st_size for file in WEIGHTS.rglob('*') if file.is_file()) / 1e6:.1f} MB")


def test_answers(run: Run) -> None:
    """Answer validation and test scenes, also with another scene's picture: what the questions alone give away."""
    networks, layout = trained(run), layouts(load_llama_tokenizer(run.path))["llava"]
    numbered = [(seed, sample_scene("validation", seed)) for seed in range(POOL["validation"])]
    scores = {"validation": score(run, networks, layout, open_pool(run.path, "validation")[0], numbered)}
    numbered = testset.select()
    images = np.stack([draw(scene) for _, scene in numbered])
    scores["test"] = score(run, networks, layout, images, numbered)
    scores["another picture"] = score(run, networks, layout, np.roll(images, 1, 0), numbered)
    scores["chance"] = {task: 1 / len(choices) for task, choices in CHOICES.items()}
    sizes = {name: sum(weight.numel() for weight in networks[name].parameters()) for name in SHIPPED}
    run.record("parameters", sizes)
    run.record("accuracy", {name: {key: round(value, 4) for key, value in row.items()} for name, row in scores.items()})
    run.say(table(scores))


def score(
    run: Run, nets: nn.ModuleDict, layout: Layout, images: np.ndarray, scenes: list[tuple[int, Scene]]
) -> Metrics:
    """Accuracy per task and over all."""
    asked = [list(testset.ask(index, seed, scene).values()) for index, (seed, scene) in enumerate(scenes)]
    lessons = [write_lesson(layout, asked[start : start + 25]).to(run.device) for start in range(0, len(asked), 25)]

    def see(part: slice) -> Tensor:
        pixels = normalize(torch.from_numpy(np.array(images[part])).to(run.device))
        return nets["projector"](look(nets["clip"], pixels).patches)

    accuracy = examine(nets["llama"], see, lessons)
    return accuracy | {"all": sum(accuracy.values()) / len(accuracy)}


def table(scores: dict[str, Metrics]) -> str:
    """Rows of percentages, for log.txt."""
    columns = [*CHOICES, "all"]
    lines = [f"{'accuracy, %':<16}" + "".join(f"{name:>11}" for name in columns)]
    for name, row in scores.items():
        values = (f"{100 * row[task]:11.1f}" if task in row else f"{'':>11}" for task in columns)
        lines.append(f"{name:<16}" + "".join(values))
    return "\n".join(lines)


STAGES: dict[str, Callable[..., None]] = {
    "draw": draw_pools,
    **{stage: partial(train, stage) for stage in TRAINS},
    "test": test_answers,
    "export": export_weights,
    "testset": lambda run: testset.write(),
}


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m vtp_plugin.tiny.train", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for checkpoints, log.txt and log.json")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--stage", choices=STAGES, action="append", help="only these stages (default: all, in order)")
    parser.add_argument("--shipped", action="store_true", help="start from the package's weights")
    parser.add_argument("--steps", type=int, help="steps of each trained stage, instead of the recipe's")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    chosen = parse(arguments)
    run = Run(chosen.out, chosen.device)
    if chosen.shipped:
        start_from_package(run)
    for name in chosen.stage or STAGES:
        STAGES[name](run, **({"steps": chosen.steps} if name in TRAINS else {}))


if __name__ == "__main__":
    main()
