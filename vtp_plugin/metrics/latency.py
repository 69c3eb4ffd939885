"""Wall time of the parts of a call; where it is measured, with the device synchronised at every boundary.

A part that runs inside another one (a selector inside the tower) is taken out of it, so that parts add up. The time to
the first token ends where the next pass through the language model begins, or with the call.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from vtp_plugin.clock import clock
from vtp_plugin.surgery.call import Call
from vtp_plugin.surgery.session import Session
from vtp_plugin.surgery.undo import Undo

PARTS = ("image_processing", "tower", "selector", "projector", "prefill", "decode")
PERCENTILES = (50, 90, 99)
QUARTILES = torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64)


def begin(call: Call, part: str) -> None:
    """A part of a call begins, perhaps inside another one."""
    call.running.append([part, clock(call.device, waiting=call.measured), 0.0])


def end(call: Call) -> float:
    """The innermost part ends; its seconds, those of parts inside it included."""
    part, started, inside = call.running.pop()
    spent = clock(call.device, waiting=call.measured) - started
    call.spend(part, spent - inside)
    if call.running:
        call.running[-1][2] += spent
    return spent


def watch(pruned: Session, undo: Undo) -> None:
    """Time tower, projector, prefill and decode of every call, and count the passes through the language model."""
    adapter = pruned.adapter
    _time(pruned, undo, adapter.tower.module, lambda call: "tower")
    for projector in {id(p): p for p in (*adapter.projectors, adapter.projector)}.values():
        _time(pruned, undo, projector, lambda call: "projector")
    if adapter.language_model is not None:
        undo.before(adapter.language_model, _counter(pruned))
        _time(pruned, undo, adapter.language_model, lambda call: "decode" if call.passes > 1 else "prefill")


def _time(pruned: Session, undo: Undo, module: nn.Module, part: Callable[[Call], str]) -> None:
    def before(module: nn.Module, args: Any, kwargs: Any) -> None:
        if pruned.call is not None:
            begin(pruned.call, part(pruned.call))

    def after(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        if pruned.call is not None and pruned.call.running:
            end(pruned.call)

    undo.before(module, before)
    undo.after(module, after)


def _counter(pruned: Session) -> Callable[..., None]:
    """Notes every pass through the language model: the prefill, then tokens, those before them, and if cached."""

    def count(module: nn.Module, args: Any, kwargs: Any) -> None:
        call = pruned.call
        if call is None:
            return
        rows, tokens = _size(args, kwargs)
        call.passes += 1
        if call.passes == 1:
            call.copies, call.columns = max(1, rows // call.rows), tokens
            return
        if call.first_token is None:
            call.first_token = clock(call.device) - call.started
        cached = kwargs.get("use_cache", True) is not False and tokens < call.columns
        done = sum(step[0] for step in call.steps)
        call.steps.append((tokens if cached else tokens - call.columns - done, done, cached))

    return count


def _size(args: Any, kwargs: Any) -> tuple[int, int]:
    """Rows and tokens of a pass."""
    values = (kwargs.get("inputs_embeds"), kwargs.get("input_ids"), *args)
    return next((value.shape[0], value.shape[1]) for value in values if value is not None)


def percentiles(values: Sequence[float]) -> dict[str, float]:
    """`mean`, `p50`, `p90`, `p99`, linearly interpolated; empty for no values."""
    if not values:
        return {}
    numbers = torch.tensor(values, dtype=torch.float64)
    marks = torch.quantile(numbers, torch.tensor(PERCENTILES, dtype=torch.float64) / 100).tolist()
    return {"mean": numbers.mean().item(), **{f"p{p}": mark for p, mark in zip(PERCENTILES, marks, strict=True)}}


def spread(values: Sequence[float]) -> float | None:
    """Half of the values lie in a range of this width, as a share of their median; None for no values."""
    if not values:
        return None
    low, middle, high = torch.quantile(torch.tensor(values, dtype=torch.float64), QUARTILES).tolist()
    return (high - low) / middle if middle else None
