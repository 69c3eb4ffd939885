"""Center: patches near the middle of the picture stay. Quiet: those whose keys are short, by a signal of its own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from vtp_plugin import PruningStrategy, Stage, VisualTokens, hookimpl, signal
from vtp_plugin.signals import BlockView


@dataclass(kw_only=True)
class Center(PruningStrategy):
    """Keep the patches nearest to the centre of the grid."""

    name = "center"
    stage = Stage.PROJECTOR
    paper = "an example"
    default_keep_ratio = 0.25

    height: float = 0.5  # where the centre is, as a share of the rows from the top

    def validate(self) -> None:
        self.check_number("height", 0, 1)

    def score(self, visual: VisualTokens) -> Tensor:
        rows, columns = visual.grid
        down = visual.index // columns - self.height * (rows - 1)  # [B, N]
        across = visual.index % columns - (columns - 1) / 2
        return -(down**2 + across**2)


@signal("key_lengths", Stage.PROJECTOR, "[B, N] fp32: L2 norms of the keys of block `tower_layer`, mean over heads")
def key_lengths(at: BlockView) -> Tensor:
    return at.keys.float().norm(dim=-1).mean(-2)


@dataclass(kw_only=True)
class Quiet(PruningStrategy):
    """Keep the patches with the shortest keys."""

    name = "quiet"
    stage = Stage.PROJECTOR
    paper = "an example"
    needs = ("key_lengths",)
    default_keep_ratio = 0.25

    def score(self, visual: VisualTokens) -> Tensor:
        return -visual.key_lengths


@hookimpl
def vtp_register_strategies(register: Callable[[type], None]) -> None:
    register(Center)
    register(Quiet)


@hookimpl
def vtp_register_adapters(register: Callable[[type], None]) -> None:
    from vtp_example.deepseek_vl import DeepseekVL

    register(DeepseekVL)
