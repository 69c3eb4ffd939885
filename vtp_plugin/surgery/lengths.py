"""Limits on the length of prompt and answer, for hosts that generate from embeddings and count those."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from vtp_plugin.surgery.call import Call
from vtp_plugin.surgery.undo import Undo

LIMITS = (("max_length", "max_new_tokens"), ("min_length", "min_new_tokens"))
PREPARE = "_prepare_generated_length"


@contextmanager
def of_the_whole_prompt(model: nn.Module, call: Call) -> Iterator[None]:
    """While open, limits wherever they were set count the prompt as it was, not what is left of it."""

    def prepare(*args: Any, **kwargs: Any) -> Any:
        config = original(*args, **kwargs)
        for name, new in LIMITS:
            default = name == "max_length" and kwargs["has_default_max_length"]
            if getattr(config, new) is None and not default:
                setattr(config, name, max(0, getattr(config, name) - call.dropped))
        return config

    with Undo() as undo:
        original = undo.override(model, PREPARE, prepare)
        yield
