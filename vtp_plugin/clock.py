"""The one clock: seconds of wall time, on request behind everything that a device was given."""

from __future__ import annotations

import time

import torch


def clock(device: torch.device, *, waiting: bool = True) -> float:
    """Seconds on a monotonic clock; `waiting`: after the device has finished what it was given."""
    if waiting and device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
