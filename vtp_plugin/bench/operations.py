"""How many operations a piece of work asks of a device: on a GPU each is a kernel that has to be launched."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

IDLE = ("empty", "new_empty", "detach", "lift", "_unsafe_view")  # reserve memory, or are views by another name


def operations(work: Callable[[], Any]) -> int:
    """Operators that compute, without views."""
    with torch.no_grad(), _Counting() as counting:
        work()
    return counting.number


class _Counting(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.number = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        idle = func.is_view or func.overloadpacket.__name__ in IDLE
        self.number += not idle
        return func(*args, **kwargs or {})
