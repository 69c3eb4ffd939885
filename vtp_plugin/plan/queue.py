"""One card that answers a stream of requests: Poisson arrivals, continuous batching, prefill in chunks.

Every step of the card decodes one token of every running request and spends what is left of its token budget on the
prompts that wait, first come, first served. A request enters when its cache fits. Several cards are as many such
queues, each with its share of the arrivals drawn at random. Simulated time, seeded: the same numbers on every machine.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Protocol

from vtp_plugin.plan.roofline import Roof, fitting

CHUNK = 2048  # tokens per step, as vLLM's max_num_batched_tokens
REQUESTS = 2000


class Server(Protocol):
    """What the simulation asks of a card."""

    prompt: int  # tokens of a prompt
    answer: int  # tokens of an answer, the first included
    slots: int  # requests at a time

    def seconds(self, decoding: int, prefilled: int, begun: int) -> float:
        """Of one step: tokens decoded and prefilled in it, and requests whose pictures are encoded in it."""


class RoofServer:
    """A card by its roofline. A step's arithmetic adds up, its weights are read once."""

    def __init__(self, roof: Roof, concurrency: int) -> None:
        self.slots, self.answer, self.prompt = fitting(roof, concurrency), roof.answer, max(roof.work.lengths)
        self.prefill = roof.part("prefill")
        self.encoding = sum(roof.part(name).seconds for name in ("tower", "projector", "selector")) + roof.overhead
        self.step = cache(roof.step)

    def seconds(self, decoding: int, prefilled: int, begun: int) -> float:
        arithmetic, reading = self.prefill.arithmetic * prefilled / self.prompt, self.prefill.reading * bool(prefilled)
        if decoding:
            step = self.step(decoding)
            arithmetic, reading = arithmetic + step.arithmetic, max(reading, step.reading)
        return max(arithmetic, reading) + begun * self.encoding


@dataclass
class Request:
    arrived: float
    prefilled: int = 0
    last: int = 0  # the step that decodes the last token of its answer
    first_token: float = 0.0
    done: float = 0.0


@dataclass(frozen=True)
class Outcome:
    """Seconds of every request that was served, and how long it took to serve them all."""

    first_token: list[float]
    latency: list[float]
    span: float

    @property
    def throughput(self) -> float:
        """Requests per second."""
        return len(self.latency) / self.span


@dataclass
class _Card:
    """The state of the simulation."""

    server: Server
    chunk: int
    now: float = 0.0
    steps: int = 0
    waiting: deque[Request] = field(default_factory=deque)  # arrived, its prompt not finished
    running: deque[Request] = field(default_factory=deque)  # decoding; who began first ends first
    entered: int = 0  # requests that hold a slot

    def step(self) -> list[Request]:
        """One pass of the model; the requests that it finished."""
        decoding = len(self.running)
        prefilling, begun = self._prefill(max(0, self.chunk - decoding))
        self.now += self.server.seconds(decoding, sum(n for _, n in prefilling), begun)
        self.steps += 1
        for request, tokens in prefilling:
            self._advance(request, tokens)
        finished = []
        while self.running and self.running[0].last <= self.steps:
            finished.append(self.running.popleft())
            finished[-1].done = self.now
        self.entered -= len(finished)
        return finished

    def _prefill(self, budget: int) -> tuple[list[tuple[Request, int]], int]:
        """Which prompts get how many tokens of this step, and how many of them begin."""
        chosen, begun, entered = [], 0, self.entered
        for request in self.waiting:
            if budget <= 0 or (not request.prefilled and entered >= self.server.slots):
                break
            tokens = min(budget, self.server.prompt - request.prefilled)
            if not request.prefilled:
                begun, entered = begun + 1, entered + 1
            chosen.append((request, tokens))
            budget -= tokens
        self.entered = entered
        return chosen, begun

    def _advance(self, request: Request, tokens: int) -> None:
        request.prefilled += tokens
        if request.prefilled == self.server.prompt:
            request.first_token, request.last = self.now, self.steps + self.server.answer - 1
            self.waiting.remove(request)
            self.running.append(request)


def simulate(server: Server, rate: float, requests: int = REQUESTS, chunk: int = CHUNK, seed: int = 0) -> Outcome:
    """One card with `rate` requests per second, until all are answered; the first tenth is warm-up and left out."""
    card, done = _Card(server, chunk), []
    coming = deque(map(Request, arrivals(rate, requests, seed)))
    while len(done) < requests:
        while coming and coming[0].arrived <= card.now:
            card.waiting.append(coming.popleft())
        if not card.waiting and not card.running:
            card.now = coming[0].arrived
            continue
        done += card.step()
    counted = sorted(done, key=lambda request: request.arrived)[requests // 10 :]
    begun = counted[0].arrived
    return Outcome(
        first_token=[request.first_token - request.arrived for request in counted],
        latency=[request.done - request.arrived for request in counted],
        span=max(request.done for request in counted) - begun,
    )


def arrivals(rate: float, requests: int, seed: int) -> list[float]:
    """Times of a Poisson process."""
    draw, now, found = random.Random(seed), 0.0, []
    for _ in range(requests):
        now += draw.expovariate(rate)
        found.append(now)
    return found


def percentile(values: Sequence[float], share: float) -> float:
    """The smallest value that this share of the values does not exceed."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def cards_needed(
    server: Server, rate: float, first_token: float, requests: int = REQUESTS, chunk: int = CHUNK, most: int = 1 << 14
) -> int | None:
    """The smallest number of cards whose p95 of the time to the first token is at most that; None: not with `most`."""

    def holds(cards: int) -> bool:
        return percentile(simulate(server, rate / cards, requests, chunk).first_token, 0.95) <= first_token

    low, high = 0, 1  # low does not hold; from below, as a card with little to do takes longest to simulate
    while not holds(high):
        if high == most:
            return None
        low, high = high, min(2 * high, most)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if holds(middle) else (middle, high)
    return high
