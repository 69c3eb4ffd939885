"""How a signal is declared, and what follows from the declarations.

    @signal("key_norms", Stage.LLM, "[B, N] fp32: L1 norms of the keys of the layer before the cut", taps=Tap.LAYER)
    def key_norms(at: LayerView) -> Tensor:
        return at.reading.norms(at.sample)[at.image]

The type of the reader's argument says where it reads (`signals.views`). From the declarations come: what is hooked when
a strategy that needs the signal is attached, its value, the refusal of a signal that a stage does not give, a sample
for `vtp check`, and the table in docs/add-a-strategy.md.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from enum import Enum
from typing import Any, Protocol

from vtp_plugin.errors import PruningError
from vtp_plugin.facts.family import Family
from vtp_plugin.signals import views
from vtp_plugin.stages import Stage


class Tap(Enum):
    """What the machinery has to keep or to run because a signal is made of it."""

    PIXELS = "the raw pixels of every image"
    CONTENT = "a number that stands for the raw pixels of every image"
    QUESTION = "the question of every image"
    SPACE = "the space where patches are compared with questions"
    OUTPUT = "the output of the tower's block `tower_layer`"
    CLASS = "the output of the block that is projected"
    PROJECTED = "what the projector makes of the candidates"
    LAYER = "the attention of the decoder layer before the cut"
    BEHIND = "the attention of the decoder layer behind the cut, as if nothing were cut"
    ENTRY = "the embeddings of the prompt"


class Asking(Protocol):
    """What the declarations read of a strategy."""

    name: str
    stage: Stage
    needs: Collection[str]
    text_encoder: str


Taps = Tap | Collection[Tap] | Callable[[Asking], Collection[Tap]]


@dataclass(frozen=True)
class Signal:
    """One signal at one place."""

    name: str
    view: type[views.View]  # where it is read: one class per place
    meaning: str  # "[B, N] fp32: what it is"
    read: Callable[[Any], Any]
    taps: Callable[[Asking], Collection[Tap]]
    refuse: Callable[[Family, Asking], str]  # why a model cannot give it; "" if it can
    block: int | str | None  # of the tower, or the property of a strategy that says it; None: `tower_layer`
    several_views: bool  # None for an image of one view
    sample: Callable[[Any], Any] | None  # of a `synthetic.Draw`; None: normal values of its shape

    @property
    def axes(self) -> tuple[str, ...]:
        """The names of its axes: B images, N tokens, T tokens of text, H heads; others are widths."""
        return tuple(part.strip() for part in re.match(r"\[(.*?)\]", self.meaning)[1].split(","))

    @property
    def per_token(self) -> bool:
        """Whether it has one entry for every token."""
        return "N" in self.axes

    @property
    def narrow(self) -> bool:
        """Whether it is no more than one number for every token."""
        return set(self.axes) <= {"B", "N"}


_DECLARED: dict[type[views.View], dict[str, Signal]] = {view: {} for view in views.VIEWS}


def signal(
    name: str,
    stage: Stage,
    meaning: str,
    *,
    taps: Taps = (),
    refuse: Callable[[Family, Asking], str] = lambda family, strategy: "",
    block: int | str | None = None,
    several_views: bool = False,
    sample: Callable[[Any], Any] | None = None,
) -> Callable[[Callable[[Any], Any]], Callable[[Any], Any]]:
    """Declare the decorated function, whose argument is one of the `views` of the stage, as the reader of a signal.

    `meaning` begins with the shape: "[B, N] fp32: ...". A name may be declared at several places.
    """
    if not name.isidentifier() or not re.match(r"\[[^\]]*\]", meaning):
        raise PruningError(f"signal '{name}': expected a name and a meaning like '[B, N] fp32: what it is'")
    if callable(taps) and not isinstance(taps, Tap):
        tapped = taps
    else:
        fixed = (taps,) if isinstance(taps, Tap) else tuple(taps)
        tapped = lambda strategy: fixed  # noqa: E731

    def declare(read: Callable[[Any], Any]) -> Callable[[Any], Any]:
        view = _view_of(read, name, stage)
        other = _DECLARED[view].get(name)
        if other is not None and _source(other.read) != _source(read):
            raise PruningError(f"two signals of one stage are named '{name}': {_path(other.read)} and {_path(read)}")
        _DECLARED[view][name] = Signal(name, view, meaning, read, tapped, refuse, block, several_views, sample)
        return read

    return declare


def _view_of(read: Callable[[Any], Any], name: str, stage: Stage) -> type[views.View]:
    """The view that the reader's argument is annotated with; the first of the stage if it is not annotated."""
    of_stage = [view for view in views.VIEWS if view.stage is stage]
    annotation = next((v for k, v in read.__annotations__.items() if k != "return"), of_stage[0])
    said = annotation if isinstance(annotation, str) else annotation.__name__
    for view in of_stage:
        if said.split(".")[-1] == view.__name__:
            return view
    possible = ", ".join(view.__name__ for view in of_stage)
    raise PruningError(f"signal '{name}': a reader at the {stage.value} stage takes {possible}, got {said}")


def _path(read: Callable[[Any], Any]) -> str:
    return f"{read.__module__}.{read.__qualname__}"


def _source(read: Callable[[Any], Any]) -> tuple[str, str]:
    """File and name: a module that is loaded again declares the same signal."""
    return read.__code__.co_filename, read.__qualname__


# -- what follows -----------------------------------------------------------------------------------------------------


def names() -> set[str]:
    """Of all signals."""
    return {name for declared in _DECLARED.values() for name in declared}


def everything() -> Iterator[Signal]:
    """All declarations, in the order in which one image passes their places."""
    for declared in _DECLARED.values():
        yield from declared.values()


def given(stage: Stage, *, inside: bool = False) -> dict[str, Signal]:
    """The signals of a stage by name; `inside`: of the tower's blocks, where a vit-stage strategy merges in them."""
    declared = [own for view, own in _DECLARED.items() if view.stage is stage and view.inside is inside]
    return {name: one for own in declared for name, one in own.items()}


def needed(strategy: Asking, *, inside: bool = False) -> list[Signal]:
    """The signals that a strategy needs, as far as its stage gives them."""
    offered = given(strategy.stage, inside=inside)
    return [offered[name] for name in dict.fromkeys(strategy.needs) if name in offered]


def found_in(strategy: Asking, view: views.View, *, inside: bool = False) -> dict[str, Any]:
    """The values of the signals that a strategy needs and that are read from this view, by name."""
    return {s.name: s.read(view) for s in needed(strategy, inside=inside) if isinstance(view, s.view)}


def taps(strategy: Asking, *, inside: bool = False) -> set[Tap]:
    """What has to be kept for the signals of a strategy."""
    return {tap for one in needed(strategy, inside=inside) for tap in one.taps(strategy)}


def reads_question(strategies: Collection[Asking]) -> bool:
    """Whether one of them compares patches with the question of an image."""
    return any(Tap.QUESTION in taps(strategy) for strategy in strategies)


def wrong(strategy: Asking, *, inside: bool = False) -> str:
    """Which of its needs the stage of a strategy does not give; "" if it gives all."""
    offered = given(strategy.stage, inside=inside)
    missing = [name for name in strategy.needs if name not in offered]
    where = f"the {strategy.stage.value} stage does not give" + " inside the blocks" * inside
    return f"needs {missing[0]}, which {where}; it gives {', '.join(sorted(offered))}" if missing else ""
