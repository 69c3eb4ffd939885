"""Speed without checkpoints: random weights in a real model's shape, pruned against unpruned and against the ideal.

All sides use the same attention kernel, are warmed up, run in turn, and are timed with the device synchronised. Ratios
are taken within a round and the median over rounds is reported, so that a machine that slows down does not favour one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from vtp_plugin.bench.journal import Item
from vtp_plugin.bench.timing import DECODING, SIDES, Timing
from vtp_plugin.clock import clock
from vtp_plugin.errors import PruningError
from vtp_plugin.hosts.transformers.architectures import Shape, random_text
from vtp_plugin.hosts.transformers.ideals import ideal
from vtp_plugin.pruning import Pruned, prune
from vtp_plugin.reporting.record import samples_of
from vtp_plugin.signals import reads_question
from vtp_plugin.stages import Stage
from vtp_plugin.strategy import PruningStrategy
from vtp_plugin.surgery.call import Call
from vtp_plugin.surgery.undo import Undo

DECODED = 3  # rounds in which decoding is timed
LEAST = 2  # rounds, however little time there is
TIMED = "calls behind the first of an attached model"
EARLY = (Stage.PIXELS, Stage.VIT)


class Levels:
    """Stands in for an image processor: the pictures are random numbers."""

    image_mean, image_std, do_normalize = [0.5] * 3, [0.25] * 3, True

    def preprocess(self, images: Any) -> None:
        """Never called: the pixels are made without it."""


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
    shape: Shape,
    model: nn.Module,
    strategies: Sequence[PruningStrategy],
    batch: int,
    repeats: int = 5,
    seconds: float = float("inf"),
) -> list[Timing]:
    """Time every strategy against the unpruned model and its ideal, in turn. Works for encoders, too.

    `model` comes from `shape.build`; `batch` images, one per prompt. `seconds`: no further round begins behind them,
    once there are two. Raises PruningError for what `refuse` refuses.
    """
    refuse(strategies, shape)
    inputs = shape.inputs(model, batch)
    return [_Bench(shape, model, inputs, strategy).run(repeats, seconds) for strategy in strategies]


def items(
    shape: Shape,
    model: Callable[[], nn.Module],
    strategies: Sequence[PruningStrategy],
    batches: Sequence[int],
    repeats: int,
    seconds: float = float("inf"),
) -> list[Item]:
    """Every strategy at every batch size, as rows of a journal; the model is asked for when a row is measured."""

    def item(strategy: PruningStrategy, batch: int) -> Item:
        key = {"strategy": strategy.name, "config": strategy.config(), "batch": batch}
        keep = f" {strategy.keep_ratio:g}" if strategy.keep_ratio else ""
        return Item(
            key,
            f"{strategy.name}{keep}, batch {batch}",
            lambda: compare(shape, model(), [strategy], batch, repeats, seconds)[0].as_json(),
        )

    return [item(strategy, batch) for batch in batches for strategy in strategies]


def built(shape: Shape, facts: Mapping[str, Any], device: torch.device) -> nn.Module:
    """The model of a record: its layers, dtype and attention."""
    return shape.build(facts["layers"] or None, device, getattr(torch, facts["dtype"]), facts["attention"])


def estimated(
    shape: Shape, model: nn.Module, strategies: Sequence[PruningStrategy], batches: Sequence[int], repeats: int
) -> float:
    """About how many seconds everything takes, from one unpruned pass at the smallest batch."""
    smallest = min(batches)
    one = _Unpruned(shape, model, shape.inputs(model, smallest))
    one.forward()
    started = clock(one.device)
    one.forward()
    per_prompt = (clock(one.device) - started) / smallest
    shares = [(1 + (strategy.keep_ratio or 1.0)) / 2 for strategy in strategies]  # of a pass, pruned or ideal
    passes = [share + (repeats + 1) * (1 + 2 * share) for share in shares]
    if shape.decodes:  # prefills by themselves, and generations of about a pass more than their prefill
        passes = [n + (repeats + DECODED) * (1 + share) + DECODED for n, share in zip(passes, shares, strict=True)]
    return per_prompt * sum(batches) * sum(passes)


class _Unpruned:
    """The model itself on one batch."""

    def __init__(self, shape: Shape, model: nn.Module, inputs: dict[str, Tensor]) -> None:
        self.shape, self.model, self.inputs = shape, model, inputs
        self.device = next(model.parameters()).device

    def forward(self) -> None:
        with torch.no_grad():
            if self.shape.decodes:
                self.model(**self.inputs, use_cache=True, logits_to_keep=1)
            else:
                self.model(**self.inputs)


class _Bench(_Unpruned):
    """One strategy on one model and one batch."""

    def __init__(self, shape: Shape, model: nn.Module, inputs: dict[str, Tensor], strategy: PruningStrategy) -> None:
        super().__init__(shape, model, inputs)
        self.strategy = strategy
        self.calls: list[Call] = []
        with self._pruned() as pruned:
            self.forward()
            self.reports = samples_of(pruned, self.calls[-1])
        images = [image for report in self.reports for image in report["images"]]
        self.before = images[0]["before"]
        self.after = sum(image["after"] for image in images) / len(images)
        self.lengths = list(self.reports[0].get("prompt_tokens", {}).get("by_layer", []))

    def run(self, repeats: int, budget: float = float("inf")) -> Timing:
        seconds: dict[str, list[float]] = {side: [] for side in SIDES}
        attaching, starting, peaks, began = [], [], {}, clock(self.device)
        for repeat in range(repeats + 1):
            if repeat > LEAST and clock(self.device) - began > budget:
                break
            took = {"unpruned": self._timed(self.forward, peaks, "unpruned")}
            took["ideal"] = self._timed(self._ideal, peaks, "ideal")
            started = clock(self.device)
            with self._pruned():
                attached = clock(self.device) - started
                first = self._timed(self.forward, {}, "pruned")  # works out what stays as long as it is attached
                took["pruned"] = self._timed(self.forward, peaks, "pruned")
                started = clock(self.device)
            if repeat:  # the first round warms up
                attaching.append(attached + clock(self.device) - started)
                starting.append(first)
                for side, value in took.items():
                    seconds[side].append(value)
        repeats = len(attaching)
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
            first=starting,
            kv_bytes={when: sum(entry[when] for entry in kv) for when in ("before", "after")} if kv else None,
            peak_bytes=peaks or None,
            prefill=self._prefill(repeats) if self.shape.decodes else {},
            decoding=self._decoding() if self.shape.decodes else {},
            config=self.strategy.config(),
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
        for _ in range(DECODED):
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
                self.forward()
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
