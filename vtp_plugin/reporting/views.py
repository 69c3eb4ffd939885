"""One picture, one question, one set of strategies: what was kept, and what the model answered."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from vtp_plugin.config import NONE
from vtp_plugin.errors import PruningError
from vtp_plugin.pruning import Pruned, prune
from vtp_plugin.reporting import statistics
from vtp_plugin.reporting.observations import Observation, Observer
from vtp_plugin.strategy import PruningStrategy
from vtp_plugin.tiny.inference import answer


@dataclass(frozen=True)
class View:
    """What `kept_figure` draws in one panel."""

    label: str
    question: str
    answer: str
    look: Observation
    summary: str = ""  # what was cut and saved
    right: bool | None = None  # whether the answer is; None: nobody said what is right


def view(
    model: nn.Module,
    processor: Any,
    picture: Any,
    question: str,
    strategies: Sequence[PruningStrategy],
    label: str,
    *,
    target: str | None = None,
) -> View:
    """Ask the pruned model about the picture; `target`: the right answer. PruningError if tokens have no place."""
    with prune(model, list(strategies) or NONE, processor=processor) as pruned:
        observer, looks = Observer(pruned), []
        pruned.finished.append(lambda call: looks.extend(observer.observe(call)))
        said = answer(model, processor, picture, question)
    right = None if target is None else statistics.normal(said) == statistics.normal(target)
    return View(label, question, said, _whole(pruned, looks), pruned.summary(), right)


def _whole(pruned: Pruned, looks: Sequence[Observation | None]) -> Observation:
    """The look at the whole picture, where a family makes several images of it."""
    look = looks[pruned.adapter.overview] if looks else None
    if look is None or look.pixels is None:
        raise PruningError(
            f"{pruned.adapter.models}: its visual tokens belong to no place of the picture, so there is nothing to draw"
        )
    return look
