"""The promises on both layouts of LLaVA: cases, what the slow reference expects, and how answers are compared."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

import reference
import torch
from models import Row, Tiny, prompts, tiny
from torch import nn

from vtp_plugin import PruningStrategy, Stage, get_strategy, signals
from vtp_plugin.signals import BlockView

CASES: dict[str, list[tuple[str, dict[str, Any]]]] = {
    "l2": [("l2", {"keep_ratio": 0.4})],
    "l2-center": [("l2", {"center": True, "keep_ratio": 0.3})],
    "l2-positioned": [("l2", {"positioned": True})],
    "atp": [("atp", {})],
    "atp-cls": [("atp", {"alpha": 0.0})],
    "atp-switched": [("atp", {"alpha": 0.7, "layer": -2, "relevance_sign": -1, "normalization": "zscore"})],
    "vprune": [("vprune", {})],
    "visionzip": [("visionzip", {"dominant": 8, "contextual": 4})],
    "fastv": [("fastv", {})],
    "fastv-1": [("fastv", {"layer": 1, "keep_ratio": 0.8})],
    "fastv-3": [("fastv", {"layer": 3, "keep_ratio": 0.1})],
    "stride": [("stride", {"keep_ratio": 0.3})],
    "stride-vit": [("stride", {"at": "vit"})],
    "stride-llm": [("stride", {"at": "llm"})],
    "random": [("random", {})],
    "random-vit": [("random", {"at": "vit"})],
    "random-llm": [("random", {"at": "llm", "layer": 3})],
    "vprune+atp+fastv": [("vprune", {}), ("atp", {}), ("fastv", {"keep_ratio": 0.4})],
    "l2+stride+fastv": [("l2", {}), ("stride", {}), ("fastv", {"keep_ratio": 0.4})],
    "vprune+l2+visionzip": [("vprune", {}), ("l2", {}), ("visionzip", {"dominant": 3, "contextual": 1})],
    "tome": [("tome", {"keep_ratio": 0.6})],
    "tome-plain": [("tome", {"keep_ratio": 0.7, "proportional": False})],
    "l2+tome+stride+fastv": [("l2", {"keep_ratio": 0.8}), ("tome", {"keep_ratio": 0.7}), ("stride", {}), ("fastv", {})],
    "fastv+random": [("fastv", {"layer": 1}), ("random", {"at": "llm", "layer": 3})],
}
CLOSE = {"atol": 2e-4, "rtol": 1e-4}


def strategies(host: Tiny, case: str) -> list[PruningStrategy]:
    return [make(host, name, **hyper) for name, hyper in CASES[case]]


def make(host: Tiny, name: str, **hyper: Any) -> PruningStrategy:
    return get_strategy(name)(**hyper, **({"clip": str(host.clip)} if name == "atp" else {}))


def kept(events: Any) -> dict[str, dict[int, list[int]]]:
    """Strategy -> number of the image -> raster positions that are left."""
    found: dict[str, dict[int, list[int]]] = {}
    for event in events:
        for number, before, after, index in zip(event.images, event.before, event.after, event.kept, strict=True):
            assert len(index) == after <= before
            found.setdefault(event.strategy, {})[number] = index.tolist()
    return found


@cache
def _expected(family: str, case: str, kind: str, r: int, drawn: tuple[tuple[int, ...], ...]) -> reference.Expected:
    return reference.run(tiny(family), prompts(kind)[r], CASES[case], drawn)


def expected(host: Tiny, case: str, kind: str, events: Any) -> list[reference.Expected]:
    """What should have happened to every row; only what `random` drew is taken from the events."""
    found, rows = kept(events).get("random", {}), prompts(kind)
    numbers = host.numbers(rows)
    drawn = [tuple(tuple(found[n]) for n in row if n in found) for row in numbers]
    return [_expected(host.family, case, kind, r, drawn[r]) for r in range(len(rows))]


def meets_attention(strategy: PruningStrategy) -> bool:
    """Whether the kernel matters: signals of the tower's blocks, merging inside them, masks of decoder layers."""
    blocks = any(signal.view is BlockView for signal in signals.needed(strategy))
    return blocks or strategy.stage is Stage.LLM or strategy.name == "tome"


def where_it_matters(parameters: Mapping[str, Any]) -> str:
    """The attention kernel of a case that meets attention; of others any will do."""
    met = any(meets_attention(get_strategy(name)(**hyper)) for name, hyper in CASES[parameters["case"]])
    return parameters["host"] if met else "any"


class Lengths:
    """Records how many columns every decoder layer computes in the first pass of a call."""

    def __init__(self, layers: nn.ModuleList) -> None:
        self.layers, self.seen = layers, []

    def __enter__(self) -> list[int]:
        self.handles = [layer.register_forward_pre_hook(self._note, with_kwargs=True) for layer in self.layers]
        return self.seen

    def __exit__(self, *exception: object) -> None:
        for handle in self.handles:
            handle.remove()

    def _note(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        if len(self.seen) < len(self.layers):
            self.seen.append((args[0] if args else kwargs["hidden_states"]).shape[1])


def check_kept(host: Tiny, rows: list[Row], events: Any, slow: list[reference.Expected]) -> None:
    found = kept(events)
    for numbers, row in zip(host.numbers(rows), slow, strict=True):
        for name, images in row.kept.items():
            assert [found[name][n] for n in numbers] == images, name


def check_answer(output: Any, slow: list[reference.Expected]) -> None:
    for r, row in enumerate(slow):
        logits = torch.stack([step[r] for step in output.logits])
        assert torch.allclose(logits, row.logits, **CLOSE), (r, (logits - row.logits).abs().max())
        assert output.sequences[r].tolist() == row.ids
