"""What an attached model is for the machinery: the parts of `pruning.Pruned` that hooks and metrics use."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch
from torch import nn

from vtp_plugin.facts.family import Family
from vtp_plugin.facts.tower import SharedSpace
from vtp_plugin.strategy import PruningStrategy
from vtp_plugin.surgery.call import Call
from vtp_plugin.surgery.judging import Judgement


class Positions(Protocol):
    """What `positions` came to, see `positions.Choice`."""

    prompt: str | None
    layers: Mapping[int, str]


class Session(Protocol):
    """One model with strategies attached."""

    model: nn.Module
    adapter: Family
    strategies: list[PruningStrategy]
    call: Call | None  # the one that is running
    positions: Positions
    spaces: Mapping[Any, SharedSpace]  # where patches are compared with questions

    vision: Any  # the `VisionCuts`

    number: int  # of this attachment
    mine: bool  # whether this thread is inside of the attached model

    def alone(self) -> AbstractContextManager[None]:
        """Nobody else's call runs meanwhile."""

    def going_on(self, call: Call | None) -> AbstractContextManager[Call | None]:
        """A call that was counted before goes on."""

    def aside(self) -> AbstractContextManager[None]:
        """A pass inside a call that has nothing to do with its prompt."""

    def calling(self) -> AbstractContextManager[Call]:
        """One call of the host model."""

    def judging(self, strategy: PruningStrategy, layer: int | None = None) -> AbstractContextManager[Judgement]:
        """Time the signals and the decision of one cut, and report it."""

    def timed(self, part: str) -> AbstractContextManager[list[float]]:
        """Add the wall time of the block to a part of the call."""

    @property
    def device(self) -> torch.device:
        """Where the model computes."""

    @property
    def one_by_one(self) -> bool:
        """Whether images have to pass the tower singly."""


def at(strategies: Sequence[PruningStrategy], *stages: Any) -> list[PruningStrategy]:
    """The strategies of some stages, in the order of the stages."""
    return [s for stage in stages for s in strategies if s.stage is stage]
