"""Seconds of every part on a card: what takes longer, the arithmetic or the bytes that it reads.

Counted bytes are those of weights (once per pass) and of the KV cache; activations are left out. Kernel launches, the
host's own work and communication between cards are left out, too: a plan is a lower bound of the time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from vtp_plugin.errors import PruningError
from vtp_plugin.plan.cards import Card
from vtp_plugin.plan.work import PARTS, Model, Work

ITEMSIZE = {"float32": 4, "bfloat16": 2, "float16": 2}
USABLE = 0.9  # of a card's memory, as vLLM's gpu_memory_utilization


@dataclass(frozen=True)
class Time:
    """Seconds of arithmetic and of reading; the larger one counts."""

    arithmetic: float
    reading: float

    @property
    def seconds(self) -> float:
        return max(self.arithmetic, self.reading)

    @property
    def bound(self) -> str:
        return "arithmetic" if self.arithmetic >= self.reading else "bandwidth"


@dataclass(frozen=True)
class Roof:
    """One kind of request on one card."""

    model: Model
    work: Work
    card: Card
    dtype: str
    answer: int  # tokens of an answer
    overhead: float = 0.0  # seconds per call that neither FLOPs nor bytes tell

    def part(self, name: str, batch: int = 1) -> Time:
        """Tower, projector, selector or prefill of `batch` requests together."""
        width = self.model.widths[name == "prefill"]
        macs = batch * self.work.macs[name]
        return Time(2 * macs / self.card.rate(self.dtype, width), self._weights(name) / self.card.bytes_per_second)

    def step(self, batch: int, done: int | None = None) -> Time:
        """One decoding step of `batch` requests, `done` tokens (half of the answer) behind their prompts."""
        done = self.answer // 2 if done is None else done
        costs, lengths = self.model.costs, [n + done for n in self.work.lengths]
        macs = sum(layer.macs(1, n + 1) for layer, n in zip(costs.layers, lengths, strict=True)) + costs.head
        read = self._weights("prefill") + batch * self.model.cache_bytes(lengths, self.itemsize)
        rate = self.card.rate(self.dtype, self.model.widths[1])
        return Time(2 * batch * macs / rate, read / self.card.bytes_per_second)

    def ttft(self, batch: int = 1) -> float:
        """Seconds until the first tokens of `batch` requests that come together and find an idle card."""
        return sum(self.part(name, batch).seconds for name in PARTS) + self.overhead

    def requests_per_second(self, batch: int) -> float:
        """With `batch` requests at a time: each is prefilled once and takes part in a step per token."""
        return 1 / (self.ttft() + max(0, self.answer - 1) * self.step(batch).seconds / batch)

    @cached_property
    def kv_bytes(self) -> int:
        """Of one prompt."""
        return self.model.cache_bytes(self.work.lengths, self.itemsize)

    @property
    def largest_batch(self) -> int:
        """Requests whose caches fit beside the weights, answers included; 0: the weights alone do not fit."""
        each = self.model.cache_bytes([n + self.answer for n in self.work.lengths], self.itemsize)
        return max(0, int((USABLE * self.card.memory - self.weights_bytes) // each))

    @property
    def weights_bytes(self) -> int:
        return self.model.parameters * self.itemsize

    @property
    def itemsize(self) -> int:
        return ITEMSIZE[self.dtype]

    def _weights(self, part: str) -> int:
        """Bytes of the weights that a part reads in one pass: as many elements as it has MACs per token."""
        costs = self.model.costs
        if part == "prefill":
            elements = sum(layer.projections + layer.mlp for layer in costs.layers) + costs.head
        elif part == "tower":
            elements = costs.patch + sum(block.projections + block.mlp for block in costs.blocks)
        else:
            elements = sum(costs.projectors) if part == "projector" else 0
        return elements * self.itemsize


def fitting(roof: Roof, concurrency: int) -> int:
    """Requests at a time: as many as come, as far as they fit. PruningError where not one fits."""
    if not roof.largest_batch:
        raise PruningError(
            f"{roof.model.name} in {roof.dtype} with such a prompt does not fit on {roof.card.name}: its weights take "
            f"{roof.weights_bytes / 1e9:.1f} GB and one cache {roof.kv_bytes / 1e9:.2f} GB of "
            f"{USABLE:.0%} of {roof.card.memory / 1e9:.0f} GB"
        )
    return min(concurrency, roof.largest_batch)


def pays_from(ratios: Sequence[tuple[int, float]], least: float = 0.99) -> int | None:
    """The smallest number of visual tokens from which on the time to the first token stays below `least`."""
    found = None
    for tokens, ratio in sorted(ratios, reverse=True):
        if ratio > least:
            break
        found = tokens
    return found
