"""Masks that the host makes by itself: of a prompt that comes without one, and ahead of a decoding step.

Those of a step, for caches of fixed length, are over what is left of the prompt.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from vtp_plugin.surgery import asking, cache, turns
from vtp_plugin.surgery.call import Call
from vtp_plugin.surgery.undo import MISSING, Undo, put_back

NAME = "create_masks_for_generate"


def assumed(model: nn.Module, inputs: Mapping[str, Any]) -> dict[str, Tensor]:
    """The mask that the host's `generate` makes of ids [B, L] without one: of what is no padding; none if it cannot."""
    padding, ends = (asking.setting(model, inputs, name) for name in ("pad_token_id", "eos_token_id"))
    if inputs.get("attention_mask") is not None or padding is None:
        return {}
    if padding in (ends if isinstance(ends, list) else [ends]):
        return {}
    return {"attention_mask": inputs["input_ids"].ne(padding).long()}


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
        left = turn.behind(len(embeds), embeds.shape[1], length).to(embeds.device)
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
