"""What the stages of training share: the pool, the tokenizers and the networks so far, and batches of them."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor, nn

from .fitting import Run
from .language import Lesson, Symbols, write_lesson
from .modeling import Projector, build, normalize
from .pool import open_features, open_pool, open_scenes
from .prompts import layouts, load_llama_tokenizer
from .questions import Question, ask_all, ask_caption
from .scenes import Scene
from .tokenizers import load_clip_tokenizer
from .vision import Captions, DenseHeads, look, write_captions

TRAINS = {  # which networks each stage trains
    "vision": ("clip", "heads"),
    "symbols": ("symbols", "llama"),
    "sharpen": ("clip", "heads"),
    "fit": ("projector",),
    "join": ("projector", "llama"),
}
SHIPPED = ("clip", "projector", "llama")
CAPTIONED = 0.25  # share of the lessons that ask for a caption, too


class Workshop:
    """The pool, the tokenizers and the networks as the stages so far left them."""

    def __init__(self, run: Run, until: str = "") -> None:
        self.run, self.device = run, run.device
        self.clip_tokenizer = load_clip_tokenizer(run.path / "clip")
        self.llama_tokenizer = load_llama_tokenizer(run.path)
        self.layouts = layouts(self.llama_tokenizer)
        self.images, self.labels = open_pool(run.path, "train")
        self.scenes = open_scenes(run.path, "train")
        self.features = open_features(run.path)
        networks = build(len(self.clip_tokenizer), len(self.llama_tokenizer))
        self.networks = nn.ModuleDict(networks | {"heads": DenseHeads(), "symbols": Symbols()}).to(self.device)
        if begun := run.load("shipped"):
            self.networks.update({"former_clip": copy.deepcopy(networks["clip"]), "former_projector": Projector()})
            self.adopt(begun["modules"], SHIPPED)
            self.adopt(begun["modules"], ("clip", "projector"), "former_")
        for stage in list(TRAINS)[: list(TRAINS).index(until) if until else None]:
            if state := run.load(stage):
                self.adopt(state["modules"], TRAINS[stage])
        self.networks.to(self.device).eval().requires_grad_(False)

    def adopt(self, modules: dict[str, Tensor], names: tuple[str, ...], into: str = "") -> None:
        """Take over what was trained."""
        for name in names:
            prefix = f"{name}."
            own = {key.removeprefix(prefix): value for key, value in modules.items() if key.startswith(prefix)}
            self.networks[into + name].load_state_dict(own)

    def batch(self, stage: str, size: int, step: int) -> Batch:
        rng = np.random.default_rng([20 + list(TRAINS).index(stage), step])
        return Batch(self, np.sort(rng.choice(len(self.images), size, replace=False)), rng)


@dataclass
class Batch:
    """Some scenes of the pool; what a stage does not read is not made."""

    shop: Workshop
    chosen: np.ndarray  # [B] seeds
    rng: np.random.Generator

    def tensor(self, values: np.ndarray) -> Tensor:
        return torch.from_numpy(values[self.chosen]).to(self.shop.device)

    @cached_property
    def scenes(self) -> list[Scene]:
        return [self.shop.scenes[seed] for seed in self.chosen]

    @cached_property
    def pixels(self) -> Tensor:  # [B, 3, H, W]
        return normalize(self.tensor(self.shop.images))

    @cached_property
    def labels(self) -> Tensor:  # [B, 4, N]
        return self.tensor(self.shop.labels).long()

    @cached_property
    def captions(self) -> Captions:
        return write_captions(self.scenes, self.shop.clip_tokenizer, self.rng).to(self.shop.device)

    @cached_property
    def view(self) -> tuple[Tensor, Tensor]:
        """Features [B, N, D] and attention of CLS [B, N], written down or made now."""
        if self.shop.features is None:
            view = look(self.shop.networks["clip"], self.pixels)
            return view.patches, view.attention
        features, attention = (self.tensor(values).float() for values in self.shop.features)
        return features, attention

    @cached_property
    def lesson(self) -> Lesson:
        """A question of every task about each scene, sometimes a caption, in one of the hosts' layouts."""
        prompts = list(self.shop.layouts.values())
        layout, captioned = prompts[self.rng.integers(len(prompts))], self.rng.random() < CAPTIONED
        return write_lesson(layout, [self.ask(scene, captioned) for scene in self.scenes]).to(self.shop.device)

    def ask(self, scene: Scene, captioned: bool) -> list[Question]:
        return [*ask_all(scene, self.rng).values()] + [ask_caption(scene)] * captioned
