"""The abstraction that every model family fills in: its facts, how its tokens lie, and how its calls are wrapped."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
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
    names: ClassVar[tuple[str, ...]] = ()  # of the model classes
    refused: ClassVar[str] = ""  # why none of its models can be pruned, at no stage
    facts: ClassVar[Mapping[str, Any]] = {}  # paths in the configuration -> the value, or the type, that is known here

    @classmethod
    def matches(cls, model: nn.Module) -> bool:
        """Whether this model is of the family. Must not import the family's package."""
        return type(model).__name__ in cls.names and not cls.unlike(model)

    @classmethod
    def unlike(cls, model: nn.Module) -> str:
        """How a model of one of the classes differs from what is known of the family; "" if it does not."""
        return cls.unlike_in(getattr(model, "config", None))

    @classmethod
    def unlike_in(cls, config: Any) -> str:
        """The same of a configuration alone."""
        for path, known in cls.facts.items():
            found = config
            for part in path.split("."):
                found = getattr(found, part, None)
            if not (isinstance(found, known) if isinstance(known, type) else found == known):
                wanted = {int: "a whole number"}.get(known, repr(known))
                return f"its configuration has {path}={found!r}, only {wanted} is possible yet"
        return ""

    @classmethod
    def tokens_in(cls, config: Mapping[str, Any]) -> int | None:
        """The tokens of every image, from a model's configuration; None where it does not say."""
        vision = config.get("vision_config")
        sides = [vision.get(name) for name in ("image_size", "patch_size")] if isinstance(vision, Mapping) else []
        known = cls.uniform and sides and all(type(side) is int and side > 0 for side in sides)
        return (sides[0] // sides[1]) ** 2 if known else None

    @abstractmethod
    def install(self, pruned: Session, undo: Undo) -> None:
        """Wrap the model's entry points, on the instance, so that every call becomes a `Call` of `pruned`."""


def find_adapter(model: nn.Module, processor: Any, adapters: Sequence[type[Adapter]]) -> Adapter:
    """The adapter of the model; the last registered is asked first. HostChanged if the host is not what it knows.

    PruningError for a model of no family, or of one that is refused.
    """
    for cls in reversed(adapters):
        if cls.matches(model):
            if cls.refused:
                raise PruningError(f"{cls.models} cannot be pruned: {cls.refused}")
            check(cls.touches, model)
            return cls(model, processor)
    name = type(model).__name__
    known = [cls for cls in reversed(adapters) if name in cls.names]
    if differences := [f"{cls.models} is known as, but {why}" for cls in known if (why := cls.unlike(model))]:
        raise PruningError(f"this {name} is nearly what {'; and nearly what '.join(differences)}")
    supported = ", ".join(cls.models for cls in adapters if not cls.refused)
    raise PruningError(f"no adapter knows the model {name}. Supported: {supported}")
