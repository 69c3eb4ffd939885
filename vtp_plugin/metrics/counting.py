"""The MACs and bytes of a call, which follow from the tokens that every part of the model saw in it.

What the tower and the projectors saw was watched; the decoder's lengths are known from the cuts.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from vtp_plugin.facts.costs import Costs
from vtp_plugin.facts.family import Family
from vtp_plugin.metrics.watching import BLOCK, PATCH
from vtp_plugin.signals import Tap, taps
from vtp_plugin.stages import Stage
from vtp_plugin.surgery.call import Call, Image
from vtp_plugin.surgery.session import Session
from vtp_plugin.surgery.vision import blocks_read

Share = tuple[str, int, int, int]
PARTS = ("tower", "selector", "projector", "prefill", "decode")


# -- MACs -------------------------------------------------------------------------------------------------------------


@dataclass
class Account:
    """What one sample cost: MACs by part, tokens that entered every decoder layer, bytes of the KV cache."""

    macs: dict[str, int]
    lengths: list[int] = field(default_factory=list)
    cache_bytes: int = 0

    @property
    def first_token(self) -> int:
        """MACs until the first token."""
        return sum(macs for part, macs in self.macs.items() if part != "decode")


def accounts(pruned: Session, call: Call, row: int) -> tuple[Account, Account]:
    """One sample of a finished call: without pruning, and as it ran. Samples that are alike share theirs."""
    if ("account", row) not in call.counted:
        lengths = decoder_lengths(pruned.adapter, call, row)
        facts = (tuple(lengths), *(_facts(call, n) for n in images_of(call, row)))
        if facts not in call.counted:
            images = {n: call.images[n] for n in images_of(call, row) if call.images[n].counted}
            call.counted[facts] = _accounts(pruned, call, row, images, lengths)
        call.counted["account", row] = call.counted[facts]
    return call.counted["account", row]


def images_of(call: Call, row: int) -> Sequence[int]:
    """The numbers of the images of one sample of a finished call."""
    if "samples" not in call.counted:
        found: dict[int, list[int]] = {}
        for number, image in enumerate(call.images):
            found.setdefault(image.sample, []).append(number)
        call.counted["samples"] = found
    return call.counted["samples"].get(row, ())


def _facts(call: Call, number: int) -> tuple[Any, ...]:
    """All that one image's part of an account depends on."""
    image = call.images[number]
    told = image.total, image.patches, image.tiles, image.grid, image.film, image.kind, image.projectable
    before = [event.before[event.images.index(number)] for event in call.events if number in event.images]
    left = image.counted, entered(call, number), len(image.index)
    return *told, *left, image.question, tuple(before), _shares(call)[number]


def _accounts(
    pruned: Session, call: Call, row: int, images: dict[int, Image], lengths: list[int]
) -> tuple[Account, Account]:
    whole = whole_length(call, images, lengths)
    before = _unpruned(pruned.adapter, images.values())
    after = _as_it_ran(pruned.adapter, call, images) + Counter(selector=selector_macs(pruned, call, row))
    return (
        _account(pruned, call, before, [whole] * len(lengths)),
        _account(pruned, call, after, lengths),
    )


def _account(pruned: Session, call: Call, macs: Counter, lengths: list[int]) -> Account:
    """The language model's part added to that of the tower; nothing of it where there is no prompt."""
    if not lengths:
        return Account({part: macs[part] for part in PARTS})
    costs = pruned.adapter.costs
    answered = lengths[-1] if pruned.adapter.every_logit else 1
    prefill = sum(layer.macs(length) for layer, length in zip(costs.layers, lengths, strict=True))
    decode = sum(_step(costs, lengths, *step) for step in call.steps)
    cached = sum(layer.cache(length) for layer, length in zip(costs.layers, lengths, strict=True))
    macs["prefill"] = call.copies * (prefill + answered * costs.head)
    macs["decode"] = call.copies * decode
    return Account({part: macs[part] for part in PARTS}, lengths, call.copies * cached * pruned.model.dtype.itemsize)


def _step(costs: Costs, lengths: Sequence[int], tokens: int, done: int, cached: bool) -> int:
    """One pass behind the prefill: `tokens` new ones behind `done` earlier ones; without a cache all are run again."""
    ends = [length + done + tokens for length in lengths]
    macs = sum(layer.macs(tokens if cached else end, end) for layer, end in zip(costs.layers, ends, strict=True))
    return macs + tokens * costs.head


def _unpruned(adapter: Family, images: Iterator[Image]) -> Counter:
    costs, macs = adapter.costs, Counter()
    for image in images:
        macs["tower"] += (image.patches or image.total) * costs.patch
        for block, lengths in zip(costs.blocks, adapter.sequences(image), strict=True):
            macs["tower"] += sum(map(block.macs, lengths))
            last = lengths
        macs["tower"] += adapter.pooling_macs(sum(last))
        macs["projector"] += adapter.reading_macs(image.total)
        macs["projector"] += (image.projectable or image.total) * sum(costs.projectors)
    return macs


def _as_it_ran(adapter: Family, call: Call, images: dict[int, Image]) -> Counter:
    costs, macs = adapter.costs, Counter()
    for number, image in images.items():
        for part, place, entering, leaving in _shares(call)[number]:
            if part == PATCH:  # without the padding of a canvas that images of several sizes share
                macs["tower"] += min(entering, image.patches or image.total) * costs.patch
            elif part == BLOCK:
                macs["tower"] += costs.blocks[place].macs(entering, leaving=leaving)
                if place == len(costs.blocks) - 1:
                    macs["tower"] += adapter.pooling_macs(leaving)
            else:
                macs["projector"] += leaving * costs.projectors[place]
    for image in images.values():
        macs["projector"] += adapter.reading_macs(len(image.index))
    return macs


def _shares(call: Call) -> dict[int, tuple[Share, ...]]:
    """By image, of all that passed the tower: part, its number, tokens that entered and left."""
    if "shares" not in call.counted:
        numbers = range(len(call.images))
        if all(seen.uniform and seen.owners == tuple(numbers) for seen in call.seen):  # one tile each, all of a length
            own = tuple((seen.part, seen.number, seen.entering[1], seen.leaving[1]) for seen in call.seen)
            call.counted["shares"] = dict.fromkeys(numbers, own)
        else:
            found: dict[int, list[Share]] = {number: [] for number in numbers}
            for seen in call.seen:
                for image, entering, leaving in seen.shares():
                    found[image].append((seen.part, seen.number, entering, leaving))
            call.counted["shares"] = {image: tuple(own) for image, own in found.items()}
    return call.counted["shares"]


def selector_macs(pruned: Session, call: Call, row: int) -> int:
    """What strategies spend on text towers, on projecting candidates and on attention rows of the tower, per sample.

    The comparison of scores and single rows between decoder layers are not counted.
    """
    questions = {image.question for image in call.images if image.sample == row}
    text = sum(space.text_macs([question]) for space in pruned.spaces.values() for question in sorted(questions))
    candidates = 0
    projecting = {strategy.name for strategy in pruned.strategies if Tap.PROJECTED in taps(strategy)}
    for event in call.events:
        mine = [n for image, n in zip(event.images, event.before, strict=True) if call.images[image].sample == row]
        if event.strategy in projecting:
            candidates += sum(mine)
    projecting = candidates * sum(pruned.adapter.costs.projectors[:1])
    return text + projecting + _rows_macs(pruned, call, row) + _next_keys_macs(pruned, call, row)


def _next_keys_macs(pruned: Session, call: Call, row: int) -> int:
    """Keys that are projected before the cut for a strategy that asks the layer behind it."""
    layers, lengths = pruned.adapter.costs.layers, decoder_lengths(pruned.adapter, call, row)
    asking = [s for s in pruned.strategies if Tap.BEHIND in taps(s)]
    cuts = {cut for strategy in asking for cut in strategy.cut_layers(len(layers)) if cut in call.cuts}
    return sum(layers[cut].keys * lengths[cut - 1] for cut in cuts)


def _rows_macs(pruned: Session, call: Call, row: int) -> int:
    """Queries and keys that are projected once more to read attention in blocks of the tower."""
    adapter, wanted = pruned.adapter, blocks_read(pruned.adapter, pruned.strategies)
    return sum(
        adapter.costs.blocks[place].reading(tokens, adapter.tower.prefix)
        for number, image in enumerate(call.images)
        if image.sample == row
        for part, place, tokens, _ in _shares(call)[number]
        if part == BLOCK and place in wanted
    )


# -- lengths ----------------------------------------------------------------------------------------------------------


def decoder_lengths(adapter: Family, call: Call, row: int) -> list[int]:
    """The prompt's length in every decoder layer; empty where there is no prompt."""
    if call.valid is None:
        return []
    length, lengths = call.lengths[row], []
    for layer in range(len(adapter.decoder_layers)):
        if layer in call.cuts:
            counts = call.cuts[layer].counts
            length = counts[row * (len(counts) // len(call.valid))]
        lengths.append(length)
    return lengths


def whole_length(call: Call, images: dict[int, Image], lengths: Sequence[int]) -> int:
    """The prompt's length without pruning."""
    return lengths[0] + sum(image.total - entered(call, n) for n, image in images.items()) if lengths else 0


def entered(call: Call, number: int) -> int:
    """Tokens of an image that entered the prompt."""
    image = call.images[number]
    if image.entered is not None or image.columns is None:
        return image.total if image.entered is None else image.entered
    early = [e for e in call.events if number in e.images and e.stage.order <= Stage.PROJECTOR.order]
    return early[-1].after[early[-1].images.index(number)] if early else image.total


def kept(call: Call, number: int) -> int:
    """Tokens of an image that the last decoder layer sees."""
    image = call.images[number]
    if image.entered is not None:
        return len(image.index) + image.fixed
    cuts = [event for event in call.events if number in event.images]
    return cuts[-1].after[cuts[-1].images.index(number)] if cuts else image.total
