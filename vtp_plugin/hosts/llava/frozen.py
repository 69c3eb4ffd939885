"""The package's signatures are those of transformers in 2024: here a model of it is served under today's.

transformers 5.24 hands `cache` to `forward` and `prepare_inputs_for_generation`, which know it as `past_key_values`.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable
from typing import Any

from torch import nn

from vtp_plugin.surgery import cache
from vtp_plugin.surgery.undo import Undo

METHODS = ("forward", "prepare_inputs_for_generation")


def serve(model: nn.Module, undo: Undo) -> None:
    """Let a LlavaLlamaForCausalLM generate under any release of transformers that is supported."""
    for name in METHODS:
        undo.override(model, name, _translated(getattr(model, name)))
        today = cache.name_in(inspect.signature(getattr(super(type(model), model), name)).parameters)
        vars(model)[name].__signature__ = _renamed(inspect.signature(getattr(model, name)), today)
    undo.callback(_quiet())


def _renamed(signature: inspect.Signature, today: str | None) -> inspect.Signature:
    """The same signature with today's name of the cache, which transformers looks for before it generates."""
    old = cache.name_in(signature.parameters)
    parameters = [p.replace(name=today) if today and p.name == old else p for p in signature.parameters.values()]
    return signature.replace(parameters=parameters)


def _translated(original: Callable[..., Any]) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        name = cache.name_in(kwargs)
        return original(*args, **{("past_key_values" if key == name else key): value for key, value in kwargs.items()})

    return call


def _quiet() -> Callable[[], None]:
    """Leave out what transformers says to the package about the old name; the answer takes it back."""
    known = list(warnings.filters)
    warnings.filterwarnings("ignore", ".*past_key_values", FutureWarning, r"llava\.")
    added = [one for one in warnings.filters if one not in known]

    def end() -> None:
        for one in added:
            if one in warnings.filters:
                warnings.filters.remove(one)

    return end
