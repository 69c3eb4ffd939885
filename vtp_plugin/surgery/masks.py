"""Masks that the host makes ahead of a decoding step, for caches of fixed length: over what is left of the prompt."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from vtp_plugin.surgery import cache, turns
from vtp_plugin.surgery.call import Call
from vtp_plugin.surgery.undo import MISSING, Undo, put_back

NAME = "create_masks_for_generate"


@contextmanager
def translated(model: nn.Module, call: Call) -> Iterator[None]:
    """While open, the host's `generate` makes masks of the shorter prompt; that of a prefill is left to the pass."""
    original = _original(model)

    def make(**kwargs: Any) -> Any:
        turn = call.turn
        if turn is None or turn.untouched:
            return original(**kwargs)
        embeds, mask, length = (
            kwargs["inputs_embeds"],
            kwargs["attention_mask"],
            turns.stored_length(cache.given(kwargs)),
        )
        if not length:
            return mask
        left = turn.behind(len(embeds), embeds.shape[1], length)
        if mask is not None:
            mask = left.mask(mask, embeds.shape[1])
        elif not left.full:
            mask = left.valid.long()
        return original(**{**kwargs, "attention_mask": mask})

    with Undo() as undo:
        undo.callback(put_back, model, NAME, vars(model).get(NAME, MISSING))
        object.__setattr__(model, NAME, make)
        yield


def _original(model: nn.Module) -> Callable[..., Any]:
    """The model's own function, or that of the file in which `generate` stands."""
    modules = (sys.modules[cls.__module__] for cls in type(model).__mro__ if "generate" in vars(cls))
    found = (getattr(model, NAME, None), *(getattr(module, NAME, None) for module in modules))
    return next(function for function in found if function is not None)
