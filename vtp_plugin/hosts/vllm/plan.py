"""What a configuration means before any image is seen: who decides where, how many tokens stay, what is impossible.

vLLM reserves one column of the prompt per visual token before the vision tower runs. So the number of tokens must be
known by then: from the budget, or from the raw pixels, which the processor of the request has at hand.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor

from vtp_plugin import config, signals
from vtp_plugin.errors import PruningError
from vtp_plugin.samples import sample
from vtp_plugin.signals import Tap
from vtp_plugin.signals.synthetic import Widths
from vtp_plugin.stages import Stage
from vtp_plugin.strategy import PruningStrategy
from vtp_plugin.tokens import VisualTokens
from vtp_plugin.version import __version__

KEY = "vtp_pruning"  # field of the model's configuration; in the hash of every image, too
NOISE = Widths(tower=8, llm=8, shared=8, head=8, patch=2)  # that counts are taken from
TRIED, SMALL = ((4, 4), (5, 9), (16, 12)), 256  # grids of noise; more tokens than SMALL are not made up


@dataclass
class Plan:
    """The strategies of one server, for images of one patch grid; `at` gives those for another."""

    strategies: Sequence[PruningStrategy]
    grid: tuple[int, int]
    patch: int  # pixels per side of a patch
    blocks: int  # of the whole vision tower
    any_positions: bool = False  # whether kept tokens can have those of the whole prompt
    merger: bool = False  # whether what goes into the merger is kept
    counts: dict[tuple[int, int, tuple[int, int]], int] = field(default_factory=dict)
    plain: dict[int, bool] = field(default_factory=dict)  # whether a strategy keeps what its budget says

    def __post_init__(self) -> None:
        for strategy in self.strategies:
            self._check(strategy)
        if self.decided and any(s.stage is Stage.PIXELS for s in self.late):
            raise PruningError(f"{self.late[0].name}: no strategy may drop patches before it")
        self.count(self.whole)

    def at(self, grid: tuple[int, int]) -> Plan:
        """The same for images of another patch grid."""
        return replace(self, grid=grid)

    @property
    def whole(self) -> int:
        """Tokens of an image without pruning."""
        return self.grid[0] * self.grid[1]

    @property
    def decided(self) -> list[PruningStrategy]:
        """Those that look at raw pixels only: the processor asks them, and every image may keep another number."""
        return [s for s in self.strategies if s.stage is Stage.PIXELS and not s.merges]

    @property
    def late(self) -> list[PruningStrategy]:
        """Those that the workers ask, around the vision tower."""
        return [s for s in self.strategies if s not in self.decided]

    @property
    def reads_question(self) -> bool:
        return signals.reads_question(self.strategies)

    @property
    def whole_tower(self) -> bool:
        """Whether a strategy looks at blocks behind the projected one, which vLLM leaves out."""
        return any(s.tower_layer is not None or Tap.OUTPUT in signals.taps(s) for s in self.late)

    @property
    def fingerprint(self) -> str:
        """For the hash of an image: caches that outlive a server must not mix configurations."""
        return config.fingerprint(self.strategies, __version__)

    def count(self, *tiles: int) -> int:
        """How many of the patches of an image's tiles become columns of the prompt.

        In the tower every tile is judged by itself, behind it all of an image; `grid` is that of the image.
        """
        left, (rows, columns) = list(tiles), self.grid
        for number, strategy in enumerate(self.late):
            behind = strategy.stage is Stage.PROJECTOR
            grid = self.grid if behind else (rows // len(tiles), columns)
            left = [self._kept(number, n, grid) for n in ([sum(left)] if behind else left)]
        return sum(left)

    def _kept(self, number: int, n: int, grid: tuple[int, int]) -> int:
        if (number, n, grid) not in self.counts:
            self.counts[number, n, grid] = self._asked(number, n, grid)
        return self.counts[number, n, grid]

    def _asked(self, number: int, n: int, grid: tuple[int, int]) -> int:
        strategy = self.late[number]
        if n <= SMALL:
            return kept(strategy, n, grid)
        if number not in self.plain:
            sizes = [(rows * columns, (rows, columns)) for rows, columns in TRIED]
            self.plain[number] = all(kept(strategy, m, tried) == strategy.count(m) for m, tried in sizes)
        return strategy.count(n) if self.plain[number] else kept(strategy, n, grid)

    def decide(self, pixels: Tensor) -> Tensor:
        """What the pixel strategies leave of an image's uint8 patches [1, N, 3, p, p]: mask [N]."""
        left = torch.arange(self.whole)
        for strategy in self.decided:
            seen = pixels[:, left]
            selection = strategy.decide(VisualTokens(seen.flatten(2), self.grid, left[None], pixels=seen))
            left = left[selection.sources[0]]
        return torch.zeros(self.whole, dtype=torch.bool).index_fill_(0, left, True)

    def _check(self, strategy: PruningStrategy) -> None:
        if strategy.stage is Stage.LLM:
            raise strategy.error(
                "vLLM fixes its attention metadata and KV cache before the decoder layers run, so nothing can be "
                "dropped between them: use a strategy of the pixels, vit or projector stage"
            )
        if reason := signals.wrong(strategy, inside=bool(strategy.cut_blocks(self.blocks))):
            raise strategy.error(reason)
        if not strategy.pictures:
            raise strategy.error("the frames of a video are not shown inside vLLM, where only pictures are pruned")
        if strategy.stage is not Stage.PIXELS and not strategy.budgeted:
            raise strategy.error(
                "vLLM reserves the prompt's columns before the vision tower runs, so the number must not depend on "
                "its features: give keep_ratio or keep_tokens"
            )
        if strategy.cut_blocks(self.blocks):
            raise strategy.error("merging inside the tower's blocks is not possible inside vLLM")
        if not self.any_positions and (strategy.positions or strategy.default_positions) == "original":
            raise strategy.error("vLLM counts positions by columns of the prompt: say positions=compact")
        if strategy.text_encoder == "llm" and Tap.QUESTION in signals.taps(strategy):
            if "text_encoder" not in strategy.fields():
                raise strategy.error("the language model's embeddings of a question are not possible inside vLLM")
            raise strategy.error("text_encoder=llm is not possible inside vLLM: say text_encoder=clip")
        if "units" in strategy.needs and not self.merger:
            raise strategy.error("what goes into the merger is not kept inside vLLM: say judge=after")
        if strategy.budget != "per_image":
            raise strategy.error(f"budget={strategy.budget} is not possible inside vLLM, which caches single images")
        for name, layer in (("layer", strategy.tower_layer), ("shallow", strategy.shallow_layer)):
            if layer is not None:
                why = f"its vision tower has {self.blocks} blocks"
                strategy.check_layer(name, layer, -self.blocks, self.blocks - 1, why)


def plan_of(settings: Any, vision: Any) -> Plan:
    """The plan for a configuration and a vision tower of square images; made once."""
    side = vision.image_size // vision.patch_size
    return planned(settings, (side, side), vision.patch_size, vision.num_hidden_layers)


def planned(settings: Any, *facts: Any) -> Plan:
    """The plan for a configuration and facts about a model, the further fields of Plan; made once."""
    return _plan(json.dumps(settings, sort_keys=True, default=str), *facts)


@cache
def _plan(settings: str, *facts: Any) -> Plan:
    return Plan(strategies_of(json.loads(settings)), *facts)


def strategies_of(settings: Any) -> list[PruningStrategy]:
    """The strategies of `{"strategy": NAMES, FIELD: VALUE, ...}`, as after --pruning and in --pruning_args."""
    if not isinstance(settings, Mapping) or not isinstance(settings.get("strategy"), str):
        raise PruningError(f"expected {{'strategy': NAME, ...}} with its fields beside it, got {settings!r}")
    return config.resolve(settings["strategy"], {k: v for k, v in settings.items() if k != "strategy"})


def kept(strategy: PruningStrategy, n: int, grid: tuple[int, int]) -> int:
    """How many of n tokens a strategy leaves, learnt by asking it about noise."""
    numbers = {_asked(strategy, n, grid, seed) for seed in range(2)}
    if len(numbers) > 1:
        raise strategy.error("how many tokens it keeps depends on the image, but vLLM needs the number before")
    return numbers.pop()


def _asked(strategy: PruningStrategy, n: int, grid: tuple[int, int], seed: int) -> int:
    seen = sample(strategy, n, b=1, widths=NOISE, seed=seed)
    return strategy.decide(replace(seen, grid=grid)).counts[0]
