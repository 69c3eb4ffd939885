"""The host's own loss, with the host's own arguments, on the columns that are left."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from vtp_plugin.errors import HostChanged, PruningError
from vtp_plugin.surgery.columns import IGNORED, Columns
from vtp_plugin.surgery.undo import MISSING, Undo, put_back

LABELS = ("labels", "shift_labels")
ELSEWHERE = (
    "{} computes its loss elsewhere than in loss_function, where labels are narrowed to the columns that are left"
)


@contextmanager
def translated(model: nn.Module, wanted: bool, translate: Callable[[Tensor, dict[str, Any]], tuple]) -> Iterator[None]:
    """While open, the model's loss is asked about (logits, arguments) as `translate` makes them of the host's.

    HostChanged if the host computed no loss through it although one is `wanted`, or if what stands in the place of the
    host's own forward (a fused loss) failed before it.
    """
    if not wanted:
        yield
        return
    original, asked = model.loss_function, []
    signature = inspect.signature(original)

    def loss(*args: Any, **kwargs: Any) -> Any:
        asked.append(True)
        bound = signature.bind(*args, **kwargs)
        arguments = dict(bound.arguments)
        rest = [p.name for p in signature.parameters.values() if p.kind is p.VAR_KEYWORD]
        arguments |= {k: v for name in rest for k, v in arguments.pop(name, {}).items()}
        logits, arguments = translate(arguments.pop("logits"), arguments)
        return original(logits=logits, **arguments)

    with Undo() as undo:
        undo.callback(put_back, model, "_loss_function", vars(model).get("_loss_function", MISSING))
        object.__setattr__(model, "_loss_function", loss)
        try:
            yield
        except Exception as error:
            if asked or isinstance(error, PruningError) or not (home := replaced(model)):
                raise
            raise HostChanged(f"{ELSEWHERE.format(type(model).__name__)} (its forward is that of {home})") from error
    if not asked:
        raise HostChanged(ELSEWHERE.format(type(model).__name__))


def replaced(model: nn.Module) -> str:
    """The module that a model's forward was written in, if somebody has put it in the place of the class's own."""
    home = inspect.unwrap(type(model).forward).__module__
    return "" if home == type(model).__module__ else home


def narrowed(arguments: dict[str, Any], seen: Columns, first: int, window: int) -> dict[str, Any]:
    """Labels of the caller's columns from `first` on, for the last `window` of the columns that are left.

    The others are passed on: the number of items is the caller's own.
    """
    last, ignored = Columns(seen.columns[:, -window:], seen.length), _ignored(arguments)
    arguments = dict(arguments)
    if arguments.get("shift_labels") is not None:
        shifted = _from(arguments["shift_labels"], first, ignored)
        arguments["shift_labels"] = _shifted(shifted, last, ignored)
    if arguments.get("labels") is not None:
        labels = last.take(_from(arguments["labels"], first, ignored), ignored)
        begins = (last.columns >= first).cumsum(1) == 1  # the first one that was asked for has nobody to predict it
        arguments["labels"] = labels.masked_fill(begins & (last.columns >= first), ignored) if first else labels
    return arguments


def _ignored(arguments: dict[str, Any]) -> int:
    """The label that this loss leaves out."""
    return arguments.get("ignore_index", IGNORED)


def _from(labels: Tensor, first: int, ignored: int) -> Tensor:
    return torch.nn.functional.pad(labels, (first, 0), value=ignored)


def _shifted(labels: Tensor, last: Columns, ignored: int) -> Tensor:
    """For every column that is left, the caller's label of the next one that is left."""
    behind = torch.nn.functional.pad(last.columns[:, 1:], (0, 1), value=labels.shape[1])
    asked = last.valid & (behind > 0)
    return torch.where(asked, labels.gather(1, (behind - 1).clamp(min=0)), ignored)


def predicted(arguments: dict[str, Any], there: Tensor) -> dict[str, Any]:
    """Labels beside single columns that were asked for: those whose predicting column is not `there` are ignored."""
    arguments = dict(arguments)
    before = torch.nn.functional.pad(there[..., :-1], (1, 0), value=True)
    for name, known in (("labels", before), ("shift_labels", there)):
        if arguments.get(name) is not None:
            arguments[name] = torch.where(known, arguments[name], _ignored(arguments))
    return arguments
