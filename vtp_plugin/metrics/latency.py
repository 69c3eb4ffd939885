"""Wall time of the parts of a call, with the device synchronised at every boundary."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

if TYPE_CHECKING:
    from vtp_plugin.pruning import Pruned
    from vtp_plugin.surgery.undo import Undo


def clock(device: torch.device) -> float:
    """Seconds on a monotonic clock, after the device has finished what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def watch(pruned: Pruned, undo: Undo) -> None:
    """Measure tower, prefill and decode of every call; in-tower and in-LLM selection is part of tower and prefill."""
    _watch(pruned, undo, pruned.adapter.tower.module, lambda: "tower")
    if pruned.adapter.language_model is not None:
        _watch(pruned, undo, pruned.adapter.language_model, lambda: _phase(pruned))


def _phase(pruned: Pruned) -> str:
    return "decode" if "prefill" in pruned.call.seconds else "prefill"


def _watch(pruned: Pruned, undo: Undo, module: nn.Module, part: Any) -> None:
    started: list[float] = []

    def begin(module: nn.Module, args: Any, kwargs: Any) -> None:
        if pruned.call is not None:
            started[:] = [clock(pruned.device)]

    def end(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        if pruned.call is not None and started:
            pruned.call.spend(part(), clock(pruned.device) - started.pop())

    undo.before(module, begin)
    undo.after(module, end)
