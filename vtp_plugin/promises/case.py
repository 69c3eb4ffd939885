"""What the checks of a family are given: a small model, prompts for it, and where they come from."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from vtp_plugin import modules, plugins
from vtp_plugin.adapter import Adapter, find_adapter
from vtp_plugin.errors import PruningError


@dataclass
class Case:
    """A model of the family, as small as it can be, with random weights in eval mode, and prompts for it.

    `prompts`: the arguments of `generate` for one sample each, with one or more pictures; two of unequal length show
    most. `batch`: the same samples together, padded on the left. `layer`: a decoder layer that may be cut; None: the
    first, but not before 2.
    """

    model: nn.Module
    prompts: Sequence[Mapping[str, Any]]
    batch: Mapping[str, Any] | None = None
    processor: Any = None  # with an image processor's mean and standard deviation; the pixels stage needs it
    layer: int | None = None
    later: Mapping[str, int] = field(default_factory=dict)  # of a new token, in arguments with a value per column

    def __post_init__(self) -> None:
        if not isinstance(self.model, nn.Module):
            raise PruningError(f"Case: model must be a torch module, got {type(self.model).__name__}")
        for inputs in (*self.prompts, *([self.batch] if self.batch is not None else [])):
            if not isinstance(inputs, Mapping) or not isinstance(inputs.get("input_ids"), Tensor):
                raise PruningError("Case: prompts and batch are arguments of generate, with input_ids [B, L]")
        if not self.prompts or any(len(prompt["input_ids"]) != 1 for prompt in self.prompts):
            raise PruningError("Case: prompts must be one sample each, and at least one of them")
        if self.batch is not None and len(self.batch["input_ids"]) != len(self.prompts):
            raise PruningError("Case: batch must have the samples of prompts, one row each")

    @cached_property
    def adapter(self) -> Adapter:
        """The facts of the family. PruningError if no registered family knows the model."""
        return find_adapter(self.model, self.processor, plugins.adapters())


def load(name: str) -> Case:
    """What `module:builder` makes, the module being a name or a Python file, whose families join the catalogue.

    PruningError in one sentence if there is no such builder, or if it makes no `Case`.
    """
    where, _, attribute = name.rpartition(":")
    if not where or not attribute.isidentifier():
        raise PruningError(f"check-model takes module:builder, for example my_family.py:build, got {name!r}")
    builder = getattr(_module(where), attribute, None)
    if not callable(builder):
        raise PruningError(f"{where} has no function {attribute!r}")
    return _built(builder, name)


def _module(where: str) -> Any:
    if where.endswith(".py"):
        plugins.join([Path(where)])
        return modules.load(Path(where))
    try:
        return importlib.import_module(where)
    except Exception as error:
        raise PruningError(f"{where} cannot be imported: {type(error).__name__}: {error}") from None


def _built(builder: Callable[[], Any], name: str) -> Case:
    try:
        case = builder()
    except PruningError:
        raise
    except Exception as error:
        raise PruningError(f"{name} raised {type(error).__name__}: {error}") from None
    if not isinstance(case, Case):
        raise PruningError(f"{name} must return a vtp_plugin.promises.Case, got {type(case).__name__}")
    return case
