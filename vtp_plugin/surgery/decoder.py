"""Cuts between decoder layers: the llm stage.

From the cut layer on, hidden states, rotary tables, masks and the KV cache hold only the surviving columns of the
prompt. The decision is made once per call, in the first pass, and reused in every later one. Surviving columns keep
their positions, because the rotary tables are gathered, or are counted anew, and new tokens with them (`positions`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from vtp_plugin.errors import PruningError
from vtp_plugin.stages import Stage
from vtp_plugin.strategy import PruningStrategy
from vtp_plugin.surgery import attention, cache
from vtp_plugin.surgery.call import Call
from vtp_plugin.surgery.positions import Numbering, rotary_tables
from vtp_plugin.surgery.reading import Reading
from vtp_plugin.surgery.undo import Undo

if TYPE_CHECKING:
    from vtp_plugin.pruning import Pruned

CROPPING = ("assistant_model", "prompt_lookup_num_tokens")
IGNORED = -100  # the label that every loss of transformers leaves out
LAYER_SIGNALS = (  # of the layer before a cut
    "last_query_attention",
    "text_attention",
    "head_attention",
    "rotary_bias",
    "self_attention",
    "cross_attention",
    "key_norms",
    "text_key_norms",
)
ENTRY_SIGNALS = ("entry", "text_entry")  # of the first layer


@dataclass(frozen=True, eq=False)
class Cut:
    """Columns of the prompt that layers from here on still see."""

    columns: Tensor  # [B, K] ascending
    valid: Tensor  # [B, K] bool: False for padding, and for columns kept only to make the rows equally long
    length: int  # columns of the whole prompt
    merged: tuple[tuple[slice, Tensor, Tensor], ...] = ()  # rows, columns [M] of the prompt, their new values [M, D]
    numbering: Numbering | None = None  # positions, where they are not those of the whole prompt

    def to(self, device: torch.device) -> Cut:
        """The same next to a layer that lives on another device; merged values travel with the hidden states."""
        if self.columns.device == device:
            return self
        numbering = self.numbering and self.numbering.to(device)
        return replace(self, columns=self.columns.to(device), valid=self.valid.to(device), numbering=numbering)

    @cached_property
    def whole(self) -> bool:
        """Whether every column may be attended to."""
        return bool(self.valid.all())


class DecoderCuts:
    """One hook per decoder layer, shared by all strategies of the llm stage."""

    def __init__(self, pruned: Pruned, layers: Sequence[nn.Module], strategies: Sequence[PruningStrategy]) -> None:
        self.pruned, self.layers = pruned, layers
        self.by_layer: dict[int, list[PruningStrategy]] = {}
        for strategy in strategies:
            for layer in strategy.cut_layers(len(layers)):
                self.by_layer.setdefault(layer, []).append(strategy)

    def prepare(self) -> None:
        """Check that the model has the layers; raises before anything is attached."""
        for layer, strategies in self.by_layer.items():
            for strategy in strategies:
                if strategy.budget != "per_image":
                    raise strategy.error(
                        f"budget={strategy.budget} is for the projector stage; the llm stage cuts per image"
                    )
            first = self.pruned.adapter.first_cut
            if not first <= layer < len(self.layers):
                last = len(self.layers) - 1
                raise strategies[0].error(f"layer must be in {first} ... {last} for this model, got {layer}")

    def install(self, undo: Undo) -> None:
        for layer, strategies in self.by_layer.items():
            if any(set(s.needs) & set(LAYER_SIGNALS) for s in strategies):
                undo.after(self.layers[layer - 1].self_attn, self._layer_reader(layer))
        if any(set(s.needs) & set(ENTRY_SIGNALS) for group in self.by_layer.values() for s in group):
            undo.before(self.layers[0], self._entering)
        for number in range(min(self.by_layer, default=len(self.layers)), len(self.layers)):
            undo.before(self.layers[number], self._layer_hook(number))

    # -- hooks ----------------------------------------------------------------------------------------------------

    def _entering(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        """Keeps the embeddings of the prompt."""
        if self._call is not None and "entry" not in self._call.scratch:
            self._call.scratch["entry"] = args[0] if args else kwargs["hidden_states"]

    def _layer_reader(self, layer: int) -> Callable:
        """Reads the layer before the cut, and the last prompt token's attention row of it."""

        def read(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            call = self._call
            if call is None or layer in call.cuts:
                return
            past = cache.of_layer(kwargs)
            self._check(past)
            hidden = args[0] if args else kwargs["hidden_states"]
            seen = self._seen(call, layer - 1, hidden)
            with torch.no_grad(), self.pruned.timed("selector"):
                tables = kwargs["position_embeddings"]
                reading = Reading.of(module, hidden, tables, past, seen.valid, seen.columns)
                call.scratch["reading", layer] = reading
                if any("last_query_attention" in s.needs for s in self.by_layer[layer]):
                    call.scratch["last_query", layer] = reading.last_row()

        return read

    def _layer_hook(self, number: int) -> Callable:
        def enter(module: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any] | None:
            call = self._call
            if call is None:
                return None
            hidden = args[0] if args else kwargs["hidden_states"]
            stored = cache.of_layer(kwargs)
            self._check(stored)
            if stored is not None and (past := stored.get_seq_length(number)) > 0:
                cut, count = self._seen(call, number, hidden), hidden.shape[1]
                mask = self._later_mask(call, kwargs, cut, attention.window(module.self_attn), stored, number, count)
                tables = self._tables(call, number, hidden, kwargs["position_embeddings"], cut, past + count)
                return args, {**kwargs, "attention_mask": mask, "position_embeddings": tables}
            self._check_window(module, kwargs["position_embeddings"][0].shape[1])
            if number in self.by_layer:
                hidden = self._cut(call, number, hidden, kwargs["position_embeddings"])
            return self._narrowed(call, number, hidden, args, kwargs)

        return enter

    def _narrowed(self, call: Call, number: int, hidden: Tensor, args: Any, kwargs: dict[str, Any]) -> tuple[Any, Any]:
        """The arguments of a layer in a pass over the whole prompt."""
        tables, cut = kwargs["position_embeddings"], self._seen(call, number, hidden)
        columns = _with_new(cut.columns, cut.length, tables[0].shape[1])
        kwargs = {
            **kwargs,
            "position_embeddings": self._tables(call, number, hidden, tables, cut, columns.shape[1], columns),
            "attention_mask": self._mask(call, kwargs, cut, columns),
        }
        if kwargs.get("position_ids") is not None:  # contiguous: gaps would read as packed sequences
            kwargs["position_ids"] = torch.arange(columns.shape[1], device=hidden.device)[None]
        if kwargs.get("cache_position") is not None:
            kwargs["cache_position"] = kwargs["cache_position"][: columns.shape[1]]
        if args:
            return (hidden, *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": hidden}

    def _tables(
        self,
        call: Call,
        number: int,
        hidden: Tensor,
        host: tuple[Tensor, ...],
        cut: Cut,
        keys: int,
        columns: Tensor | None = None,
    ) -> tuple[Tensor, ...]:
        """The rotary tables for the last of `keys` columns: the host's, of the columns given, or counted anew."""
        if columns is None and cut.numbering is None:
            return host

        def make() -> tuple[Tensor, ...]:
            own = host if columns is None else tuple(attention.take(table, columns) for table in host)
            if cut.numbering is None:
                return own
            positions = cut.numbering.upto(keys, own[0].shape[1])
            anew = rotary_tables(self.pruned.adapter.language_model, number, hidden, positions)
            rows = cut.numbering.applies[:, None, None].to(own[0].device)
            return tuple(torch.where(rows, a.to(b), b) for a, b in zip(anew, own, strict=True))

        return call.once("tables", (cut, keys), host[0], make)

    # -- deciding -------------------------------------------------------------------------------------------------

    def _cut(self, call: Call, number: int, hidden: Tensor, tables: tuple[Tensor, ...]) -> Tensor:
        """Hidden states [B, L, D] without the dropped columns; decides if this is the first pass."""
        before = self._seen(call, number - 1, hidden)
        if number not in call.cuts:
            if any("next_query_attention" in s.needs for s in self.by_layer[number]):
                call.scratch["next_query", number] = self._next_row(number, hidden, tables, before)
            call.cuts[number] = self._decide(call, number, hidden, before)
        after = call.cuts[number]
        where = torch.searchsorted(before.columns.contiguous(), after.columns.contiguous())
        hidden = attention.take(hidden, _with_new(where, before.columns.shape[1], hidden.shape[1]))
        for rows, columns, values in after.merged:
            hidden[rows, torch.searchsorted(after.columns[rows.start].contiguous(), columns)] = values.to(hidden.dtype)
        return hidden

    def _next_row(self, number: int, hidden: Tensor, tables: tuple[Tensor, ...], before: Cut) -> Tensor:
        """The last prompt token's attention row of the layer behind the cut, as if nothing were cut."""
        layer = self.layers[number]
        with torch.no_grad(), self.pruned.timed("selector"):
            length = before.columns.shape[1]
            read = self._tables(self.pruned.call, number, hidden, tables, before, length, before.columns)
            normed = layer.input_layernorm.forward(hidden)
            return Reading.of(layer.self_attn, normed, read, None, before.valid, before.columns).last_row()

    def _decide(self, call: Call, number: int, hidden: Tensor, before: Cut) -> Cut:
        rows = len(hidden) // len(call.valid)  # beams and returned sequences repeat a sample
        keep, merged = before.valid.clone(), []
        text = self._text(call, before, rows)
        for strategy in self.by_layer[number]:
            cuts = strategy.cut_layers(len(self.layers))
            for image_number, image in enumerate(call.images):
                if image.columns is None or len(image.columns) == 0:
                    continue
                sample = image.sample * rows
                image.columns = image.columns.to(hidden.device)
                where = torch.searchsorted(before.columns[sample].contiguous(), image.columns)
                first = image.entering.setdefault(strategy.name, image.columns)
                with self.pruned.judging(strategy, layer=number) as cut:
                    places = (sample, where, text[sample].nonzero().flatten())
                    read = (call, number, hidden, before, first, *places)
                    signals = {n: self._signal(n, *read) for n in strategy.needs if n != "fingerprint"}
                    facts = {"cut": (cuts.index(number), len(cuts)), "entered": len(first)}
                    selection = cut.decide(
                        hidden[sample, where][None], [image_number], image.grid or self._grid, signals, **facts
                    )
                columns = selection.sources[0]
                if selection.tokens is not None:
                    merged.append((slice(sample, sample + rows), image.columns[columns], selection.tokens[0]))
                keep[sample : sample + rows, where] = False
                keep[sample : sample + rows, where[columns]] = True
                image.columns = image.columns[columns]
        for signal in ("reading", "last_query", "next_query"):
            call.scratch.pop((signal, number), None)
        return _equalised(before, keep, merged, compact=self.pruned.positions.layers[number] == "compact")

    def _text(self, call: Call, before: Cut, rows: int) -> Tensor:
        """The columns behind the first image that belong to no image, [B, L] bool; at least the last real one."""
        text, column = before.valid.clone(), torch.arange(before.valid.shape[1], device=before.valid.device)
        last = (before.valid * (column + 1)).argmax(1)
        for image in call.images:
            if image.columns is None or len(image.columns) == 0:
                continue
            sample = slice(image.sample * rows, (image.sample + 1) * rows)
            where = torch.searchsorted(before.columns[sample.start].contiguous(), image.columns.to(text.device))
            text[sample, where] = False
            text[sample] &= column > where.min()
        text[torch.arange(len(text), device=text.device), last] |= ~text.any(1)
        return text

    def _signal(
        self,
        name: str,
        call: Call,
        number: int,
        hidden: Tensor,
        before: Cut,
        first: Tensor,
        sample: int,
        where: Tensor,
        text: Tensor,
    ) -> Tensor | None:
        """One field of VisualTokens for the image at the columns `where` [N]; `text` [T] are those of the question."""
        reading = call.scratch.get(("reading", number))
        norm = self.pruned.adapter.language_model.norm.forward
        read: dict[str, Callable[[], Tensor]] = {
            "last_query_attention": lambda: call.scratch["last_query", number][sample, where],
            "next_query_attention": lambda: call.scratch["next_query", number][sample, where],
            "text_attention": lambda: reading.rows(sample, text)[:, where],
            "head_attention": lambda: reading.head_rows(sample, text)[..., where],
            "rotary_bias": lambda: reading.rotary_bias(sample, text)[:, where],
            "self_attention": lambda: reading.strongest(sample, where)[:, where].mean(0),
            "cross_attention": lambda: reading.strongest(sample, text)[:, where].sum(0),
            "key_norms": lambda: reading.norms(sample)[where],
            "text_key_norms": lambda: reading.norms(sample)[text],
            "normed": lambda: norm(hidden[sample, where]),
            "text_normed": lambda: norm(hidden[sample, text]),
            "entry": lambda: call.scratch["entry"].to(hidden.device)[sample, first.to(hidden.device)],
            "text_entry": lambda: call.scratch["entry"].to(hidden.device)[sample, before.columns[sample, text]],
        }
        with torch.no_grad():
            return read[name]()[None] if name in read else None

    def _seen(self, call: Call, number: int, hidden: Tensor) -> Cut:
        """What layer `number` sees of the prompt."""
        earlier = [layer for layer in call.cuts if layer <= number]
        if earlier:
            cut = call.cuts[max(earlier)] = call.cuts[max(earlier)].to(hidden.device)
            return cut
        valid = call.valid.to(hidden.device).repeat_interleave(len(hidden) // len(call.valid), dim=0)
        columns = torch.arange(valid.shape[1], device=valid.device).expand(valid.shape)
        return Cut(columns, valid, valid.shape[1])

    # -- small things ---------------------------------------------------------------------------------------------

    @property
    def _call(self) -> Call | None:
        """The current call, if its prompt has visual tokens."""
        call = self.pruned.call
        return call if call is not None and call.valid is not None and call.images else None

    @property
    def _grid(self) -> tuple[int, int]:
        return self.pruned.adapter.tower.grid

    def _mask(self, call: Call, kwargs: Any, cut: Cut, columns: Tensor) -> Tensor | None:
        """The attention mask of a pass over the whole prompt, whose columns [B, K] are left."""
        mask, count = kwargs.get("attention_mask"), columns.shape[1]
        if mask is not None:
            return call.once("mask", (cut, count), mask, lambda: _narrow(mask, columns, cut))
        if cut.whole:
            return None
        return call.once("mask", (cut, count), None, lambda: _made_mask(cut, count, count, self._flash))

    def _later_mask(
        self, call: Call, kwargs: Any, cut: Cut, window: int | None, stored: Any, number: int, count: int
    ) -> Tensor | None:
        """The attention mask of `count` queries behind what layer `number` has cached.

        The host's counts the cache of the first layer with full attention, and of the first with a window: it may lie
        on either side of a cut, or hold less than the prompt. Then the mask is made anew.
        """
        mask = kwargs.get("attention_mask")
        if mask is None and cut.whole:
            return None
        keys, first = stored.get_mask_sizes(count, number)
        total = first + keys - cut.columns.shape[1] + cut.length
        if mask is not None and mask.shape[-1] == total:
            return call.once("mask", (cut, count), mask, lambda: _narrow(mask, None, cut))

        def make() -> Tensor:
            made = _made_mask(cut, count, first + keys, self._flash, window)[..., first:]
            return made if mask is None or not mask.is_floating_point() else _additive(made, mask.dtype)

        return call.once("mask", (cut, count, first, keys, window), mask, make)

    @property
    def _flash(self) -> bool:
        return "flash" in self.pruned.adapter.language_model.config._attn_implementation

    def _check_window(self, layer: nn.Module, length: int) -> None:
        """A kernel that counts its window itself would count what is left instead of the prompt's columns."""
        window = attention.window(layer.self_attn)
        if self._flash and window is not None and window < length:
            raise PruningError(
                f"{self._names}: a prompt of {length} tokens is longer than the model's sliding window ({window}), "
                f"which flash attention counts by itself: load the model with attn_implementation=sdpa"
            )

    @property
    def _names(self) -> str:
        return "+".join(s.name for group in self.by_layer.values() for s in group)

    def _check(self, stored: Any) -> None:
        if stored is not None and getattr(stored, "is_compileable", False):
            raise PruningError(
                f"{self._names}: a static cache has one length for all layers; use the default dynamic cache"
            )


def refuse_filled_cache(stored: Any) -> None:
    """Images can only be pruned in the first pass."""
    if stored is not None and stored.get_seq_length() > 0:
        raise PruningError("pruning cannot add images behind a filled cache of the caller")


def refuse_cropping(strategies: Sequence[PruningStrategy], inputs: Mapping[str, Any]) -> None:
    """Refuse ways of generating that crop the cache, whose layers have unequal lengths after an llm cut."""
    late = [s for s in strategies if s.stage is Stage.LLM]
    asked = [name for name in CROPPING if inputs.get(name) is not None]
    if late and asked:
        raise PruningError(f"{late[0].name}: {asked[0]} is not possible when decoder layers cache unequal lengths")


def narrowed_labels(call: Call, labels: Tensor) -> Tensor:
    """Labels [B, L] of a whole prompt for the columns that the last layer sees; padding is ignored by the loss."""
    if not call.cuts:
        return labels
    cut = call.cuts[max(call.cuts)].to(labels.device)
    return torch.where(cut.valid, labels.gather(1, cut.columns), IGNORED)


def _equalised(before: Cut, keep: Tensor, merged: Sequence[tuple[slice, Tensor, Tensor]], *, compact: bool) -> Cut:
    """The kept columns; shorter rows are filled up with columns that nobody will attend to."""
    longest = int(keep.sum(1).max())
    spare = torch.where(keep, 2, (~before.valid).int())  # kept first, then padding, then dropped columns
    chosen = spare.sort(dim=1, descending=True, stable=True).indices[:, :longest].sort(dim=1).values
    columns = before.columns.gather(1, chosen)
    kept = [(rows, where, torch.isin(where, columns[rows.start]), values) for rows, where, values in merged]
    left = tuple((rows, where[mask], values[mask]) for rows, where, mask, values in kept)
    valid, numbering = keep.gather(1, chosen), before.numbering
    if compact:
        numbering = Numbering.counted(valid, before.valid.sum(1), numbering)
    elif numbering is not None:
        numbering = numbering.taken(chosen)
    return Cut(columns, valid, before.length, left, numbering)


def _with_new(columns: Tensor, length: int, total: int) -> Tensor:
    """The columns and everything that was appended behind the prompt since, [B, K + new]."""
    new = torch.arange(length, total, device=columns.device).expand(len(columns), -1)
    return torch.cat([columns, new], dim=1)


def _narrow(mask: Tensor | None, queries: Tensor | None, cut: Cut) -> Tensor | None:
    """The host's mask over the surviving columns: [B, S], or [B, 1, Q, S] bool or additive.

    `queries` are the surviving query columns [B, Q'] in a pass over the whole prompt, None when decoding.
    """
    columns = _with_new(cut.columns, cut.length, mask.shape[-1]).to(mask.device)
    valid = _valid(cut, columns.shape[1]).to(mask.device)
    if mask.ndim == 2:
        return mask.gather(1, columns) * valid
    mask = mask.expand(len(columns), *mask.shape[1:])
    if queries is not None:
        mask = attention.take(mask.transpose(1, 2), queries).transpose(1, 2)
    mask = attention.take(mask.permute(0, 3, 1, 2), columns).permute(0, 2, 3, 1)  # [B, 1, Q', K]
    return mask if cut.whole else _hide(mask, ~valid)


def _made_mask(cut: Cut, queries: int, keys: int, flash: bool, window: int | None = None) -> Tensor:
    """A mask where the host's has none or another length: [B, 1, Q, K] bool, for flash attention [B, K].

    The last Q of the K columns that are left are queries; a window counts columns of the whole prompt.
    """
    valid, columns = _valid(cut, keys), _with_new(cut.columns, cut.length, cut.length + keys - cut.columns.shape[1])
    far = columns[:, None] <= columns[:, -queries:, None] - (columns.max() + 1 if window is None else window)
    if flash:
        return valid & ~far[:, -1]
    causal = torch.ones(queries, keys, dtype=torch.bool, device=valid.device).tril(keys - queries)
    return _hide((causal & ~far)[:, None], ~valid)


def _additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A mask of zeros and the lowest number instead of True and False."""
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, torch.finfo(dtype).min)


def _valid(cut: Cut, keys: int) -> Tensor:
    """Which of the `keys` columns may be attended to, [B, keys]; everything behind the prompt may."""
    return torch.cat([cut.valid, cut.valid.new_ones(len(cut.valid), keys - cut.valid.shape[1])], dim=1)


def _hide(mask: Tensor, hidden: Tensor) -> Tensor:
    """Let nobody but itself attend to the hidden columns [B, K]; mask [B, 1, Q, K], the last Q columns are queries."""
    queries, keys = mask.shape[-2:]
    own = torch.ones(queries, keys, dtype=torch.bool, device=mask.device).triu(keys - queries).tril(keys - queries)
    blocked = hidden[:, None, None] & ~own
    return mask & ~blocked if mask.dtype is torch.bool else mask.masked_fill(blocked, torch.finfo(mask.dtype).min)
