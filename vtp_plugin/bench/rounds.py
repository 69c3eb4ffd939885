"""Speed without checkpoints: random weights in a real model's shape, pruned against unpruned and against the ideal.

All sides use the same attention kernel, are warmed up, run in turn, and are timed with the device synchronised. Ratios
are taken within a round and the median over rounds is reported, so that a machine that slows down does not favour one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from vtp_plugin.clock import clock
from vtp_plugin.errors import PruningError
from vtp_plugin.hosts.transformers.ideals import ideal
from vtp_plugin.hosts.transformers.shapes import Shape, random_text
from vtp_plugin.metrics.latency import percentiles
from vtp_plugin.pruning import Pruned, prune
from vtp_plugin.reporting.record import samples_of
from vtp_plugin.signals import reads_question
from vtp_plugin.stages import Stage
from vtp_plugin.strategy import PruningStrategy
from vtp_plugin.surgery.call import Call
from vtp_plugin.surgery.undo import Undo

SIDES = ("unpruned", "ideal", "pruned")
DECODING = 8  # steps that are timed
EARLY = (Stage.PIXELS, Stage.VIT)


class Levels:
    """Stands in for an image processor: the pictures are random numbers."""

    image_mean, image_std, do_normalize = [0.5] * 3, [0.25] * 3, True

    def preprocess(self, images: Any) -> None:
        """Never called: the pixels are made without it."""


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
    kv_bytes: dict[str, int] | None = None  # before and after, the whole batch
    peak_bytes: dict[str, int] | None = None  # by side; CUDA only
    prefill: dict[str, list[float]] = field(default_factory=dict)  # in the language model: unpruned and pruned
    decoding: dict[str, list[float]] = field(default_factory=dict)  # per step: pruned, and unpruned at equal KV length

    @property
    def flops_ratio(self) -> float:
        return sum(self.macs["after"].values()) / sum(self.macs["before"].values())

    @property
    def ttft_ratio(self) -> float:
        return self._ratio("pruned", "unpruned")

    @property
    def over_ideal(self) -> float:
        return self._ratio("pruned", "ideal")

    @property
    def realised(self) -> float | None:
        """Share of the theoretical gain in FLOPs that arrives as time."""
        gain = 1 - self.flops_ratio
        return (1 - self.ttft_ratio) / gain if gain > 0 else None

    @property
    def break_even(self) -> float | None:
        """Visual tokens from which pruning pays, if saving and overhead stay what they are per token and per call."""
        whole, best, took = (median(self.seconds[side]) for side in ("unpruned", "ideal", "pruned"))
        saving = (whole - best) / self.tokens_before
        return max(0.0, took - best) / saving if saving > 0 else None

    @property
    def prefill_ratio(self) -> float | None:
        """The language model's part of the time to first token, pruned against unpruned."""
        pairs = zip(self.prefill["pruned"], self.prefill["unpruned"], strict=True) if self.prefill else ()
        return median(a / b for a, b in pairs) if self.prefill else None

    @property
    def decode_ratio(self) -> float | None:
        """A decoding step of the pruned model against one of the unpruned model with as many KV entries."""
        return median(self.decoding["pruned"]) / median(self.decoding["unpruned"]) if self.decoding else None

    @property
    def images_per_second(self) -> dict[str, float]:
        return {side: self.batch / median(seconds) for side, seconds in self.seconds.items()}

    def _ratio(self, side: str, other: str) -> float:
        return median(a / b for a, b in zip(self.seconds[side], self.seconds[other], strict=True))

    def as_json(self) -> dict[str, Any]:
        derived = ("flops_ratio", "ttft_ratio", "over_ideal", "realised", "break_even", "prefill_ratio", "decode_ratio")
        summary = {name: getattr(self, name) for name in (*derived, "images_per_second")}
        spread = {side: percentiles(seconds) for side, seconds in self.seconds.items()}
        return asdict(self) | summary | {"seconds_percentiles": spread}


def refuse(strategies: Sequence[PruningStrategy], shape: Shape) -> None:
    """Refuse before anything is built what cannot run on random weights."""
    for strategy in strategies:
        if "text" in strategy.needs:
            raise strategy.error(
                "it reads the question through a CLIP text tower, which random weights lack"
                + (": give alpha=0 to measure the rest" if "alpha" in strategy.fields() else "")
            )
        if reads_question([strategy]):
            raise strategy.error("it reads the question, and random weights come without a tokenizer")
        if not shape.decodes and strategy.stage not in EARLY:
            raise strategy.error(f"an encoder has no {strategy.stage.value} stage; strategies of pixels and vit apply")


def compare(
    shape: Shape, model: nn.Module, strategies: Sequence[PruningStrategy], batch: int, repeats: int = 5
) -> list[Timing]:
    """Time every strategy against the unpruned model and its ideal, in turn. Works for encoders, too.

    `model` comes from `shape.build`; `batch` images, one per prompt. Raises PruningError for what `refuse` refuses.
    """
    refuse(strategies, shape)
    inputs = shape.inputs(model, batch)
    return [_Bench(shape, model, inputs, strategy).run(repeats) for strategy in strategies]


class _Bench:
    """One strategy on one model and one batch."""

    def __init__(self, shape: Shape, model: nn.Module, inputs: dict[str, Tensor], strategy: PruningStrategy) -> None:
        self.shape, self.model, self.inputs, self.strategy = shape, model, inputs, strategy
        self.device = next(model.parameters()).device
        self.calls: list[Call] = []
        with self._pruned() as pruned:
            self._forward()
            self.reports = samples_of(pruned, self.calls[-1])
        images = [image for report in self.reports for image in report["images"]]
        self.before = images[0]["before"]
        self.after = sum(image["after"] for image in images) / len(images)
        self.lengths = list(self.reports[0].get("prompt_tokens", {}).get("by_layer", []))

    def run(self, repeats: int) -> Timing:
        seconds: dict[str, list[float]] = {side: [] for side in SIDES}
        attaching, peaks = [], {}
        for repeat in range(repeats + 1):
            took = {"unpruned": self._timed(self._forward, peaks, "unpruned")}
            took["ideal"] = self._timed(self._ideal, peaks, "ideal")
            started = clock(self.device)
            with self._pruned():
                attached = clock(self.device) - started
                took["pruned"] = self._timed(self._forward, peaks, "pruned")
                started = clock(self.device)
            if repeat:  # the first round warms up
                attaching.append(attached + clock(self.device) - started)
                for side, value in took.items():
                    seconds[side].append(value)
        kv = [report["kv_cache_bytes"] for report in self.reports if "kv_cache_bytes" in report]
        return Timing(
            strategy=self.strategy.name,
            keep=self.strategy.keep_ratio,
            batch=len(self.reports),
            tokens_before=self.before,
            tokens_after=self.after,
            macs={when: self._macs(when) for when in ("before", "after")},
            seconds=seconds,
            selector=[call.seconds.get("selector", 0.0) for call in self.calls[-repeats:]],
            attaching=attaching,
            kv_bytes={when: sum(entry[when] for entry in kv) for when in ("before", "after")} if kv else None,
            peak_bytes=peaks or None,
            prefill=self._prefill(repeats) if self.shape.decodes else {},
            decoding=self._decoding() if self.shape.decodes else {},
        )

    def _macs(self, when: str) -> dict[str, int]:
        flops = [report["flops"][when] for report in self.reports]
        parts = [part for part in flops[0] if part != "decode"]
        return {part: sum(one[part] for one in flops) // (2 * len(flops)) for part in parts}

    # -- the sides ------------------------------------------------------------------------------------------------

    def _pruned(self) -> Pruned:
        pruned = prune(self.model, self.strategy, processor=Levels())
        pruned.finished.append(self.calls.append)
        return pruned

    def _forward(self) -> None:
        with torch.no_grad():
            if self.shape.decodes:
                self.model(**self.inputs, use_cache=True, logits_to_keep=1)
            else:
                self.model(**self.inputs)

    def _ideal(self) -> None:
        kept = round(self.after)
        seen = kept if self.strategy.stage in EARLY else self.before
        rows = self.before if self.strategy.stage is Stage.LLM else kept
        with torch.no_grad():
            ideal(self.shape, self.model, self.inputs, seen=seen, rows=rows, lengths=self.lengths)

    def _timed(self, run: Callable[[], None], peaks: dict[str, int], side: str) -> float:
        cuda = self.device.type == "cuda"
        if cuda:
            torch.cuda.reset_peak_memory_stats(self.device)
        started = clock(self.device)
        run()
        seconds = clock(self.device) - started
        if cuda:
            peaks[side] = torch.cuda.max_memory_allocated(self.device)
        return seconds

    # -- the language model -------------------------------------------------------------------------------------------

    def _decoding(self) -> dict[str, list[float]]:
        """Seconds of decoding steps: pruned, and unpruned on text with as many KV entries per layer on average."""
        length = round(sum(self.lengths) / len(self.lengths))
        ids = random_text(len(self.reports), length, torch.Generator().manual_seed(1)).to(self.device)
        text = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        steps: dict[str, list[float]] = {"unpruned": [], "pruned": []}
        for _ in range(2):
            steps["unpruned"] += self._steps(text)
            with self._pruned():
                steps["pruned"] += self._steps(self.inputs)
        return steps

    def _prefill(self, repeats: int) -> dict[str, list[float]]:
        """Seconds within the language model, in passes of their own: looking inside costs a synchronisation."""
        decoder = self.model.model.language_model
        seconds: dict[str, list[float]] = {"unpruned": [], "pruned": []}
        for side, around in [("unpruned", nullcontext), ("pruned", self._pruned)] * repeats:
            with around(), Undo() as undo:
                marks = self._marks(undo, decoder)
                self._forward()
            seconds[side].append(marks[-1] - marks[0])
        return seconds

    def _marks(self, undo: Undo, module: nn.Module) -> list[float]:
        """The clock at the beginning and at the end of every pass through a module."""
        marks: list[float] = []
        undo.before(module, lambda *_: marks.append(clock(self.device)))
        undo.after(module, lambda *_: marks.append(clock(self.device)))
        return marks

    def _steps(self, inputs: dict[str, Tensor]) -> list[float]:
        """From one pass through the language model to the next, the first two left out: prefill and warm-up."""
        marks: list[float] = []
        handle = self.model.model.language_model.register_forward_pre_hook(
            lambda module, args: marks.append(clock(self.device))
        )
        try:
            self.model.generate(**inputs, max_new_tokens=DECODING + 3, do_sample=False)
        finally:
            handle.remove()
        return [after - before for before, after in pairwise(marks[2:])]


def check(shape: Shape, layers: int, batches: Sequence[int], repeats: int) -> None:
    """Refuse numbers that make no sense."""
    depth = (shape.text or shape.vision).get("num_hidden_layers", 0)
    if layers and not 1 <= layers <= depth:
        raise PruningError(f"--layers must be in 1 ... {depth} for this shape, or 0 for all, got {layers}")
    if min(batches) < 1 or repeats < 1:
        raise PruningError(f"--batch and --repeats must be at least 1, got {min(batches)} and {repeats}")
