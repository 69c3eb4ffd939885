"""What every strategy's own computation costs, beside the prefill of a LLaVA-1.5-7B.

Signals are synthetic, with real widths (1024 in the tower, 4096 in the language model). The prefill is timed on a few
decoder layers, one image and its text, and scaled to 32 layers and the batch: said so in the record. What a strategy
makes the model compute for it is added where it is not small: projecting the candidates.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from statistics import median
from typing import Any

import torch
from torch import nn

from vtp_plugin.bench.journal import Item
from vtp_plugin.bench.operations import operations
from vtp_plugin.clock import clock
from vtp_plugin.hosts.transformers.architectures import QUESTION_TOKENS
from vtp_plugin.hosts.transformers.shapes import SHAPES
from vtp_plugin.samples import REAL, run, sample
from vtp_plugin.strategy import PruningStrategy

SHAPE = SHAPES["llava-1.5-7b"]
TOKENS = (576, 2880)
REASON = 0.1  # a share of the prefill above which the docs must say why


@dataclass(frozen=True)
class Cost:
    """One strategy on one number of tokens and batch size."""

    strategy: str
    stage: str
    tokens: int
    batch: int
    kept: float
    operations: int  # that a device is asked for
    seconds: float  # median
    prefill_seconds: float  # of the unpruned prompts, scaled

    @property
    def share(self) -> float:
        return self.seconds / self.prefill_seconds

    def as_json(self) -> dict[str, Any]:
        return asdict(self) | {"share": self.share}


def measurable(
    strategies: Sequence[PruningStrategy],
    tokens: Sequence[int] = TOKENS,
    batches: Sequence[int] = (1, 16),
    *,
    layers: int = 1,
    repeats: int = 3,
    device: torch.device,
    dtype: torch.dtype,
) -> list[Item]:
    """Every strategy on every number of tokens and batch size; `layers` decoder layers are timed for the prefill."""

    @cache
    def prefill(n: int) -> float:
        return prefill_seconds(n + QUESTION_TOKENS, layers, repeats, device, dtype)

    def item(strategy: PruningStrategy, n: int, batch: int) -> Item:
        key = {"strategy": strategy.name, "tokens": n, "batch": batch, "config": strategy.config()}
        return Item(
            key,
            f"{strategy.name} at {n} tokens, batch {batch}",
            lambda: _cost(strategy, n, batch, prefill(n) * batch, repeats, device, dtype).as_json(),
        )

    return [item(strategy, n, batch) for strategy in strategies for n in tokens for batch in batches]


def prefill_seconds(length: int, layers: int, repeats: int, device: torch.device, dtype: torch.dtype) -> float:
    """One prompt through `layers` decoder layers, scaled to all of them."""
    from transformers import LlamaConfig, LlamaModel

    config = LlamaConfig(**{**SHAPE.text, "num_hidden_layers": layers, "vocab_size": 8}, attn_implementation="sdpa")
    with torch.device(device):
        model = LlamaModel(config).eval().requires_grad_(False).to(dtype)
    embeds = torch.randn(1, length, config.hidden_size, device=device, dtype=dtype)
    seconds = _timed(lambda: model(inputs_embeds=embeds, use_cache=True), repeats, device)
    return seconds * SHAPE.text["num_hidden_layers"] / layers


def _cost(
    strategy: PruningStrategy,
    n: int,
    batch: int,
    prefill: float,
    repeats: int,
    device: torch.device,
    dtype: torch.dtype,
) -> Cost:
    seen = sample(strategy, n, b=batch, widths=REAL, device=device)
    asked = operations(lambda: run(strategy, seen))
    selections = run(strategy, seen)
    seconds = _timed(lambda: run(strategy, seen), repeats, device)
    if "projected" in strategy.needs:
        seconds += _projecting(n * batch, repeats, device, dtype)
    kept = sum(selections[-1].counts) / batch
    return Cost(strategy.name, strategy.stage.value, n, batch, kept, asked, seconds, prefill)


def _projecting(rows: int, repeats: int, device: torch.device, dtype: torch.dtype) -> float:
    width, wide = SHAPE.vision["hidden_size"], SHAPE.text["hidden_size"]
    with torch.device(device):
        projector = nn.Sequential(nn.Linear(width, wide), nn.GELU(), nn.Linear(wide, wide)).to(dtype)
        features = torch.randn(rows, width, dtype=dtype)
    return _timed(lambda: projector(features), repeats, device)


def _timed(work: Callable[[], Any], repeats: int, device: torch.device) -> float:
    """Median seconds, after one round that warms up."""
    seconds = []
    with torch.no_grad():
        for _ in range(repeats + 1):
            started = clock(device)
            work()
            seconds.append(clock(device) - started)
    return median(seconds[1:])
