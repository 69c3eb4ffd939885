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
from vtp_plugin.hosts.transformers.shapes import Shape
from vtp_plugin.metrics.flops import Costs, Layer
from vtp_plugin.stages import Stage
from vtp_plugin.strategy import PruningStrategy
from vtp_plugin.surgery.call import ROW_SIGNALS, Image
from vtp_plugin.surgery.vision import behind_projector
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
        families = plugins.adapters()
        adapter = find_adapter(model, None, families, lambda: ", ".join(cls.models for cls in families))
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
    tower = [sum(map(block.macs, lengths)) for block, lengths in _blocks(model)]
    return _work(model, pictures, text, tower, model.tokens, [model.tokens] * len(model.costs.layers), 0)


def pruned(model: Model, strategies: Sequence[PruningStrategy], pictures: int, text: int, kept: float = 0.0) -> Work:
    """With these strategies, each seeing what the ones before left; `kept` stands in for a share that data decides."""
    share, selector, rows = 1.0, 0.0, model.tokens
    blocks = [1.0] * len(model.costs.blocks)  # share of the tokens that enter each block
    for strategy in strategies:
        if strategy.stage in (Stage.PIXELS, Stage.VIT):
            blocks = _tower_cuts(model, strategy, kept, blocks)
            share = blocks[-1] if not strategy.cut_blocks(len(blocks)) else _share(strategy, model.judged, kept)
            rows = _left(model, share)
    for strategy in strategies:
        if strategy.stage is Stage.PROJECTOR:
            before = _left(model, share)
            selector += _selector(model, strategy, before, blocks)
            share *= _share(strategy, round(model.judged * share), kept)
            rows = _left(model, share) if _projects_last(model) else rows
    entered = _left(model, share)
    layers = [entered] * len(model.costs.layers)
    for strategy in strategies:
        if strategy.stage is Stage.LLM:
            layers = _layer_cuts(model, strategy, layers)
    tower = [
        sum(_macs(block, length, share, model.adapter.tower.prefix) for length in lengths)
        for (block, lengths), share in zip(_blocks(model), blocks, strict=True)
    ]
    return _work(model, pictures, text, tower, rows, layers, selector)


def _work(
    model: Model, pictures: int, text: int, tower: list[float], rows: float, visual: list[int], selector: float
) -> Work:
    costs, lengths = model.costs, [text + pictures * n for n in visual]
    answered = lengths[-1] if model.adapter.every_logit else 1
    prefill = sum(layer.macs(n) for layer, n in zip(costs.layers, lengths, strict=True)) + answered * costs.head
    macs = {
        "tower": pictures * (model.patches * costs.patch + sum(tower)),
        "projector": pictures * (model.projectable or rows) * sum(costs.projectors),
        "selector": pictures * selector,
        "prefill": prefill,
    }
    return Work(macs, lengths, visual[-1], pictures)


def _blocks(model: Model) -> list[tuple[Layer, list[int]]]:
    return list(zip(model.costs.blocks, model.sequences, strict=True))


def _macs(block: Layer, length: int, share: float, prefix: int) -> float:
    """Of a block on that share of a sequence; class tokens stay."""
    return block.macs(prefix + round((length - prefix) * share)) if share < 1 else block.macs(length)


def _left(model: Model, share: float) -> int:
    """Tokens of a picture in the prompt."""
    return model.tokens - model.judged + max(1, int(model.judged * share + 1e-9))


# -- how many a strategy keeps ----------------------------------------------------------------------------------------


def _share(strategy: PruningStrategy, n: int, kept: float) -> float:
    if strategy.budgeted:
        return strategy.count(n) / n
    if not 0 < kept <= 1:
        raise strategy.error("how much it keeps depends on the pictures: say the share with --kept, e.g. --kept 0.8")
    return kept


def _asked(n: int, cut: tuple[int, int], entered: int | None) -> VisualTokens:
    """Tokens without values: enough to be asked how many are wanted."""
    index = torch.zeros(1, n, dtype=torch.long)
    return VisualTokens(tokens=torch.empty(1, n, 0), grid=(n, 1), index=index, cut=cut, entered=entered)


def _tower_cuts(model: Model, strategy: PruningStrategy, kept: float, blocks: list[float]) -> list[float]:
    """The share that enters every block. Cuts before the first block are of whole tokens of a tile."""
    places = strategy.cut_blocks(len(blocks))
    tile = model.judged // model.image.tiles
    if not places:
        return [share * _share(strategy, tile, kept) for share in blocks]
    n, left = tile, []
    for number, share in enumerate(blocks):
        left.append(share * n / tile)
        if number in places:
            n = strategy.wanted(_asked(n, (places.index(number), len(places)), tile if number > places[0] else None))
    return left


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


def _projects_last(model: Model) -> bool:
    """Whether a cut behind the tower comes before the projector: where it works row by row on one tile."""
    return not model.projectable and model.adapter.tower.block == 1


def _selector(model: Model, strategy: PruningStrategy, rows: int, blocks: list[float]) -> float:
    """Reading attention rows of the tower once more, and projecting the candidates."""
    found = rows * sum(model.costs.projectors[:1]) if behind_projector(strategy) else 0
    if set(strategy.needs) & set(ROW_SIGNALS):
        block, lengths = _blocks(model)[model.adapter.tower.projected]
        found += sum(block.reading(length, model.adapter.tower.prefix) for length in lengths)
    return found


def scaled(model: Model, tokens: int) -> Model:
    """The same model with a picture of that many visual tokens, as if it were that share of a picture."""
    return replace(model, share=tokens / model.image.total)
