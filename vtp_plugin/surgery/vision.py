"""The cuts around one vision tower: what strategies need of it, and the parts that a layout puts together."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from vtp_plugin import signals
from vtp_plugin.facts.family import Family
from vtp_plugin.facts.tower import SharedSpace
from vtp_plugin.signals import BlockView, RowsView, Signal, Tap
from vtp_plugin.signals.views import tapped
from vtp_plugin.stages import Stage
from vtp_plugin.strategy import PruningStrategy
from vtp_plugin.surgery.call import Call
from vtp_plugin.surgery.layout import Block, Layout
from vtp_plugin.surgery.merging import MergingBlocks, unmergeable
from vtp_plugin.surgery.passes import TowerPass
from vtp_plugin.surgery.pixels import Pixels
from vtp_plugin.surgery.question import CallQuestions, EmbeddedQuestions
from vtp_plugin.surgery.session import Session, at
from vtp_plugin.surgery.undo import Undo

Space = tuple[str, str | None, bool]


class VisionCuts:
    """The hooks on one vision tower and its projector."""

    def __init__(self, session: Session, layout: Layout) -> None:
        self.session, self.family, self.layout = session, session.adapter, layout
        self.tower = session.adapter.tower
        self.pixels: Pixels | None = None
        self.spaces: dict[Space, SharedSpace] = {}
        self.merging = [s for s in self.at(Stage.VIT) if self.inside(s)]
        self.early, self.late = layout.early(self), layout.late(self)

    def prepare(self) -> None:
        """Load what the strategies need; raises before anything is attached."""
        shared = {*self.early.shared_budgets, *self.late.shared_budgets}
        for strategy in self.session.strategies:
            if strategy.budget == "total" and strategy.stage not in shared:
                raise strategy.error(f"budget=total is not possible at the {strategy.stage.value} stage of this model")
            if {Tap.PIXELS, Tap.CONTENT} & self.taps(strategy):
                self.pixels = self.pixels or Pixels.of(self.family.image_processor)
        for strategy in self.at(Stage.PROJECTOR):
            blocks = len(self.tower.blocks)
            for name, layer in (("layer", strategy.tower_layer), ("shallow", strategy.shallow_layer)):
                if layer is not None:
                    strategy.check_layer(name, layer, -blocks, blocks - 1, f"its vision tower has {blocks} blocks")
        for strategy in self.tapping(Tap.SPACE):
            self.spaces[space_of(strategy)] = self._space(strategy)
        for strategy in self.at(Stage.PIXELS, Stage.VIT):
            self.early.check(strategy)

    def install(self, undo: Undo) -> None:
        self.early.install(undo)
        for number, read in blocks_read(self.family, self.session.strategies).items():
            undo.before(self.tower.attention_of(number), self._reader(number, read))
        for number in self._kept_outputs():
            undo.after(self.tower.blocks[number], self._keeper(number))
        for strategy in self.merging:
            MergingBlocks(self.session, strategy, self.depth).install(undo)
        self.late.install(undo)

    def lacking(self, strategy: PruningStrategy) -> str:
        """Why this model cannot give the strategy what it needs; "" if it can."""
        inside = self.inside(strategy)
        for signal in signals.needed(strategy, inside=inside):
            if reason := signal.refuse(self.family, strategy):
                return reason
        return unmergeable(self.family, strategy, arranged=self.late.arranged) if inside else ""

    # -- what strategies need -------------------------------------------------------------------------------------

    def at(self, *stages: Stage) -> list[PruningStrategy]:
        """The strategies of some stages."""
        return at(self.session.strategies, *stages)

    @property
    def depth(self) -> int:
        """Blocks that count: up to the one whose output is projected."""
        return self.tower.number(None) + 1

    def inside(self, strategy: PruningStrategy) -> bool:
        """Whether it cuts inside the blocks."""
        return strategy.stage is Stage.VIT and bool(strategy.cut_blocks(self.depth))

    def taps(self, strategy: PruningStrategy) -> set[Tap]:
        """What has to be kept for it."""
        return signals.taps(strategy, inside=self.inside(strategy))

    def tapping(self, tap: Tap) -> list[PruningStrategy]:
        """The strategies for which something has to be kept."""
        return [s for s in self.session.strategies if tap in self.taps(s)]

    def found_in(self, strategy: PruningStrategy, view: signals.View) -> dict[str, Any]:
        """The signals that a strategy needs and that are read from this view."""
        return signals.found_in(strategy, view, inside=self.inside(strategy))

    def signals_of(self, strategy: PruningStrategy, rows: RowsView, carried: Callable[[Signal, int], Any]) -> dict:
        """Everything that a strategy of the projector stage needs; `carried` fetches what was read in a block."""
        found = self.found_in(strategy, rows)
        for signal in signals.needed(strategy):
            if signal.view is BlockView:
                found[signal.name] = carried(signal, block_of(self.family, signal, strategy))
        return found

    def questions_in(self, strategy: PruningStrategy) -> CallQuestions:
        """The space where the questions of this call are compared with patches."""
        key, call = space_of(strategy), self.session.call
        if key not in call.embedded:
            questions = [image.question for image in call.images]
            call.embedded[key] = CallQuestions(tapped(self.spaces.get(key), "SPACE"), list(dict.fromkeys(questions)))
        return call.embedded[key]

    def _space(self, strategy: PruningStrategy) -> SharedSpace:
        llm = strategy.text_encoder == "llm"
        space = EmbeddedQuestions(self.family) if llm else self.family.shared_space(strategy.clip_checkpoint)
        space.segments = strategy.segments
        return space

    # -- hooks on the blocks --------------------------------------------------------------------------------------

    def _kept_outputs(self) -> set[int]:
        late = self.at(Stage.PROJECTOR)
        outputs = {self.tower.number(s.tower_layer) for s in late if Tap.OUTPUT in self.taps(s)}
        return outputs | {self.tower.number(None) for s in late if Tap.CLASS in self.taps(s)}

    def _reader(self, number: int, read: Sequence[Signal]) -> Callable[..., None]:
        """Reads signals where a block begins."""

        def begin(module: nn.Module, args: Any, kwargs: Any) -> None:
            passing = self.passing
            if passing is None:
                return
            with torch.no_grad(), self.session.timed("selector"):
                view = self.layout.read(Block(number, module, self.tower.prefix, passing), args, kwargs)
                for signal in read:
                    kept = passing.maps if signal.per_token else passing.whole
                    kept[signal.name, number] = signal.read(view)

        return begin

    def _keeper(self, number: int) -> Callable[..., None]:
        """Keeps the output of a block."""

        def keep(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            if self.passing is not None:
                self.passing.outputs[number] = output[0] if isinstance(output, tuple) else output

        return keep

    # -- the call that is running ---------------------------------------------------------------------------------

    @property
    def call(self) -> Call | None:
        return self.session.call

    @property
    def passing(self) -> TowerPass | None:
        """The pass that is running; None outside of pruned calls and of the tower."""
        return None if self.session.call is None else self.session.call.tower

    def marks(self) -> tuple[int, ...]:
        """The fingerprints of the images in the tower."""
        return tuple(self.call.images[number].fingerprint for number in self.passing.batch)

    def rows(self, features: Sequence[Tensor]) -> Any:
        """What is left of the rows that the host made of the images in the tower."""
        return self.late.rows(features)


def space_of(strategy: PruningStrategy) -> Space:
    """Which space a strategy compares patches and questions in, and what it does with long questions."""
    return strategy.text_encoder, strategy.clip_checkpoint, strategy.segments


def block_of(family: Family, signal: Signal, strategy: PruningStrategy) -> int:
    """The block of the tower where a signal is read."""
    block = "tower_layer" if signal.block is None else signal.block
    return family.tower.number(getattr(strategy, block) if isinstance(block, str) else block)


def blocks_read(family: Family, strategies: Sequence[PruningStrategy]) -> dict[int, list[Signal]]:
    """The signals that are read where each block of the tower begins."""
    found: dict[int, list[Signal]] = {}
    for number, signal in _read_in_blocks(family, strategies):
        if signal not in found.setdefault(number, []):
            found[number].append(signal)
    return found


def _read_in_blocks(family: Family, strategies: Sequence[PruningStrategy]) -> Iterator[tuple[int, Signal]]:
    for strategy in at(strategies, Stage.PROJECTOR):
        for signal in signals.needed(strategy):
            if signal.view is BlockView and (family.several_views or not signal.several_views):
                yield block_of(family, signal, strategy), signal


class Cutting:
    """What the parts of a layout have in common."""

    shared_budgets: Sequence[Stage] = ()
    arranged = False

    def __init__(self, vision: VisionCuts) -> None:
        self.vision, self.session, self.family, self.tower = vision, vision.session, vision.family, vision.tower

    def check(self, strategy: PruningStrategy) -> None:
        """Nothing is impossible."""

    @property
    def call(self) -> Call | None:
        return self.session.call

    @property
    def passing(self) -> TowerPass | None:
        return self.vision.passing
