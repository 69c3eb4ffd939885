"""The rows of a comparison: one configuration over all its seeds, what it answered and what it cost.

Runs that differ only in their random seed are one row: their values are averaged question by question, so that a
method can be compared with `random` over all its seeds, in pairs.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from vtp_plugin.reporting import statistics
from vtp_plugin.reporting.runs import BASELINE, Cell, Run, Spec
from vtp_plugin.reporting.statistics import Estimate

BEFORE_FIRST_TOKEN = ("image_processing", "tower", "selector", "projector", "prefill")


@dataclass(frozen=True)
class Row:
    """One configuration over all its seeds."""

    cells: Sequence[Cell]
    tasks: Sequence[str]

    @property
    def id(self) -> str:
        cell = self.cells[0]
        return cell.id.removesuffix(f"-seed{cell.seed}") if len(self.cells) > 1 else cell.id

    @property
    def label(self) -> str:
        cell = self.cells[0]
        seeds = f" ({len(self.cells)} seeds)" if len(self.cells) > 1 else ""
        return f"{cell.label.removesuffix(f'-seed{cell.seed}') if seeds else cell.label}{seeds}"

    @cached_property
    def values(self) -> dict[str, dict[int, float]]:
        """Task -> question -> value, averaged over the seeds."""
        return {
            task: statistics.pooled([{n: a.correct for n, a in cell.answers(task).items()} for cell in self.cells])
            for task in self.tasks
        }

    @property
    def mean(self) -> float:
        """The mean of the tasks' accuracies."""
        return float(np.mean([np.mean(list(values.values())) for values in self.values.values()]))

    @property
    def tokens(self) -> tuple[float, float]:
        """Visual tokens per image: all, and kept by the last layer."""
        counts = [cell.record["visual_tokens"] for cell in self.cells]
        return tuple(float(np.mean([count.get(key, 0.0) for count in counts])) for key in ("mean_before", "mean_after"))

    @property
    def final(self) -> float:
        """Visual tokens per image that the last decoder layer sees."""
        return self.tokens[1]

    @cached_property
    def spent(self) -> float:
        """Visual tokens per image, averaged over the decoder layers: what a method between them really costs."""
        return float(np.mean([_spent(cell, self.tasks) for cell in self.cells]))

    @property
    def flops(self) -> float | None:
        """Prefill FLOPs relative to the same prompts unpruned; None where the host's record has none (vLLM)."""
        found = [cell.record["prefill_flops"]["ratio"] for cell in self.cells if "prefill_flops" in cell.record]
        return float(np.mean(found)) if found else None

    @property
    def cache(self) -> float | None:
        """Bytes of the KV cache relative to the same prompts unpruned: what is spent, averaged over the layers."""
        found = [cell.record["kv_cache_bytes"]["ratio"] for cell in self.cells if "kv_cache_bytes" in cell.record]
        return float(np.mean(found)) if found else None

    @property
    def prefill(self) -> float | None:
        """Seconds in the decoder layers until the first token, per sample; None where nothing was timed."""
        timed = [cell.record for cell in self.cells if "seconds" in cell.record]
        seconds = [record["seconds"]["prefill"] / max(1, record["samples"]["total"]) for record in timed]
        return float(np.mean(seconds)) if seconds else None

    @property
    def first_token(self) -> float | None:
        """Median seconds until the first token, everything included; None where nothing was timed (vLLM)."""
        found = [seconds for cell in self.cells if (seconds := _first_token(cell.record)) is not None]
        return float(np.mean(found)) if found else None

    def answers(self, cell: Cell, task: str) -> list[str]:
        return [cell.answers(task)[number].answer for number in self.values[task]]

    def targets(self, task: str) -> list[str]:
        return [self.cells[0].answers(task)[number].target for number in self.values[task]]


def _first_token(record: Mapping[str, Any]) -> float | None:
    """Of one run; a record without medians (schema 1) has the mean of all parts before the first token."""
    if record.get("latency", {}).get("ttft"):
        return record["latency"]["ttft"]["p50"]
    parts = [record["seconds"].get(part, 0.0) for part in BEFORE_FIRST_TOKEN] if "seconds" in record else []
    return sum(parts) / max(1, record["samples"]["total"]) if parts else None


def rows(run: Run) -> list[Row]:
    """The unpruned model first, then the finished cells in their order, seeds together."""
    groups: dict[str, list[Cell]] = {}
    for cell in [run.baseline, *(cell for cell in run if cell.pruning != BASELINE)]:
        groups.setdefault(_without_seed(cell), []).append(cell)
    return [Row(cells, run.tasks) for cells in groups.values()]


def _without_seed(cell: Spec) -> str:
    fields = {key: value for key, value in cell.pruning_args.items() if key.rpartition(".")[2] != "seed"}
    return json.dumps([cell.pruning, fields, cell.seed is None and cell.id], sort_keys=True, default=str)


def _spent(cell: Cell, tasks: Sequence[str]) -> float:
    """Of one run: all visual tokens without those that its layers missed on average, per image."""
    images, spent = 0, 0.0
    for answer in (answer for task in tasks for answer in cell.answers(task).values()):
        counts, prompt = answer.report.get("images", ()), answer.report.get("prompt_tokens", {})
        whole, left = (sum(count[key] for count in counts) for key in ("before", "after"))
        layered = "mean_over_layers" in prompt  # vLLM's prompts are as long in all layers
        spent += whole - (prompt["before"] - prompt["mean_over_layers"]) if layered else left
        images += len(counts)
    return spent / images if images else 0.0


def difference(row: Row, other: Row, tasks: Sequence[str] | None = None) -> Estimate:
    """Mean over the tasks of the paired difference row - other, with its interval."""
    return statistics.difference([paired(row, other, task) for task in tasks or row.tasks])


def paired(row: Row, other: Row, task: str) -> list[float]:
    """row - other, question by question."""
    return [value - other.values[task][number] for number, value in row.values[task].items()]
