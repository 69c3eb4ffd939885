"""FitPrune: behind every decoder layer the tokens leave that neither the image nor the text attends to.

Source: arXiv 2409.10197 (AAAI 2025) and the authors' code. With A the attention map of a layer, max over heads:
1. self_i = mean over the image's own tokens j of A_ji (`self_attention`), cross_i = sum over the text tokens t behind
   the image of A_ti (`cross_attention`);
2. the delta_l tokens with the lowest self_i x cross_i leave behind the attention of layer l.
The deltas are fitted on a few samples of the unpruned model: for a tolerance alpha, each layer deletes what is both
among the longest ascending prefix of cross and among that of self whose removal leaves at least (1 - alpha) of the
attention of all tokens in that layer; alpha is found by bisection.

Letters: `keep_ratio` (or `keep_tokens`) is the mean over the decoder layers of the visual tokens that a layer sees,
which is what is spent. `schedule` is
* a file that `vtp calibrate fitprune` wrote: per layer, the share of the tokens that it sees, for several targets;
  other targets are interpolated linearly;
* or the authors' kind of table, tokens of 576 deleted behind each layer from the first on, such as "14 33 89"; no
  budget then;
* or nothing: OUR fallback, the share falls by the same factor in every layer from `start` on.

Ours: a token that leaves behind the attention of layer l still passes that layer's MLP, which no other token notices,
and is gone from layer l + 1 on; that cost is counted. The target is the mean number of tokens instead of FLOPs, and
the bisection goes on until alpha is known to 2^-16 (the code stops at 0.01). Positions are kept, as in the code.
`start` is the first layer that sees fewer tokens.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from vtp_plugin.errors import PruningError
from vtp_plugin.stages import Stage
from vtp_plugin.strategy import PruningStrategy
from vtp_plugin.tokens import VisualTokens

OF = 576
HALVINGS = 16
NEAR = 1e-3
Sample = Sequence[tuple[Tensor, Tensor]]  # per layer: self [N] and cross [N] attention of the unpruned model


@dataclass(kw_only=True)
class FitPrune(PruningStrategy):
    """Drop, behind every decoder layer, the visual tokens with the least attention from image and text."""

    name = "fitprune"
    stage = Stage.LLM
    cut_field = "start"
    paper = "FitPrune: Fit and Prune, Training-free Visual Token Pruning, https://arxiv.org/abs/2409.10197"
    needs = ("self_attention", "cross_attention")
    nominal = True
    default_keep_ratio = 0.4
    default_positions = "original"

    schedule: str | list[int] | None = None  # a calibrated file, or tokens of 576 that leave behind each layer
    start: int = 1  # first decoder layer that sees fewer tokens

    def __post_init__(self) -> None:
        self.deltas = _whole_numbers(self.schedule)
        self.budgeted = self.deltas is None
        super().__post_init__()

    def validate(self) -> None:
        self.check_whole("start", 1)
        known = self.schedule is None or self.deltas is not None or isinstance(self.schedule, str)
        self.check("schedule", known, "must be a file, or tokens like '14 33 89'")
        self.tables = self._read() if isinstance(self.schedule, str) and self.deltas is None else {}

    def cut_layers(self, depth: int) -> tuple[int, ...]:
        sizes = {len(shares) for shares in self.tables.values()} - {depth}
        if sizes:
            raise self.error(f"{self.schedule} was fitted for {min(sizes)} decoder layers, this model has {depth}")
        if self.budgeted and self.keep_tokens is None:
            shares = self.shares(self.keep_ratio, depth)
            spent = (self.start + sum(shares[self.start :])) / depth
            if spent > self.keep_ratio + NEAR:
                raise self.error(
                    f"keep_ratio={self.keep_ratio:g} is not possible with {depth} decoder layers: "
                    f"the mean over them is {spent:.3g} at least, because the first {self.start} see every token"
                )
        return tuple(range(self.start, depth))

    def wanted(self, visual: VisualTokens) -> int:
        n, (cut, cuts) = visual.tokens.shape[1], visual.cut
        entered, layer, depth = visual.entered or n, self.start + cut, self.start + cuts
        if self.deltas is not None:
            share = 1 - sum(self.deltas[:layer]) / OF
        else:
            ratio = self.keep_ratio if self.keep_tokens is None else min(1.0, self.keep_tokens / entered)
            share = self.shares(ratio, depth)[layer]
        return max(1, min(n, round(entered * share)))

    def score(self, visual: VisualTokens) -> Tensor:
        return visual.self_attention * visual.cross_attention

    def shares(self, ratio: float, depth: int) -> list[float]:
        """The share of the tokens that every layer sees, with the given mean."""
        if not self.tables:
            return fading(ratio, depth, self.start)
        known = {0.0: [0.0] * depth, **self.tables, 1.0: [1.0] * depth}
        high = min(target for target in known if target >= ratio)
        low = max((target for target in known if target < ratio), default=high)
        part = (ratio - low) / (high - low) if high > low else 0.0
        return [a + part * (b - a) for a, b in zip(known[low], known[high], strict=True)]

    def _read(self) -> dict[float, list[float]]:
        path = Path(self.schedule)
        try:
            self.check("schedule", path.is_file(), "must be a file, or tokens like '14 33 89'")
            rows = json.loads(path.read_text("utf-8"))["left"]
            tables = {sum(shares) / len(shares): [float(share) for share in shares] for shares in rows}
        except PruningError:
            raise
        except (LookupError, TypeError, ValueError, ArithmeticError, OSError, RecursionError):
            tables = {}
        good = tables and all(0 <= share <= 1 for shares in tables.values() for share in shares)
        self.check("schedule", good, "must be a file that `vtp calibrate fitprune` wrote")
        return tables


def _whole_numbers(value: Any) -> list[int] | None:
    """Numbers as a list or a text such as "14 33 89"; None for anything else."""
    parts = value.split() if isinstance(value, str) else value if isinstance(value, (list, tuple)) else [value]
    numbers = [int(part) if str(part).isdecimal() and len(str(part)) < 19 else -1 for part in parts]
    return numbers if numbers and min(numbers) >= 0 else None


def fading(mean: float, depth: int, start: int = 1) -> list[float]:
    """Shares per layer that fall by one factor from layer `start` on, with the given mean as far as it is possible."""

    def shares(factor: float) -> list[float]:
        return [factor ** max(0, layer - start + 1) for layer in range(depth)]

    factor = bisected(lambda f: sum(shares(f)) / depth >= mean)
    return shares(factor)


def bisected(enough: Any) -> float:
    """The smallest number in [0, 1] that is enough, to 2^-HALVINGS; 1 if none is."""
    low, high = 0.0, 1.0
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        low, high = (low, middle) if enough(middle) else (middle, high)
    return high


def left_behind(sample: Sample, alpha: float) -> list[float]:
    """The share of a sample's tokens that each layer sees when the tolerance is alpha; one layer more than `sample`."""
    present = list(range(len(sample[0][0])))
    shares = [1.0]
    for signals in sample:
        useless = [_prefix(signal.tolist(), present, alpha) for signal in signals]
        present = [i for i in present if not all(i in prefix for prefix in useless)]
        shares.append(len(present) / len(sample[0][0]))
    return shares


def _prefix(attention: list[float], present: list[int], alpha: float) -> set[int]:
    """The longest ascending prefix of the present tokens without which (1 - alpha) of all attention is left."""
    left, needed, prefix = sum(attention[i] for i in present), (1 - alpha) * sum(attention), set()
    for i in sorted(present, key=lambda i: attention[i]):
        left -= attention[i]
        if left < needed:
            break
        prefix.add(i)
    return prefix


def fitted(samples: Sequence[Sample], target: float) -> list[float]:
    """Mean shares per layer with the smallest tolerance whose mean over the layers is at most `target`."""

    def shares(alpha: float) -> list[float]:
        layers = zip(*(left_behind(sample, alpha) for sample in samples), strict=True)
        return [sum(layer) / len(samples) for layer in layers]

    alpha = bisected(lambda a: (found := shares(a)) and sum(found) / len(found) <= target)
    return shares(alpha)
