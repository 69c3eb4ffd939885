"""Selections that launch hundreds of small kernels, recorded once per shape and replayed: CUDA graphs.

A greedy selection asks the device for a handful of kernels per pick, each of them done sooner than the host can ask for
the next. A graph asks for all of them at once. The kernels are the same, and so is every bit of the answer.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor

GRAPHS = 4  # that are kept, those that were asked for last
NUMBERS = 2**25  # that the arguments of one may hold: a graph keeps its own copies of them
SEEN = 2  # calls of a shape that are as ever; one that comes back is worth recording

_recorded: OrderedDict[Any, Recorded] = OrderedDict()
_calls: Counter[Any] = Counter()


class Recorded:
    """A function of tensors [...] on one device, recorded with copies of them."""

    def __init__(
        self, function: Callable[..., Tensor], tensors: dict[str, Tensor | None], facts: dict[str, Any]
    ) -> None:
        self.given = {name: None if tensor is None else tensor.clone() for name, tensor in tensors.items()}
        self.graph = torch.cuda.CUDAGraph()
        torch.cuda.current_stream().synchronize()
        with torch.cuda.graph(self.graph, capture_error_mode="thread_local"):
            self.answer = function(**self.given, **facts)

    def __call__(self, tensors: dict[str, Tensor | None]) -> Tensor:
        for name, tensor in tensors.items():
            if tensor is not None:
                self.given[name].copy_(tensor)
        self.graph.replay()
        return self.answer.clone()


def replayed(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """`function`, whose arguments are tensors (or None) and whole numbers, recorded where that pays.

    That is on a CUDA device, without gradients, from the third call with the same shapes on. It must not read a value
    of the device, nor answer with one of its arguments, nor change one.
    """
    names = function.__code__.co_varnames[: function.__code__.co_argcount]

    @wraps(function)
    def called(*args: Any, **kwargs: Any) -> Tensor:
        given = dict(zip(names, args, strict=False)) | kwargs
        tensors = {name: value for name, value in given.items() if value is None or isinstance(value, Tensor)}
        if not _worthwhile([tensor for tensor in tensors.values() if tensor is not None]):
            return function(**given)
        facts = {name: value for name, value in given.items() if name not in tensors}
        shapes = {n: None if t is None else (t.shape, t.stride(), t.dtype, t.device) for n, t in tensors.items()}
        stream = torch.cuda.current_stream()  # another one may be asked for the same at the same time
        key = function, stream.device, stream.cuda_stream, tuple(shapes.items()), tuple(facts.items())
        _calls[key] += 1
        if _calls[key] <= SEEN:
            return function(**given)
        if key not in _recorded:
            _recorded[key] = Recorded(function, tensors, facts)
            while len(_recorded) > GRAPHS:
                _calls.pop(_recorded.popitem(last=False)[0])
        _recorded.move_to_end(key)
        return _recorded[key](tensors)

    return called


def undisturbed(tensors: list[Tensor]) -> bool:
    """Whether all are on a CUDA device that is there, without gradients, and nobody traces or captures what is done."""
    return (
        all(tensor.is_cuda and not tensor.requires_grad for tensor in tensors)
        and torch.cuda.is_available()
        and not torch.compiler.is_compiling()
        and not torch.cuda.is_current_stream_capturing()
    )


def _worthwhile(tensors: list[Tensor]) -> bool:
    """Whether these can be recorded."""
    return undisturbed(tensors) and sum(tensor.numel() for tensor in tensors) <= NUMBERS
