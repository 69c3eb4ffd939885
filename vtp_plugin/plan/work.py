"""What one request costs, part by part, from the same formulas as the record: MACs, bytes of weights and of the cache.

Nothing is run: the model exists on the meta device, a strategy is asked how many tokens it keeps.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch

from vtp_plugin import plugins
from vtp_plugin.adapter import Adapter, find_adapter
from vtp_plugin.errors import PruningError
from vtp_plugin.facts.costs import Costs
from vtp_plugin.facts.image import Image
from vtp_plugin.hosts.transformers.architectures import Shape
from vtp_plugin.signals import Tap, taps
from vtp_plugin.stages import Stage
from vtp_plugin.strategy import PruningStrategy
from vtp_plugin.surgery.vision import blocks_read
from vtp_plugin.tokens import VisualTokens

PARTS = ("tower", "projector", "selector", "prefill")


@dataclass(frozen=True)
class Model:
    """A model that was built without weights, and one of its pictures."""

    name: str
    adapter: Adapter
    image: Image
    parameters: int
    widths: tuple[int, int]  # of the tower and of the language model
    share: float = 1.0  # of a picture; see `scaled`

    @classmethod
    def of(cls, name: str, shape: Shape, layers: int = 0) -> Model:
        """From a shape; `layers` cuts the language model short. PruningError for an encoder."""
        if not shape.decodes:
            raise PruningError(f"{name} is an encoder: vtp plan plans models that answer; vtp bench measures encoders")
        model = shape.build(layers or None, torch.device("meta"), torch.bfloat16, "sdpa")
        adapter = find_adapter(model, None, plugins.adapters())
        draw = torch.Generator().manual_seed(0)
        (image,) = adapter.images(shape.prompt(1, draw) | shape.pixels(1, draw))
        widths = (_width(adapter.tower.blocks[0]), _width(adapter.decoder_layers[0]))
        return cls(name, adapter, image, sum(p.numel() for p in model.parameters()), widths)

    @property
    def costs(self) -> Costs:
        return self.adapter.costs

    @property
    def tokens(self) -> int:
        """Visual tokens of one picture."""
        return self._part(self.image.total)

    @property
    def patches(self) -> int:
        """Tokens of a picture in the tower."""
        return self._part(self.image.patches or self.image.total)

    @property
    def projectable(self) -> int:
        """Rows of a picture that the projector sees whatever is cut behind the tower; 0: those that are left."""
        return self._part(self.image.projectable) if self.image.projectable else 0

    @property
    def judged(self) -> int:
        """Visual tokens that a strategy may drop; newline rows stay."""
        return min(self.tokens, self.projectable or self.tokens)

    @cached_property
    def sequences(self) -> list[list[int]]:
        """Per block of the tower, the lengths of what attends to each other."""
        return [list(map(self._part, lengths)) for lengths in self.adapter.sequences(self.image)]

    def _part(self, tokens: int) -> int:
        return tokens if self.share == 1 else max(1, round(self.share * tokens))

    def cache_bytes(self, lengths: Sequence[int], itemsize: int) -> int:
        """Of one prompt."""
        return itemsize * sum(layer.cache(n) for layer, n in zip(self.costs.layers, lengths, strict=True))


def _width(block: torch.nn.Module) -> int:
    """Of the hidden states that a block works on: what its first norm is as wide as."""
    return next(part.numel() for part in block.parameters() if part.ndim == 1)


@dataclass(frozen=True)
class Work:
    """One request with one strategy, or unpruned. MACs by part; tokens of the prompt in every decoder layer."""

    macs: dict[str, float]
    lengths: list[int]
    kept: float  # visual tokens of one picture behind the last cut
    pictures: int


def unpruned(model: Model, pictures: int, text: int) -> Work:
    tower = _blocks_macs(model, [(1.0, 1.0)] * len(model.costs.blocks))
    rows = model.projectable or model.tokens
    return _work(model, pictures, text, [tower, rows, 0], [model.tokens] * len(model.costs.layers))


def pruned(model: Model, strategies: Sequence[PruningStrategy], pictures: int, text: int, kept: float = 0.0) -> Work:
    """With these strategies, each seeing what the ones before left; `kept` stands in for a share that data decides."""
    share, judged, selector, projected = 1.0, 0.0, 0.0, model.projectable or model.tokens
    tower = [(1.0, 1.0)] * len(model.costs.blocks)  # share of the tokens that enters every block, and that leaves it
    for strategy in _at(strategies, Stage.PIXELS, Stage.VIT):
        tower = _tower_cuts(model, strategy, kept, tower)
        share = tower[-1][1]
        if _rearranges(model):  # patches are embedded to be judged, and those that run (all of a tile) once more
            judged += model.patches * model.costs.patch * (1.0 if _tiled(model) else share)
        projected = projected if _tiled(model) else _left(model, share)  # tiles keep their shape, with zeros in it
    for strategy in _at(strategies, Stage.PROJECTOR):
        selector += _selector(model, strategy, _left(model, share))
        share *= _share(strategy, round(model.judged * share), kept)
        projected = _projected(model, strategy, _left(model, share), projected)
    layers = [_left(model, share)] * len(model.costs.layers)
    for strategy in _at(strategies, Stage.LLM):
        selector += _next_keys(model, strategy, [text / pictures + n for n in layers])
        layers = _layer_cuts(model, strategy, layers)
    return _work(model, pictures, text, [_blocks_macs(model, tower) + judged, projected, selector], layers)


def _at(strategies: Sequence[PruningStrategy], *stages: Stage) -> list[PruningStrategy]:
    return sorted((s for s in strategies if s.stage in stages), key=lambda s: s.stage.order)


def _work(model: Model, pictures: int, text: int, early: Sequence[float], visual: list[int]) -> Work:
    """`early`: MACs of the tower's blocks, rows that are projected, MACs of the selectors, of one picture."""
    (tower, projected, selector), costs = early, model.costs
    lengths = [text + pictures * n for n in visual]
    answered = lengths[-1] if model.adapter.every_logit else 1
    prefill = sum(layer.macs(n) for layer, n in zip(costs.layers, lengths, strict=True)) + answered * costs.head
    macs = {
        "tower": pictures * (model.patches * costs.patch + tower),
        "projector": pictures * projected * sum(costs.projectors),
        "selector": pictures * selector,
        "prefill": prefill,
    }
    return Work(macs, lengths, visual[-1], pictures)


def _blocks_macs(model: Model, shares: Sequence[tuple[float, float]]) -> float:
    """Of the tower's blocks on these shares of their sequences; class tokens stay."""
    prefix, found = model.adapter.tower.prefix, 0
    for block, lengths, (entering, leaving) in zip(model.costs.blocks, model.sequences, shares, strict=True):
        for length in lengths:
            before, after = (prefix + round((length - prefix) * share) for share in (entering, leaving))
            found += block.macs(before, leaving=after)
    return found


def _left(model: Model, share: float) -> int:
    """Tokens of a picture in the prompt."""
    return model.tokens - model.judged + max(1, int(model.judged * share + 1e-9))


# -- how many a strategy keeps ----------------------------------------------------------------------------------------


def _share(strategy: PruningStrategy, n: int, kept: float) -> float:
    if not strategy.pictures:
        raise strategy.error("it compares the frames of a video, a plan is made of pictures")
    if strategy.budgeted:
        return strategy.count(n) / n
    if not 0 < kept <= 1:
        raise strategy.error("how much it keeps depends on the pictures: say the share with --kept, e.g. --kept 0.8")
    return kept


def _asked(n: int, cut: tuple[int, int], entered: int | None) -> VisualTokens:
    """Tokens without values: enough to be asked how many are wanted."""
    index = torch.zeros(1, n, dtype=torch.long)
    return VisualTokens(tokens=torch.empty(1, n, 0), grid=(n, 1), index=index, cut=cut, entered=entered)


def _tower_cuts(
    model: Model, strategy: PruningStrategy, kept: float, shares: list[tuple[float, float]]
) -> list[tuple[float, float]]:
    """The shares that enter and leave every block. Cuts before the first block are of whole tokens of a tile."""
    depth = model.adapter.tower.projected % len(shares) + 1
    places, tile = strategy.cut_blocks(depth), model.judged // model.image.tiles
    if not places:
        share = _share(strategy, tile, kept)
        return [(share * entering, share * leaving) for entering, leaving in shares]
    entered = n = round(tile * shares[0][0])
    found = []
    for number in range(len(shares)):
        before = n
        if number in places:
            cut = places.index(number)
            n = strategy.wanted(_asked(n, (cut, len(places)), entered if cut else None))
        found.append((before / tile, n / tile))
    return found


def _layer_cuts(model: Model, strategy: PruningStrategy, layers: list[int]) -> list[int]:
    """Visual tokens of a picture in every decoder layer."""
    fixed, found = model.tokens - model.judged, list(layers)
    cuts = strategy.cut_layers(len(layers))
    if bad := [cut for cut in cuts if not model.adapter.first_cut <= cut < len(layers)]:
        raise strategy.error(f"layer {bad[0]} is not in {model.adapter.first_cut} ... {len(layers) - 1} of this model")
    entered = layers[cuts[0]] - fixed if cuts else 0
    left = entered
    for number, cut in enumerate(cuts):
        left = strategy.wanted(_asked(left, (number, len(cuts)), entered if number else None))
        found[cut:] = [min(n, left + fixed) for n in found[cut:]]
    return found


# -- what a strategy makes the model compute --------------------------------------------------------------------------


def _tiled(model: Model) -> bool:
    """Whether the host arranges rows that left the projector token by token."""
    return bool(model.projectable) and model.adapter.tower.block == 1


def _rearranges(model: Model) -> bool:
    """Whether the host arranges what leaves the tower: tiles, or squares that become one token."""
    return _tiled(model) or model.adapter.tower.block > 1


def _projected(model: Model, strategy: PruningStrategy, left: int, before: int) -> int:
    """Rows of a picture that pass the projector: those that are left, or all where the host arranges them."""
    if not _rearranges(model):
        return left
    return before + (left - model.tokens + model.judged) * (strategy.merges and _tiled(model))  # merged ones once more


def _selector(model: Model, strategy: PruningStrategy, rows: int) -> float:
    """Reading attention rows of the tower once more, and projecting the candidates."""
    found = rows * sum(model.costs.projectors[:1]) if Tap.PROJECTED in taps(strategy) else 0
    for number in blocks_read(model.adapter, [strategy]):
        block, lengths = model.costs.blocks[number], model.sequences[number]
        found += sum(block.reading(length, model.adapter.tower.prefix) for length in lengths)
    return found


def _next_keys(model: Model, strategy: PruningStrategy, lengths: Sequence[float]) -> float:
    """Keys that are projected before a cut for a strategy that asks the layer behind it, per picture."""
    if Tap.BEHIND not in taps(strategy):
        return 0.0
    return sum(model.costs.layers[cut].keys * lengths[cut - 1] for cut in strategy.cut_layers(len(lengths)))


def scaled(model: Model, tokens: int) -> Model:
    """The same model with a picture of that many visual tokens, as if it were that share of a picture."""
    return replace(model, share=tokens / model.image.total)
