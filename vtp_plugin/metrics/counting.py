"""Who went where: the tokens that every part of a model saw in a call, and the MACs and bytes that follow from them.

The tower, its blocks and the projectors are watched (shapes only, read when the call is over), so that merging inside
blocks, windows and unequal tiles are counted as they ran. The decoder's lengths are known from the cuts.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from vtp_plugin.facts.costs import Costs
from vtp_plugin.facts.family import Family
from vtp_plugin.signals import Tap, taps
from vtp_plugin.stages import Stage
from vtp_plugin.surgery.call import Call, Image
from vtp_plugin.surgery.session import Session
from vtp_plugin.surgery.undo import Undo
from vtp_plugin.surgery.vision import blocks_read

PATCH, BLOCK, PROJECTOR = "patch", "block", "projector"
PARTS = ("tower", "selector", "projector", "prefill", "decode")


@dataclass
class Ends:
    """What attends to each other in a packed sequence."""

    cumulative: Tensor  # [S + 1]
    lengths: list[int] = field(default_factory=list)  # once the call has ended

    def take(self, cumulative: Tensor) -> None:
        """The same numbers on the host."""
        self.lengths = cumulative.diff().tolist()


@dataclass(frozen=True)
class Seen:
    """One part of the tower in one pass. Rows are tiles, [T, n, D], or one packed sequence, [S, D] or [1, S, D]."""

    part: str
    number: int  # of the block or projector
    entering: tuple[int, int]  # rows and tokens per row
    leaving: tuple[int, int]
    owners: tuple[int, ...]  # image of every tile
    packed: tuple[int, ...]  # of a packed sequence: patches of every image in `images`
    images: tuple[int, ...]
    ends: Ends | None  # of a packed sequence

    def shares(self) -> Iterator[tuple[int, int, int]]:
        """(image, tokens that entered, tokens that left) of every sequence."""
        if self.ends is None and self.entering[0] == len(self.owners):
            for owner in self.owners:
                yield owner, self.entering[1], self.leaving[1]
            return
        total, left = (rows * tokens for rows, tokens in (self.entering, self.leaving))
        for image, length in self._sequences(total):
            yield image, length, length * left // total

    def _sequences(self, total: int) -> Iterator[tuple[int, int]]:
        """Image and length of every sequence; what belongs to no image in particular is shared by their patches."""
        own = [patches * total // sum(self.packed) for patches in self.packed]
        if self.ends is None:
            yield from zip(self.images, own, strict=True)
            return
        place = 0
        for length in self.ends.lengths:
            yield self.images[place], length
            own[place] -= length
            place += own[place] <= 0


def watch(pruned: Session, undo: Undo) -> None:
    """Remember the shapes that pass the patch embedding, the tower's blocks and the projectors of every call."""
    tower = pruned.adapter.tower
    parts = [(PATCH, [tower.patch_embedding]), (BLOCK, tower.blocks), (PROJECTOR, pruned.adapter.projectors)]
    for part, modules in parts:
        for number, module in enumerate(modules):
            undo.after(module, _observer(pruned, part, number))


def _observer(pruned: Session, part: str, number: int) -> Any:
    def observe(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        call = pruned.call
        if call is None or not call.batch:
            return
        before = args[0] if args else next(v for v in kwargs.values() if isinstance(v, Tensor))
        after = output[0] if isinstance(output, tuple) else output
        left = _embedded(after) if part == PATCH else _rows(after)
        patches = [call.images[n].patches or call.images[n].total for n in call.batch]
        seen = Seen(
            part,
            number,
            left if part == PATCH else _rows(before),
            left,
            tuple(call.tower.tiles),
            tuple(call.tower.packed or patches),
            tuple(call.batch),
            _ends(call, kwargs.get("cu_seqlens")) if part == BLOCK else None,
        )
        call.seen.append(seen)

    return observe


def _ends(call: Call, cumulative: Tensor | None) -> Ends | None:
    """One object per tensor, however many blocks are given it."""
    if cumulative is None:
        return None
    known = next((seen.ends for seen in reversed(call.seen) if seen.ends and seen.ends.cumulative is cumulative), None)
    if known is None:
        known = Ends(cumulative)
        call.afterwards(cumulative, known.take)
    return known


def _embedded(tensor: Tensor) -> tuple[int, int]:
    """Rows and tokens per row of what a patch embedding makes, [B, D, rows, columns], [B, N, D] or [S, D]."""
    return (len(tensor), tensor.shape[2:].numel()) if tensor.ndim == 4 else _rows(tensor)


def _rows(tensor: Tensor | list[Tensor]) -> tuple[int, int]:
    """Rows and tokens per row of [B, N, D], [B, rows, columns, D] or [S, D], or of [n, D] per image."""
    if isinstance(tensor, list):
        return 1, sum(map(len, tensor))
    return (len(tensor), tensor.shape[1:-1].numel()) if tensor.ndim > 2 else (1, len(tensor))


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
    """One sample of a finished call: without pruning, and as it ran."""
    images = {n: image for n, image in enumerate(call.images) if image.sample == row and image.counted}
    lengths = decoder_lengths(pruned.adapter, call, row)
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
    for seen in call.seen:
        for image, entering, leaving in seen.shares():
            if image not in images:
                continue
            if seen.part == PATCH:  # without the padding of a canvas that images of several sizes share
                macs["tower"] += min(entering, images[image].patches or images[image].total) * costs.patch
            elif seen.part == BLOCK:
                macs["tower"] += costs.blocks[seen.number].macs(entering, leaving=leaving)
                if seen.number == len(costs.blocks) - 1:
                    macs["tower"] += adapter.pooling_macs(leaving)
            else:
                macs["projector"] += leaving * costs.projectors[seen.number]
    for image in images.values():
        macs["projector"] += adapter.reading_macs(len(image.index))
    return macs


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
    mine = {number for number, image in enumerate(call.images) if image.sample == row}
    return sum(
        adapter.costs.blocks[seen.number].reading(tokens, adapter.tower.prefix)
        for seen in call.seen
        if seen.part == BLOCK and seen.number in wanted
        for image, tokens, _ in seen.shares()
        if image in mine
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
