"""Train the embedded default: `python -m vtp_plugin.tiny.train --out DIR`, from nothing or from the package's weights.

`draw` makes the scenes. Then every stage trains what TRAINS names and keeps its own checkpoint: `vision` the CLIP, from
patch labels and captions; `symbols` the LLaMA, from symbolic scenes; `sharpen` the CLIP once more, with patches missing
in some steps and pictures of other sizes in others; `features` writes down what the CLIP makes of all scenes; `fit` the
projector, from these features to the symbols; `join` projector and LLaMA, from pictures, with visual tokens missing in
many steps; `polish` does the same once more, from a higher rate. `test` answers the questions, `export` puts the
weights into the package, `testset` its test scenes.

`--shipped` starts from the package's weights, made deeper if they have fewer layers; then `fit` leads to what projector
and CLIP said before `sharpen`.
"""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn

from . import testset
from .examining import score, table
from .fitting import Metrics, Plan, Run, fit, go_through, options, progress
from .language import answer_loss
from .missing import renumber, some_missing, whole
from .modeling import deepen, normalize
from .pool import draw, draw_pool, open_pool, open_scenes, write_features
from .prompts import layouts, load_llama_tokenizer
from .questions import CHOICES
from .store import WEIGHTS, export, load_weights
from .tokenizers import corpus, train_clip_tokenizer, train_llama_tokenizer
from .vision import look, show, vision_loss
from .workshop import SHIPPED, TRAINS, Batch, Workshop

POOL = {"validation": 500, "train": 5000}
PLANS = {
    "vision": Plan(steps=1500, rate=1e-3, batch=32),
    "symbols": Plan(steps=1400, rate=1.5e-3, batch=16),
    "sharpen": Plan(steps=850, rate=1e-3, batch=32),
    "fit": Plan(steps=250, rate=3e-3, batch=32, warmup=10),
    "join": Plan(steps=700, rate=4e-4, batch=10, warmup=30),
}
BLIND, RESIZED = 0.2, 0.2  # shares of the steps of `sharpen` with missing patches and with pictures of other sizes
HARD = {"count": 4.0}  # weight of a task where all of the picture is there to see: counting is learned last
VARIED = 0.1  # share of the steps of `join` that show patches missing in the tower, or another size


# -- what each stage minimises -----------------------------------------------------------------------------------------


def loss_vision(nets: nn.ModuleDict, batch: Batch, blind: float = 0.0, resized: float = 0.0) -> tuple[Tensor, Metrics]:
    """In some steps the tower sees a random part of the patches, or pictures of another size."""
    shown = show(batch.pixels, batch.rng, blind, resized)
    labels = batch.labels.gather(2, shown.place[:, None].expand(-1, batch.labels.shape[1], -1))
    view = look(nets["clip"], shown.pixels, shown.seen)
    loss, log = vision_loss(nets["clip"], nets["heads"], view, labels, shown.place, batch.captions)
    return loss, log if shown.place.shape[1] == batch.labels.shape[2] else {"varied": log["dense"]}


def loss_symbols(nets: nn.ModuleDict, batch: Batch) -> tuple[Tensor, Metrics]:
    return answer_loss(nets["llama"], whole(nets["symbols"](batch.labels)), batch.lesson)


def loss_fit(nets: nn.ModuleDict, batch: Batch) -> tuple[Tensor, Metrics]:
    """The unexplained share of the variance of what is wanted; patches with something on them count four times."""
    with torch.no_grad():
        wanted = former(nets, batch.pixels) if "former_clip" in nets else nets["symbols"](batch.labels)
    error = (nets["projector"](batch.view[0]) - wanted).pow(2).mean(-1)  # [B, N]
    weight = 1.0 + 3.0 * (batch.labels[:, 0] > 0)
    return (error * weight).sum() / weight.sum() / wanted.var(), {}


def former(nets: nn.ModuleDict, pixels: Tensor) -> Tensor:  # [B, N, D]
    """What the language model was shown before the tower went on."""
    return nets["former_projector"](look(nets["former_clip"], pixels).patches)


def loss_join(nets: nn.ModuleDict, batch: Batch) -> tuple[Tensor, Metrics]:
    """Answers to all there is to see, to what is left of it, or to another size of it."""
    if batch.rng.random() < VARIED:
        shown = show(batch.pixels, batch.rng, blind=0.4, resized=0.6)
        with torch.no_grad():
            features = look(nets["clip"], shown.pixels, shown.seen).patches
        tokens, count = nets["projector"](features), batch.labels.shape[2]
        sight = renumber(tokens, shown.place, count, original=tokens.shape[1] < count and batch.rng.random() < 0.5)
        loss, _ = answer_loss(nets["llama"], sight, batch.lesson)
        return loss, {"varied": loss.item()}
    features, attention = batch.view
    things = (batch.labels[:, 0] > 0).float()
    sight = some_missing(nets["projector"](features), attention, things, batch.rng)
    if sight.tokens.shape[1] < features.shape[1]:
        loss, _ = answer_loss(nets["llama"], sight, batch.lesson)
        return loss, {"missing": loss.item()}
    loss, log = answer_loss(nets["llama"], sight, batch.lesson, HARD)
    return loss, {"whole": loss.item(), **log}


LOSSES: dict[str, Callable[[nn.ModuleDict, Batch], tuple[Tensor, Metrics]]] = {
    "vision": loss_vision,
    "symbols": loss_symbols,
    "sharpen": partial(loss_vision, blind=BLIND, resized=RESIZED),
    "fit": loss_fit,
    "join": loss_join,
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


def note_features(run: Run) -> None:
    """What the tower makes of every scene of the pool; the stages after it read that."""
    shop = Workshop(run, "fit")
    with progress(run.console) as bar:
        task = bar.add_task("features", total=len(shop.images))
        write_features(run.path, shop.images, partial(glimpse, shop.networks["clip"]), partial(bar.advance, task))


@torch.no_grad()
def glimpse(clip: nn.Module, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Features [B, N, D] and attention of CLS [B, N] of images [B, H, W, 3], in half precision."""
    view = look(clip, normalize(torch.from_numpy(images).to(clip.device)))
    return view.patches.half().cpu().numpy(), view.attention.half().cpu().numpy()


def start_from_package(run: Run) -> None:
    """Tokenizers and weights of the shipped model; a run that has begun with one goes on with that."""
    if run.load("shipped"):
        return
    shutil.copytree(WEIGHTS, run.path, dirs_exist_ok=True)
    weights = {name: value.float() for name, value in load_weights("clip", "projector", prefixed=True).items()}
    llama = {name: value.float() for name, value in load_weights("llama").items()}
    weights |= {f"llama.{name}": value for name, value in deepen(llama).items()}
    run.save("shipped", {"modules": weights})


def trained(run: Run) -> nn.ModuleDict:
    """The networks after the last stage, rounded to half precision as they ship."""
    return Workshop(run).networks.half().float()


def export_weights(run: Run) -> None:
    """Put the weights and the tokenizers into the package."""
    networks = trained(run)
    export(*(networks[name] for name in SHIPPED), source=run.path)
    run.say(f"exported {sum(file.stat().st_size for file in WEIGHTS.rglob('*') if file.is_file()) / 1e6:.1f} MB")


def test_answers(run: Run) -> None:
    """Answer validation and test scenes, with fewer tokens too, and with another scene's picture."""
    networks, layout = trained(run), layouts(load_llama_tokenizer(run.path))["llava"]
    numbered = list(enumerate(open_scenes(run.path, "validation")))
    scores = {"validation": score(networks, layout, open_pool(run.path, "validation")[0], numbered, device=run.device)}
    numbered = testset.select()
    images = np.stack([draw(scene) for _, scene in numbered])
    scores["test"] = score(networks, layout, images, numbered, device=run.device)
    for keep in (0.5, 0.25, 0.11):
        scores[f"test, random {keep}"] = score(networks, layout, images, numbered, keep, run.device)
    scores["another picture"] = score(networks, layout, np.roll(images, 1, 0), numbered, device=run.device)
    scores["chance"] = {task: 1 / len(choices) for task, choices in CHOICES.items()}
    sizes = {name: sum(weight.numel() for weight in networks[name].parameters()) for name in SHIPPED}
    run.record("parameters", sizes)
    run.record("accuracy", {name: {key: round(value, 4) for key, value in row.items()} for name, row in scores.items()})
    run.say(table(scores))


STAGES: dict[str, Callable[..., None]] = {
    "draw": draw_pools,
    "vision": partial(train, "vision"),
    "symbols": partial(train, "symbols"),
    "sharpen": partial(train, "sharpen"),
    "features": note_features,
    "fit": partial(train, "fit"),
    "join": partial(train, "join"),
    "test": test_answers,
    "export": export_weights,
    "testset": lambda run: testset.write(),
}


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = options("train", __doc__, STAGES)
    parser.add_argument("--shipped", action="store_true", help="start from the package's weights")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    chosen = parse(arguments)
    run = Run(chosen.out, chosen.device)
    if chosen.shipped:
        start_from_package(run)
    go_through(run, chosen, STAGES, TRAINS)


if __name__ == "__main__":
    main()
