"""A run that proves nothing is an error: what was asked, what was pruned, and which strategy never cut."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from vtp_plugin.errors import PruningError
from vtp_plugin.strategy import PruningStrategy

IDLE = "VTP_IDLE"  # of the process: a strategy of thresholds that finds nothing to drop is a result


@dataclass
class Seen:
    """What one process has seen of an evaluation; those of several processes are put together at its end."""

    samples: list[dict[str, Any]] = field(default_factory=list)
    requests: int = 0  # that reached the model, and not the response cache
    cut: Counter = field(default_factory=Counter)  # tokens, by strategy; empty where the host does not say
    failure: str = ""


def check(
    strategies: Sequence[PruningStrategy], samples: Sequence[Mapping[str, Any]], everyone: Sequence[Seen], cached: bool
) -> None:
    """PruningError for a run that proves nothing: something raised, no picture was seen, a strategy never cut."""
    if failures := [seen.failure for seen in everyone if seen.failure]:
        raise PruningError(f"{len(failures)} process(es) met an error while generating; the first: {failures[0]}")
    asked = [s for s in strategies if not s.keeps_everything]
    if not asked:
        return
    if not samples:
        return _all_cached(asked, sum(seen.requests for seen in everyone), cached)
    images = [image for sample in samples for image in sample["images"]]
    if not images:
        raise PruningError(f"{_joined(asked)}: none of {len(samples)} questions showed a picture: nothing was pruned")
    cut = sum((seen.cut for seen in everyone), Counter())
    whole = all(image["after"] >= image["before"] for image in images)
    idle = asked if whole else [s for s in asked if cut and not cut[s.name]]
    if wrong := [s for s in idle if not _rounds_to_all(s, images) and not _found_nothing(s)]:
        raise PruningError(f"{_joined(wrong)}: {len(images)} images went in and not one token was cut with {wrong}")
    _warn(samples, idle)


def _all_cached(asked: Sequence[PruningStrategy], requests: int, cached: bool) -> None:
    from loguru import logger

    if requests or not cached:
        raise PruningError(f"{_joined(asked)}: the model answered without a call that could be pruned")
    logger.warning("vtp-plugin: every answer came from the response cache: nothing was measured")


def _rounds_to_all(strategy: PruningStrategy, images: Sequence[Mapping[str, int]]) -> bool:
    """Whether its keep ratio, rounded to tokens, is all of every image: 0.997 of 144."""
    return (
        strategy.budgeted
        and strategy.keep_ratio is not None
        and all(strategy.count(image["before"]) == image["before"] for image in images)
    )


def _found_nothing(strategy: PruningStrategy) -> bool:
    """Whether it decides how much goes, and may say: nothing. That it was asked is proved call by call."""
    return not strategy.budgeted and os.environ.get(IDLE) == "1"


def _warn(samples: Sequence[Mapping[str, Any]], idle: Sequence[PruningStrategy]) -> None:
    """Name what was not pruned: tasks that showed no picture, strategies whose ratio rounds to all tokens."""
    from loguru import logger

    shown: Counter = Counter()
    for sample in samples:
        shown[sample.get("task")] += len(sample["images"])
    for task in (task for task, images in shown.items() if task and not images):
        logger.warning(f"vtp-plugin: {task} showed no picture: nothing was pruned there")
    for strategy in idle:
        why = f"keep_ratio={strategy.keep_ratio:g} rounds to that" if strategy.budgeted else "it found nothing to drop"
        logger.warning(f"vtp-plugin: {strategy.name} kept everything: {why}")


def _joined(strategies: Sequence[PruningStrategy]) -> str:
    return "+".join(s.name for s in strategies)


def report_latency(entry: Mapping[str, Any]) -> None:
    """Let the host's `results["throughput"]` have the times to first token that it does not measure itself.

    The host puts `avg_` in front of every name. Where its model class logs no throughput at all, ours stands in.
    """
    from lmms_eval.models.model_utils import gen_metrics

    measured = entry["latency"]
    if not measured["samples"]:
        return
    extras = {f"ttft_{name}": seconds for name, seconds in measured["ttft"].items()}
    extras |= {f"decode_per_token_{name}": seconds for name, seconds in measured["decode_per_token"].items()}
    tokens, seconds = 0, 0.0
    if not gen_metrics.get_logged_metrics_history():
        tokens, seconds = measured["new_tokens"], entry["seconds"]["total"]
        extras["total_requests"] = entry["samples"]["total"]
    gen_metrics.log_metrics(seconds, tokens, tokens / seconds if seconds else 0.0, extras)
