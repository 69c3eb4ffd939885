"""Cuts between decoder layers: the llm stage.

From the cut layer on, hidden states, rotary tables, masks and the KV cache hold only the surviving columns of the
prompt. The decision is made once per call, in the first pass, and reused in every later one. Surviving columns keep
their positions, because the rotary tables are gathered.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from vtp_plugin.errors import PruningError
from vtp_plugin.strategy import PruningStrategy
from vtp_plugin.surgery import attention
from vtp_plugin.surgery.call import Call
from vtp_plugin.surgery.undo import Undo

if TYPE_CHECKING:
    from vtp_plugin.pruning import Pruned

IGNORED = -100  # the label that every loss of transformers leaves out


@dataclass(frozen=True)
class Cut:
    """Columns of the prompt that layers from here on still see."""

    columns: Tensor  # [B, K] ascending
    valid: Tensor  # [B, K] bool: False for padding, and for columns kept only to make the rows equally long
    length: int  # columns of the whole prompt


class DecoderCuts:
    """One hook per decoder layer, shared by all strategies of the llm stage."""

    def __init__(self, pruned: Pruned, layers: Sequence[nn.Module], strategies: Sequence[PruningStrategy]) -> None:
        self.pruned, self.layers = pruned, layers
        self.by_layer: dict[int, list[PruningStrategy]] = {}
        for strategy in strategies:
            self.by_layer.setdefault(strategy.decoder_layer, []).append(strategy)

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
            if any("last_query_attention" in s.needs for s in strategies):
                undo.after(self.layers[layer - 1].self_attn, self._row_reader(layer))
        for number in range(min(self.by_layer, default=len(self.layers)), len(self.layers)):
            undo.before(self.layers[number], self._layer_hook(number))

    # -- hooks ----------------------------------------------------------------------------------------------------

    def _row_reader(self, layer: int) -> Callable:
        """Recomputes the last prompt token's attention row of the layer before the cut."""

        def read(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            call = self._call
            if call is None or layer in call.cuts:
                return
            hidden = args[0] if args else kwargs["hidden_states"]
            seen = self._seen(call, layer - 1, hidden)
            with torch.no_grad(), self.pruned.timed("selector"):
                call.scratch["last_query", layer] = _last_row(module, hidden, kwargs, seen.valid)

        return read

    def _layer_hook(self, number: int) -> Callable:
        def enter(module: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any] | None:
            call = self._call
            if call is None:
                return None
            hidden = args[0] if args else kwargs["hidden_states"]
            cache = kwargs.get("past_key_values")
            self._check(cache)
            if cache is not None and (past := cache.get_seq_length(number)) > 0:
                mask = self._mask(kwargs, self._seen(call, number, hidden), None, hidden.shape[1], past)
                return args, {**kwargs, "attention_mask": mask}
            self._check_window(module, kwargs["position_embeddings"][0].shape[1])
            if number in self.by_layer:
                hidden = self._cut(call, number, hidden, kwargs["position_embeddings"][0].shape[1])
            return self._narrowed(hidden, args, kwargs, self._seen(call, number, hidden))

        return enter

    def _narrowed(self, hidden: Tensor, args: Any, kwargs: dict[str, Any], cut: Cut) -> tuple[Any, Any]:
        """The arguments of a layer in a pass over the whole prompt."""
        total = kwargs["position_embeddings"][0].shape[1]
        columns = _with_new(cut.columns, cut.length, total)
        kwargs = {
            **kwargs,
            "position_embeddings": tuple(attention.take(table, columns) for table in kwargs["position_embeddings"]),
            "attention_mask": self._mask(kwargs, cut, columns, columns.shape[1], 0),
        }
        if kwargs.get("position_ids") is not None:  # contiguous: gaps would read as packed sequences
            kwargs["position_ids"] = torch.arange(columns.shape[1], device=hidden.device)[None]
        if kwargs.get("cache_position") is not None:
            kwargs["cache_position"] = kwargs["cache_position"][: columns.shape[1]]
        if args:
            return (hidden, *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": hidden}

    # -- deciding -------------------------------------------------------------------------------------------------

    def _cut(self, call: Call, number: int, hidden: Tensor, total: int) -> Tensor:
        """Hidden states [B, L, D] without the dropped columns; decides if this is the first pass."""
        before = self._seen(call, number - 1, hidden)
        if number not in call.cuts:
            call.cuts[number] = self._decide(call, number, hidden, before)
        after = call.cuts[number]
        where = torch.searchsorted(before.columns.contiguous(), after.columns.contiguous())
        return attention.take(hidden, _with_new(where, before.columns.shape[1], hidden.shape[1]))

    def _decide(self, call: Call, number: int, hidden: Tensor, before: Cut) -> Cut:
        rows = len(hidden) // len(call.valid)  # beams and returned sequences repeat a sample
        keep = before.valid.clone()
        for strategy in self.by_layer[number]:
            for image_number, image in enumerate(call.images):
                if image.columns is None or len(image.columns) == 0:
                    continue
                sample = image.sample * rows
                where = torch.searchsorted(before.columns[sample].contiguous(), image.columns)
                with self.pruned.judging(strategy, layer=number) as cut:
                    weights = call.scratch.get(("last_query", number))
                    signals = {"last_query_attention": None if weights is None else weights[sample, where][None]}
                    grid = image.grid or self._grid
                    selection = cut.decide(hidden[sample, where][None], [image_number], grid, signals)
                columns = selection.sources[0]
                keep[sample : sample + rows, where] = False
                keep[sample : sample + rows, where[columns]] = True
                image.columns = image.columns[columns]
        call.scratch.pop(("last_query", number), None)
        return _equalised(before, keep)

    def _seen(self, call: Call, number: int, hidden: Tensor) -> Cut:
        """What layer `number` sees of the prompt."""
        earlier = [layer for layer in call.cuts if layer <= number]
        if earlier:
            return call.cuts[max(earlier)]
        valid = call.valid.repeat_interleave(len(hidden) // len(call.valid), dim=0)
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

    def _mask(self, kwargs: Any, cut: Cut, queries: Tensor | None, count: int, past: int) -> Tensor | None:
        """The attention mask of `count` queries behind `past` cached columns."""
        mask = kwargs.get("attention_mask")
        if mask is not None:
            return _narrow(mask, queries, cut)
        flash = "flash" in self.pruned.adapter.language_model.config._attn_implementation
        return _made_mask(cut, count, past + count, flash)

    def _check_window(self, layer: nn.Module, length: int) -> None:
        window = getattr(layer.self_attn, "sliding_window", None)
        if window is not None and window < length:
            raise PruningError(
                f"{self._names}: a prompt of {length} tokens is longer than the model's sliding window ({window}), "
                f"whose cache holds no whole prompt"
            )

    @property
    def _names(self) -> str:
        return "+".join(s.name for group in self.by_layer.values() for s in group)

    def _check(self, cache: Any) -> None:
        if cache is not None and getattr(cache, "is_compileable", False):
            raise PruningError(
                f"{self._names}: a static cache has one length for all layers; use the default dynamic cache"
            )


def narrowed_labels(call: Call, labels: Tensor) -> Tensor:
    """Labels [B, L] of a whole prompt for the columns that the last layer sees; padding is ignored by the loss."""
    if not call.cuts:
        return labels
    cut = call.cuts[max(call.cuts)]
    return torch.where(cut.valid, labels.gather(1, cut.columns), IGNORED)


def _last_row(module: nn.Module, hidden: Tensor, kwargs: Any, valid: Tensor) -> Tensor:
    """Attention of the last real column, mean over heads: hidden [B, L, D], valid [B, L] -> [B, L] fp32."""
    length = hidden.shape[1]
    last = (valid * torch.arange(1, length + 1, device=valid.device)).argmax(1, keepdim=True)  # [B, 1]
    cos, sin = (table[:, :length] for table in kwargs["position_embeddings"])
    query = attention.heads(module, "q_proj", attention.take(hidden, last))  # [B, H, 1, d]
    query = attention.rotated(module, query, attention.take(cos, last), attention.take(sin, last))
    keys = _cached_keys(module, kwargs.get("past_key_values"))
    if keys is None:
        keys = attention.rotated(module, attention.heads(module, "k_proj", hidden), cos, sin)
    return attention.row(query[:, :, 0], keys, attention.scale(module), valid)


def _cached_keys(module: nn.Module, cache: Any) -> Tensor | None:
    """The rotated keys that the layer has just stored, [B, Hkv, L, d]."""
    return None if cache is None else cache.layers[module.layer_idx].keys


def _equalised(before: Cut, keep: Tensor) -> Cut:
    """The kept columns; shorter rows are filled up with columns that nobody will attend to."""
    longest = int(keep.sum(1).max())
    spare = torch.where(keep, 2, (~before.valid).int())  # kept first, then padding, then dropped columns
    chosen = spare.sort(dim=1, descending=True, stable=True).indices[:, :longest].sort(dim=1).values
    return Cut(before.columns.gather(1, chosen), keep.gather(1, chosen), before.length)


def _with_new(columns: Tensor, length: int, total: int) -> Tensor:
    """The columns and everything that was appended behind the prompt since, [B, K + new]."""
    new = torch.arange(length, total, device=columns.device).expand(len(columns), -1)
    return torch.cat([columns, new], dim=1)


def _narrow(mask: Tensor | None, queries: Tensor | None, cut: Cut) -> Tensor | None:
    """The host's mask over the surviving columns: [B, S], or [B, 1, Q, S] bool or additive.

    `queries` are the surviving query columns [B, Q'] in a pass over the whole prompt, None when decoding.
    """
    columns = _with_new(cut.columns, cut.length, mask.shape[-1])
    valid = _valid(cut, columns.shape[1])
    if mask.ndim == 2:
        return mask.gather(1, columns) * valid
    mask = mask.expand(len(columns), *mask.shape[1:])
    if queries is not None:
        mask = attention.take(mask.transpose(1, 2), queries).transpose(1, 2)
    mask = attention.take(mask.permute(0, 3, 1, 2), columns).permute(0, 2, 3, 1)  # [B, 1, Q', K]
    return mask if valid.all() else _hide(mask, ~valid)


def _made_mask(cut: Cut, queries: int, keys: int, flash: bool) -> Tensor | None:
    """A mask where the host needed none (no padding), but rows of unequal length had to be filled up."""
    if cut.valid.all():
        return None
    valid = _valid(cut, keys)
    if flash:
        return valid
    causal = torch.ones(queries, keys, dtype=torch.bool, device=valid.device).tril(keys - queries)
    return _hide(causal.expand(len(valid), 1, queries, keys), ~valid)


def _valid(cut: Cut, keys: int) -> Tensor:
    """Which of the `keys` columns may be attended to, [B, keys]; everything behind the prompt may."""
    return torch.cat([cut.valid, cut.valid.new_ones(len(cut.valid), keys - cut.valid.shape[1])], dim=1)


def _hide(mask: Tensor, hidden: Tensor) -> Tensor:
    """Let nobody but itself attend to the hidden columns [B, K]; mask [B, 1, Q, K], the last Q columns are queries."""
    queries, keys = mask.shape[-2:]
    own = torch.ones(queries, keys, dtype=torch.bool, device=mask.device).triu(keys - queries).tril(keys - queries)
    blocked = hidden[:, None, None] & ~own
    return mask & ~blocked if mask.dtype is torch.bool else mask.masked_fill(blocked, torch.finfo(mask.dtype).min)
