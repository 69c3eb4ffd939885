"""The seconds of one strategy beside the unpruned model's and the ideal's, and what follows from them."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from statistics import median
from typing import Any

from vtp_plugin.metrics.latency import percentiles

SIDES = ("unpruned", "ideal", "pruned")
DECODING = 8  # steps that are timed in a round


@dataclass(frozen=True)
class Timing:
    """One strategy at one budget and batch size. Seconds until the first token, or per pass of an encoder."""

    strategy: str
    keep: float | None
    batch: int
    tokens_before: int
    tokens_after: float  # mean over images
    macs: dict[str, dict[str, int]]  # before and after, by part, mean over samples
    seconds: dict[str, list[float]]  # by side, one per round
    selector: list[float]
    attaching: list[float]  # attaching and detaching
    first: list[float] = field(default_factory=list)  # the first call after attaching, one per round
    kv_bytes: dict[str, int] | None = None  # before and after, the whole batch
    peak_bytes: dict[str, int] | None = None  # by side; CUDA only
    prefill: dict[str, list[float]] = field(default_factory=dict)  # in the language model: unpruned and pruned
    decoding: dict[str, list[float]] = field(default_factory=dict)  # per step: pruned, and unpruned at equal KV length
    config: dict[str, Any] = field(default_factory=dict)  # of the strategy

    @property
    def flops_ratio(self) -> float:
        return sum(self.macs["after"].values()) / sum(self.macs["before"].values())

    @property
    def ttft_ratio(self) -> float:
        return median(self._ratios("pruned", "unpruned"))

    @property
    def over_ideal(self) -> float:
        return median(self._ratios("pruned", "ideal"))

    @property
    def realised(self) -> float | None:
        """Share of the theoretical gain in FLOPs that arrives as time."""
        return self._realised(self.ttft_ratio)

    def _realised(self, ttft_ratio: float) -> float | None:
        gain = 1 - self.flops_ratio
        return (1 - ttft_ratio) / gain if gain > 0 else None

    @property
    def break_even(self) -> float | None:
        """Visual tokens from which pruning pays, if saving and overhead stay what they are per token and per call."""
        whole, best, took = (median(self.seconds[side]) for side in ("unpruned", "ideal", "pruned"))
        saving = (whole - best) / self.tokens_before
        return max(0.0, took - best) / saving if saving > 0 else None

    @property
    def prefill_ratio(self) -> float | None:
        """The language model's part of the time to first token, pruned against unpruned."""
        return median(self._paired(self.prefill)) if self.prefill else None

    @property
    def decode_ratio(self) -> float | None:
        """A decoding step of the pruned model against one of the unpruned model with as many KV entries."""
        return median(self._paired(self._decoded)) if self.decoding else None

    @property
    def _decoded(self) -> dict[str, list[float]]:
        """Per round, the median step."""
        return {
            side: [median(steps[i : i + DECODING]) for i in range(0, len(steps), DECODING)]
            for side, steps in self.decoding.items()
        }

    @property
    def spread(self) -> dict[str, tuple[float, float] | None]:
        """The smallest and the largest value that a round gave, of every ratio."""
        ttft = self._ratios("pruned", "unpruned")
        rounds = {
            "ttft_ratio": ttft,
            "over_ideal": self._ratios("pruned", "ideal"),
            "realised": [self._realised(ratio) for ratio in ttft] if self.realised is not None else [],
            "prefill_ratio": self._paired(self.prefill) if self.prefill else [],
            "decode_ratio": self._paired(self._decoded) if self.decoding else [],
        }
        return {name: (min(values), max(values)) if values else None for name, values in rounds.items()}

    @property
    def images_per_second(self) -> dict[str, float]:
        return {side: self.batch / median(seconds) for side, seconds in self.seconds.items()}

    def _ratios(self, side: str, other: str) -> list[float]:
        return [a / b for a, b in zip(self.seconds[side], self.seconds[other], strict=True)]

    def _paired(self, sides: dict[str, list[float]]) -> list[float]:
        return [a / b for a, b in zip(sides["pruned"], sides["unpruned"], strict=True)]

    def as_json(self) -> dict[str, Any]:
        derived = ("flops_ratio", "ttft_ratio", "over_ideal", "realised", "break_even", "prefill_ratio", "decode_ratio")
        summary = {name: getattr(self, name) for name in (*derived, "images_per_second")}
        times = {side: percentiles(seconds) for side, seconds in self.seconds.items()}
        return asdict(self) | summary | {"spread": self.spread, "seconds_percentiles": times}
