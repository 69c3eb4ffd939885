"""The abstraction that every model family fills in: its facts, how its tokens lie, and how its calls are wrapped."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

from torch import nn

from vtp_plugin.contract import TouchPoint, check
from vtp_plugin.errors import PruningError
from vtp_plugin.facts.family import Family
from vtp_plugin.facts.tower import SharedSpace as SharedSpace
from vtp_plugin.facts.tower import Tower as Tower
from vtp_plugin.surgery.layout import Layout
from vtp_plugin.surgery.session import Session
from vtp_plugin.surgery.undo import Undo
from vtp_plugin.surgery.whole import WHOLE


class Adapter(Family, ABC):
    """One model family: its facts (see `facts.family.Family`), and the three things below."""

    layout: Layout = WHOLE  # how the tokens of its tower lie, and where they are cut
    touches: ClassVar[Sequence[TouchPoint]] = ()  # where the family touches its host, from the model

    @classmethod
    @abstractmethod
    def matches(cls, model: nn.Module) -> bool:
        """Whether this model is of the family. Must not import the family's package."""

    @abstractmethod
    def install(self, pruned: Session, undo: Undo) -> None:
        """Wrap the model's entry points, on the instance, so that every call becomes a `Call` of `pruned`."""


def find_adapter(
    model: nn.Module, processor: Any, adapters: Sequence[type[Adapter]], describe: Callable[[], str]
) -> Adapter:
    """The adapter of the model; the last registered is asked first. HostChanged if the host is not what it knows."""
    for cls in reversed(adapters):
        if cls.matches(model):
            check(cls.touches, model)
            return cls(model, processor)
    raise PruningError(f"no adapter knows the model {type(model).__name__}. Supported: {describe()}")
