"""Cuts between decoder layers: the llm stage.

From the cut layer on, hidden states, rotary tables, masks and the KV cache hold only the surviving columns of the
prompt. The decision is made once per call, in the first pass, and reused in every later one. Surviving columns keep
their positions, because the rotary tables are gathered, or are counted anew, and new tokens with them (`positions`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from vtp_plugin.errors import PruningError
from vtp_plugin.signals import Tap, taps
from vtp_plugin.strategy import PruningStrategy
from vtp_plugin.surgery import attention, cache, checkpointing
from vtp_plugin.surgery.call import Call
from vtp_plugin.surgery.cut import Cut, additive, made_mask, narrow, with_new
from vtp_plugin.surgery.deciding import Seen, decide
from vtp_plugin.surgery.positions import rotary_tables
from vtp_plugin.surgery.reading import Reading
from vtp_plugin.surgery.session import Session
from vtp_plugin.surgery.undo import Undo


class DecoderCuts:
    """One hook per decoder layer, shared by all strategies of the llm stage."""

    def __init__(self, session: Session, layers: Sequence[nn.Module], strategies: Sequence[PruningStrategy]) -> None:
        self.session, self.layers = session, layers
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
            strategies[0].check_layer(strategies[0].cut_field, layer, *self._possible(layer))

    def _possible(self, layer: int) -> tuple[int, int, str]:
        """The first and the last layer that may be cut, and what is in the way of this one."""
        family, depth = self.session.adapter, len(self.layers)
        why = family.cannot_cut if 0 < layer < family.first_cut else f"its language model has {depth} layers"
        return family.first_cut, depth - 1, why

    def install(self, undo: Undo) -> None:
        for layer, strategies in self.by_layer.items():
            if any(Tap.LAYER in taps(s) for s in strategies):
                undo.after(self.layers[layer - 1].self_attn, self._layer_reader(layer))
        if any(Tap.ENTRY in taps(s) for strategies in self.by_layer.values() for s in strategies):
            undo.before(self.layers[0], self._entering)
        for number in range(min(self.by_layer, default=len(self.layers)), len(self.layers)):
            undo.before(self.layers[number], self._layer_hook(number))

    # -- hooks ----------------------------------------------------------------------------------------------------

    def _entering(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        """Keeps the embeddings of the prompt [B, L, D]."""
        if self._call is not None and self._call.prompt.entry is None:
            self._call.prompt.entry = args[0] if args else kwargs["hidden_states"]

    def _layer_reader(self, layer: int) -> Callable:
        """Reads the attention of the layer before the cut."""

        def read(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            call = self._call
            if call is None or layer in call.cuts:
                return
            past = cache.of_layer(kwargs)
            self._check(past)
            hidden = args[0] if args else kwargs["hidden_states"]
            seen = self._seen(call, layer - 1, hidden)
            with torch.no_grad(), self.session.timed("selector"):
                tables = kwargs["position_embeddings"]
                given = past, seen.valid, seen.columns, kwargs.get("attention_mask"), self._turns(module)
                call.prompt.readings[layer] = Reading.of(module, hidden, tables, *given)

        return read

    def _layer_hook(self, number: int) -> Callable:
        def enter(module: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any] | None:
            call = self._call
            if call is None:
                return None
            hidden = args[0] if args else kwargs["hidden_states"]
            self._check_replay(module, hidden)
            stored = cache.of_layer(kwargs)
            self._check(stored)
            if stored is not None and (past := stored.get_seq_length(number)) > 0:
                cut, count = self._seen(call, number, hidden), hidden.shape[1]
                mask = self._later_mask(call, kwargs, cut, attention.window(module.self_attn), stored, number, count)
                tables = self._tables(call, number, hidden, kwargs["position_embeddings"], cut, past + count)
                return args, {**kwargs, "attention_mask": mask, "position_embeddings": tables}
            self._check_window(module, kwargs["position_embeddings"][0].shape[1])
            if number in self.by_layer:
                hidden = self._cut(call, number, hidden, kwargs)
            cut = self._seen(call, number, hidden)
            if cut.everything and cut.numbering is None:
                return None  # not a copy of a mask is other than it would be
            return self._narrowed(call, number, cut, hidden, args, kwargs)

        return enter

    def _narrowed(
        self, call: Call, number: int, cut: Cut, hidden: Tensor, args: Any, kwargs: dict[str, Any]
    ) -> tuple[Any, Any]:
        """The arguments of a layer in a pass over the whole prompt."""
        tables = kwargs["position_embeddings"]
        total, once = tables[0].shape[1], call.prompt.once
        columns = once("columns", (cut, total), None, lambda: with_new(cut.columns, cut.length, total))
        kwargs = {
            **kwargs,
            "position_embeddings": self._tables(call, number, hidden, tables, cut, columns.shape[1], columns),
            "attention_mask": self._mask(call, kwargs, cut, columns),
        }
        if kwargs.get("position_ids") is not None:  # contiguous: gaps would read as packed sequences
            left, device = columns.shape[1], hidden.device
            kwargs["position_ids"] = once(
                "numbers", (left, device), None, lambda: torch.arange(left, device=device)[None]
            )
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
            anew = rotary_tables(self.session.adapter.language_model, number, hidden, positions)
            rows = cut.numbering.applies[:, None, None].to(own[0].device)
            return tuple(torch.where(rows, a.to(b), b) for a, b in zip(anew, own, strict=True))

        return call.prompt.once("tables", (cut, keys), host[0], make)

    # -- deciding -------------------------------------------------------------------------------------------------

    def _cut(self, call: Call, number: int, hidden: Tensor, kwargs: dict[str, Any]) -> Tensor:
        """Hidden states [B, L, D] without the dropped columns; decides if this is the first pass."""
        before = self._seen(call, number - 1, hidden)
        if number not in call.cuts:
            seen = Seen(number, hidden, before, call.prompt.readings.pop(number, None), self._behind(number, kwargs))
            call.cuts[number] = decide(self.session, call, self.by_layer[number], len(self.layers), seen)
        after = call.cuts[number]
        where = torch.searchsorted(before.columns.contiguous(), after.columns.contiguous())
        hidden = attention.take(hidden, with_new(where, before.columns.shape[1], hidden.shape[1]))
        for rows, columns, values in after.merged:
            hidden[rows, torch.searchsorted(after.columns[rows.start].contiguous(), columns)] = values.to(hidden.dtype)
        return hidden

    def _behind(self, number: int, kwargs: dict[str, Any]) -> Callable[[Tensor, Cut], Reading]:
        """Reads the layer behind the cut on hidden states [B, L, D], as if nothing were cut."""

        def read(hidden: Tensor, before: Cut) -> Reading:
            layer = self.layers[number]
            with torch.no_grad(), self.session.timed("selector"):
                length, tables, call = before.columns.shape[1], kwargs["position_embeddings"], self.session.call
                rotary = self._tables(call, number, hidden, tables, before, length, before.columns)
                mask, normed = self._mask(call, kwargs, before, before.columns), layer.input_layernorm.forward(hidden)
                given = None, before.valid, before.columns, mask, self._turns(layer.self_attn)
                return Reading.of(layer.self_attn, normed, rotary, *given)

        return read

    def _seen(self, call: Call, number: int, hidden: Tensor) -> Cut:
        """What layer `number` sees of the prompt."""
        earlier = [layer for layer in call.cuts if layer <= number]
        if earlier:
            cut = call.cuts[max(earlier)] = call.cuts[max(earlier)].to(hidden.device)
            return cut
        valid = call.valid.to(hidden.device).repeat_interleave(len(hidden) // len(call.valid), dim=0)
        columns = torch.arange(valid.shape[1], device=valid.device).expand(valid.shape)
        counts = [count for count in call.lengths for _ in range(len(hidden) // len(call.valid))]
        return Cut(columns, valid, valid.shape[1], tuple(counts), everything=True)

    def _turns(self, module: nn.Module) -> bool:
        return self.session.adapter.turns(module)

    # -- small things ---------------------------------------------------------------------------------------------

    @property
    def _call(self) -> Call | None:
        """The current call, if its prompt has visual tokens."""
        call = self.session.call
        return call if call is not None and call.valid is not None and call.images else None

    def _mask(self, call: Call, kwargs: Any, cut: Cut, columns: Tensor) -> Tensor | None:
        """The attention mask of a pass over the whole prompt, whose columns [B, K] are left."""
        mask, count = kwargs.get("attention_mask"), columns.shape[1]
        if mask is not None:
            return call.prompt.once("mask", (cut, count), mask, lambda: narrow(mask, columns, cut))
        if cut.whole:
            return None
        return call.prompt.once("mask", (cut, count), None, lambda: made_mask(cut, count, count, self._flash))

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
            return call.prompt.once("mask", (cut, count), mask, lambda: narrow(mask, None, cut))

        def make() -> Tensor:
            made = made_mask(cut, count, first + keys, self._flash, window)[..., first:]
            return made if mask is None or not mask.is_floating_point() else additive(made, mask.dtype)

        return call.prompt.once("mask", (cut, count, first, keys, window), mask, make)

    @property
    def _flash(self) -> bool:
        return "flash" in self.session.adapter.language_model.config._attn_implementation

    def _check_replay(self, layer: nn.Module, hidden: Tensor) -> None:
        """What is cut in front of a layer would not be when the backward pass runs it again, hooks and all."""
        if checkpointing.with_its_hooks(layer) and checkpointing.runs_again(layer, hidden):
            raise PruningError(
                f"{self._names}: gradient checkpointing runs decoder layers again with their hooks before transformers "
                f"5.23: train with a newer release, or without it"
            )

    def _check_window(self, layer: nn.Module, length: int) -> None:
        """A kernel that counts its window itself would count what is left instead of the prompt's columns."""
        if not self._flash:
            return
        window = attention.window(layer.self_attn)
        if window is not None and window < length:
            raise PruningError(
                f"{self._names}: a prompt of {length} tokens is longer than the model's sliding window ({window}), "
                f"which flash attention counts by itself: load the model with attn_implementation=sdpa"
            )

    @property
    def _names(self) -> str:
        return "+".join(dict.fromkeys(s.name for group in self.by_layer.values() for s in group))

    def _check(self, stored: Any) -> None:
        if stored is not None and getattr(stored, "is_compileable", False):
            raise PruningError(
                f"{self._names}: a static cache has one length for all layers; use the default dynamic cache"
            )
