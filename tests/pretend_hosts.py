"""Every family on the pretend device: a model, its prompts, and one generation with everything that was counted."""

from __future__ import annotations

import gc
import warnings
from copy import deepcopy
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any

import families
import models
import torch
from pretend import Counts, Device
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import vtp_plugin as vtp
from vtp_plugin import PruningStrategy
from vtp_plugin.errors import PruningError

DTYPES = (torch.float32, torch.bfloat16)
LAYOUTS = ("single", "batch")  # one prompt; two of unequal length with three pictures, padded on the left
STAGES = {name: family.stages for name, family in families.FAMILIES.items()}
STAGES |= dict.fromkeys(models.FAMILIES, families.STAGES)

# by stage, a strategy for every signal, with fields that tiny models can spend
CASES: dict[str, list[tuple[str, dict[str, Any]]]] = {
    "pixels": [("vprune", {"chi2_threshold": 40.0, "cosine_threshold": 0.2}), ("downsample", {"keep_ratio": 0.5})],
    "vit": [("l2", {}), ("l2", {"center": True}), ("l2", {"positioned": True}), ("tome", {"keep_ratio": 0.6})],
    "projector": [
        ("atp", {}),
        ("divprune", {"keep_ratio": 0.4}),
        ("visionzip", {"dominant": 3, "contextual": 2}),
        ("prumerge", {}),
        ("hired", {"keep_ratio": 0.4}),
        ("random", {}),
        ("hiprune", {"shallow": 1, "keep_ratio": 0.4}),
        ("vscan", {"shallow": 1, "keep_ratio": 0.4}),
        ("nuwa", {"keep_ratio": 0.4}),
        ("mmtok", {"keep_ratio": 0.4}),
        ("vidcom2", {"keep_ratio": 0.4}),
    ],
    "llm": [
        ("fastv", {}),
        ("fastv", {"layer": 3}),  # some take visual features up in their first layers
        ("dart", {"layer": 3, "keep_ratio": 0.4}),
        ("pyramiddrop", {"layers": "2 3"}),
        ("fitprune", {"keep_ratio": 0.6}),
        ("sparsevlm", {}),
        ("sparsevlm", {"version": 2}),
        ("dart", {"keep_ratio": 0.4}),
        ("vtp", {"at": "llm", "focus": 1.0}),
        ("coreprune", {"layer": 2, "keep_ratio": 0.4}),
    ],
}


@dataclass
class Answer:
    """One generation: new logits [steps, B, V] and, per cut and image, what was kept."""

    logits: Tensor
    kept: list[list[int]]


class Host:
    """One model of a family on the CPU, and the same on the pretend device."""

    def __init__(self, name: str, dtype: torch.dtype) -> None:
        self.name, self.dtype = name, dtype
        self.tiny = models.FAMILIES[name]("sdpa") if name in models.FAMILIES else None
        self.processor = self.tiny.processor if self.tiny else families.Processor()
        self.model, other = self.build(), self.build()
        self.model.requires_grad_(False)  # as on the device: torch picks matrix products by it
        with Device() as self.device:
            self.there = self.device.move(other)

    def build(self) -> nn.Module:
        if self.name in models.FAMILIES:
            return models.FAMILIES[self.name]("sdpa").model.to(self.dtype)
        model = deepcopy(_drawn(self.name)).to(self.dtype)
        if self.name.endswith("_moe"):  # a GPU counts tokens per expert with what a CPU has no kernel for
            model.set_experts_implementation("batched_mm")
        return model

    @cache  # noqa: B019 - as many as there are layouts
    def inputs(self, layout: str) -> dict[str, Any]:
        if self.tiny:
            made = self.tiny.inputs(models.prompts(layout))
        else:
            family = families.FAMILIES[self.name]
            if layout == "video":  # for those that take videos
                prompts = [family.video(3)]
            else:
                prompts = [family.sample(0, 1)] if layout == "single" else [family.sample(0, 2), family.sample(1, 1)]
            made = family.batch(prompts)
        return {n: v.to(self.dtype) if v.is_floating_point() else v for n, v in made.items()}

    def strategy(self, name: str, **fields: Any) -> PruningStrategy:
        """With the text tower of the tests' CLIP where the family has one, else with the language model's words."""
        cls = vtp.get_strategy(name)
        if "text_encoder" in cls.fields():
            fields |= {"clip": str(self.tiny.clip)} if self.tiny else {"text_encoder": "llm"}
        return cls(**fields)

    @property
    def first_cut(self) -> int:
        """The first decoder layer that can be cut."""
        return self._adapter.first_cut

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches of a tile."""
        return self._adapter.tower.grid

    @cached_property
    def _adapter(self) -> Any:
        with vtp.prune(self.model, "none", processor=self.processor) as pruned:
            return pruned.adapter

    def lacks(self, strategy: PruningStrategy) -> bool:
        """Whether the family cannot give the strategy what it needs."""
        try:
            vtp.prune(self.model, strategy, processor=self.processor).detach()
        except PruningError:
            return True
        return False

    def here(self, strategy: PruningStrategy | None, layout: str, new: int = 2) -> Answer:
        """On the CPU, with the attention formula that the pretend device computes."""
        with sdpa_kernel(SDPBackend.MATH):
            return self._generated(self.model, self.inputs(layout), strategy, new)[0]

    def pretended(self, strategy: PruningStrategy | None, layout: str, new: int = 2) -> tuple[Answer, Counts]:
        """On the pretend device; counted from the call of `generate` to its end, attaching left out."""
        with self.device as device:
            answer, counts = self._generated(self.there, device.put(self.inputs(layout)), strategy, new)
            return answer, counts

    @cache  # noqa: B019 - there is one
    def _moved(self, device: str) -> nn.Module:
        return self.build().to(device)

    def on_device(self, device: str, strategy: PruningStrategy | None, layout: str, new: int = 2) -> tuple[Answer, int]:
        """On a real device, and how often the host waited for it."""
        inputs = {name: value.to(device) for name, value in self.inputs(layout).items()}
        with warnings.catch_warnings(record=True) as told, sdpa_kernel(SDPBackend.MATH):
            warnings.simplefilter("always")
            if device != "cpu":
                torch.cuda.set_sync_debug_mode("warn")
            try:
                answer, _ = self._generated(self._moved(device), inputs, strategy, new)
            finally:
                if device != "cpu":
                    torch.cuda.set_sync_debug_mode("default")
        return answer, sum("synchronizing" in str(warning.message) for warning in told)

    def _generated(
        self, model: nn.Module, inputs: dict[str, Any], strategy: PruningStrategy | None, new: int
    ) -> tuple[Answer, Counts]:
        if strategy is None:
            logits, counts = self._counted(model, inputs, new)
            return Answer(logits, []), counts
        with vtp.prune(model, strategy, processor=self.processor) as pruned:
            logits, counts = self._counted(model, inputs, new)
            kept = [rows.tolist() for event in pruned.events for rows in event.kept]
        return Answer(logits, kept), counts

    def _counted(self, model: nn.Module, inputs: dict[str, Any], new: int) -> tuple[Tensor, Counts]:
        settings = {"do_sample": False, "return_dict_in_generate": True, "output_logits": True, "max_new_tokens": new}
        gc.disable()
        try:
            with self.device.counting() as counts:
                output = model.generate(**inputs, **settings)
            logits = torch.stack(output.logits).cpu()
            del output
            counts.left_bytes = self.device.live_bytes - counts.before_bytes
        finally:
            gc.enable()
        return logits, counts


@cache
def _drawn(name: str) -> nn.Module:
    return families.FAMILIES[name].build("sdpa")


@cache
def host(name: str, dtype: torch.dtype = torch.float32) -> Host:
    return Host(name, dtype)


def can(name: str, strategy: str, fields: dict[str, Any]) -> bool:
    """Whether the family gives the strategy what it needs."""
    one = host(name)
    return not one.lacks(one.strategy(strategy, **fields))
