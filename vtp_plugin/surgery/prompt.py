"""Prompts that hold one placeholder id per visual token, as in transformers: made shorter, and taken back.

Around the host's `generate` nothing changes: its loop, its criteria, processors and streamers see the caller's whole
prompt. Every pass is translated: ids, masks and positions to the columns that are left, with the kept features in
place of the full ones, and what comes out back to the caller's columns. A decoding loop of the caller's own is the
same to us.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional

from vtp_plugin.errors import PruningError
from vtp_plugin.stages import Stage
from vtp_plugin.surgery import answers, asking, cache, losses, masks, spoken, turns
from vtp_plugin.surgery.binding import bound, signature_of
from vtp_plugin.surgery.call import Call
from vtp_plugin.surgery.columns import Columns
from vtp_plugin.surgery.owning import unwrapped
from vtp_plugin.surgery.placeholders import PlaceholderModel, Prompt, padding
from vtp_plugin.surgery.turns import Turn
from vtp_plugin.surgery.undo import Undo

if TYPE_CHECKING:
    from vtp_plugin.surgery.session import Session

PER_TOKEN = ("token_type_ids", "mm_token_type_ids", "moe_mm_token_type_ids")  # arguments that follow ids, padded with 0
TRANSLATED = ("input_ids", "attention_mask", "position_ids", *PER_TOKEN, *losses.LABELS)


class PlaceholderCalls:
    """Wraps `generate` and `forward` of one model instance."""

    def __init__(self, pruned: Session, family: PlaceholderModel) -> None:
        self.pruned, self.family, self.model = pruned, family, family.model
        self.prompt = Prompt(pruned, family)

    def install(self, undo: Undo) -> None:
        self.generate = undo.override(self.model, "generate", self._wrapped("generate", self._generate))
        self.forward = undo.override(self.model, "forward", self._wrapped("forward", self._forward, self._pass))
        self.backbone = undo.override(self.family.core, "forward", self._wrapped("backbone", self._backbone))

    def _wrapped(self, name: str, top: Callable, within: Callable | None = None) -> Callable:
        """`top` for a call of this thread's own, `within` for a pass inside of one."""

        @torch.compiler.disable
        def alone(args: Any, kwargs: Any) -> Any:
            with self.pruned.alone():
                return top(bound(getattr(self, name), args, kwargs))

        def wrapper(*args: Any, **kwargs: Any) -> Any:
            call = self.pruned.call
            if call is None or name == "generate":
                asking.refuse_export(self.pruned)
                return alone(args, kwargs)
            return getattr(self, name)(*args, **kwargs) if within is None else within(call, args, kwargs)

        return wrapper

    # -- entry points -----------------------------------------------------------------------------------------------

    def _generate(self, inputs: dict[str, Any]) -> Any:
        if inputs.get("input_ids") is None and inputs.get("inputs") is not None:
            inputs["input_ids"] = inputs.pop("inputs")
        ids, images = inputs.get("input_ids"), self.family.has_images(inputs)
        filled = turns.recall(inputs)
        asking.check(self.pruned, inputs, images and filled is None, generating=True)
        if filled is not None:
            asking.refuse_fixed_cache(cache.given(inputs))
        with self.pruned.calling() as call, torch.no_grad(), spoken.generating(), masks.translated(self.model, call):
            call.rows = 1 if ids is None else len(ids)
            if not images or filled is not None:
                return self.generate(**inputs)
            inputs |= masks.assumed(self.model, inputs)
            given = {name: value for name, value in inputs.items() if not name.startswith("output_")}
            features = self._turn(call, self._beside(given))
            with self.family.serving(features), self._assisting(inputs):
                return self.generate(**inputs)

    def _beside(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """The arguments with what has a value per column next to the model: the host takes it there pass by pass."""
        device = self.model.device
        if device.type == "meta" or inputs["input_ids"].device == device:
            return inputs
        moving = [name for name in TRANSLATED if isinstance(inputs.get(name), Tensor)]
        return inputs | {name: inputs[name].to(device) for name in moving}

    @contextmanager
    def _assisting(self, inputs: Mapping[str, Any]) -> Iterator[None]:
        """While open, an assistant gets the caller's pixels, not the features that are left of them."""
        known = set(signature_of(self.forward).parameters) - {*TRANSLATED, *cache.NAMES}

        def candidates(*args: Any, model_kwargs: dict[str, Any], **kwargs: Any) -> Any:
            given = {k: v for k, v in model_kwargs.items() if k != "mm_encoder_outputs"}
            assistant = kwargs.get("assistant_model")
            taken = (
                known if assistant is None else known & set(inspect.signature(unwrapped(assistant).forward).parameters)
            )
            return original(*args, model_kwargs={k: inputs[k] for k in taken & inputs.keys()} | given, **kwargs)

        with Undo() as undo:
            original = undo.override(self.model, "_get_candidate_generator", candidates)
            yield

    def _forward(self, inputs: dict[str, Any]) -> Any:
        turn = turns.recall(inputs)
        if turn is not None:
            return self._continued(turn, inputs)
        turns.forget(cache.given(inputs))
        images = self.family.has_images(inputs)
        asking.check(self.pruned, inputs, images, generating=False)
        with self.pruned.calling() as call:
            if not images:
                return self.forward(**inputs)
            features = self._turn(call, inputs)
            with self.family.serving(features):
                return self._whole(call, inputs)

    def _backbone(self, inputs: dict[str, Any]) -> Any:
        if self.pruned.strategies and self.family.has_images(inputs):
            raise PruningError(
                "the backbone was called directly, where nothing is pruned: call the model itself, which answers with "
                "hidden states, too (output_hidden_states=True)"
            )
        return self.backbone(**inputs)

    def _pass(self, call: Call, args: Any, kwargs: dict[str, Any]) -> Any:
        """One pass inside of a `generate`: over its prompt, behind it, or of a prompt of somebody else's."""
        if torch.compiler.is_compiling():
            return self.forward(*args, **self._compiled(call.turn, kwargs))
        inputs, turn = bound(self.forward, args, kwargs), call.turn
        known = turns.recall(inputs)
        if turn is not None and known is turn:
            fixed = getattr(cache.given(inputs), "is_compileable", False)
            return self._behind(call, turn, inputs, made=fixed)
        ids, empty = inputs.get("input_ids"), not turns.stored_length(cache.given(inputs))
        if turn is not None and ids is not None and empty and turn.begins(ids, inputs.get("position_ids")):
            return self._whole(call, inputs)
        if turn is None and known is None:
            return self.forward(**inputs)
        with self.pruned.aside():  # guidance without the image, an assistant, a second turn
            return self._forward(inputs) if known or self.family.has_images(inputs) else self.forward(**inputs)

    # -- a prompt -----------------------------------------------------------------------------------------------------

    def _turn(self, call: Call, inputs: dict[str, Any]) -> Any:
        """Encode the images and decide what is left of the prompt: `call.turn`; the features to serve."""
        columns, features = self.prompt.shortened(call, inputs)
        ids, real = inputs["input_ids"], self.prompt.real(inputs)
        numbering = self.pruned.positions.prompt if columns is not None else None
        untouched = columns is None
        if untouched:
            columns = Columns.whole(len(ids), ids.shape[1], ids.device)
        if not untouched or any(s.stage is Stage.LLM for s in self.pruned.strategies):
            first = self.family.first_position
            call.turn = Turn(self.pruned.number, ids, real, columns, numbering, first, untouched)
        return features

    def _whole(self, call: Call, inputs: dict[str, Any]) -> Any:
        """A pass over the whole prompt, and perhaps what was generated behind it."""
        turn, named = call.turn, inputs.pop("return_dict", None)
        if turn is None:
            return self._answered(self.forward(**inputs, return_dict=True), named)
        rows, length = inputs["input_ids"].shape
        left = turn.columns.repeated(rows).followed(length - turn.length)
        wanted = answers.Wanted(inputs.get("logits_to_keep", 0), length, turn.ends(rows))
        labelled = any(inputs.get(name) is not None for name in losses.LABELS)
        self._shorten(turn, inputs, left)
        call.positions = None if hasattr(self.family, "axes") else turn.table()
        if "logits_to_keep" in inputs and not wanted.every:
            inputs["logits_to_keep"] = wanted.window(left)
        translate = _labelled(call, left, wanted)
        with (
            spoken.inside(),
            losses.translated(self.model, labelled, translate),
        ):
            output = self.forward(**inputs, return_dict=True)
        self._remember(call, turn, output)
        if not turn.untouched or call.cuts or wanted.positions:
            output.logits = wanted.of(output.logits, answers.seen(call, left))
            answers.put_back(output, call, left, left.short)
        return self._answered(output, named)

    def _shorten(self, turn: Turn, inputs: dict[str, Any], left: Columns) -> None:
        """Every argument with one entry per column of the prompt, for what is left of it."""
        ids, mask = inputs["input_ids"], inputs.get("attention_mask")
        positions = inputs.get("position_ids")
        if hasattr(self.family, "axes") and not turn.untouched:
            if positions is None:
                positions = self.family.axes(inputs, turn.ids, turn.real)
            elif positions.ndim == 2:  # the host takes them for every axis
                positions = positions.expand(3, -1, -1)
        positions = turn.shortened(positions, ids.shape[1] - turn.length)
        if turn.untouched:
            return
        inputs["input_ids"] = left.take(ids, padding(self.model))
        if mask is not None:
            inputs["attention_mask"] = left.mask(mask, left.short)
        elif not left.full:
            inputs["attention_mask"] = left.valid.long()
        if positions is not None:
            inputs["position_ids"] = positions
        known = signature_of(self.forward).parameters
        for name, value in inputs.items():
            if name in PER_TOKEN and isinstance(value, Tensor):  # a host tells it of the prompt only, not of candidates
                value = functional.pad(value.to(ids.device), (0, ids.shape[1] - value.shape[1]))
            if not isinstance(value, Tensor) or value.shape[:2] != ids.shape:
                continue
            if name in PER_TOKEN or (name not in known and name not in TRANSLATED):
                inputs[name] = left.take(value, 0)

    def _remember(self, call: Call, turn: Turn, output: Any) -> None:
        names = ("images", "valid", "cuts", "positions")
        turn.facts = {name: getattr(call, name) for name in names}
        turn.carried = {name: getattr(self.family.core, name) for name in getattr(self.family, "carried", ())}
        turns.remember(cache.of_output(output), turn)

    # -- behind a prompt ----------------------------------------------------------------------------------------------

    def _continued(self, turn: Turn, inputs: dict[str, Any]) -> Any:
        """A pass of the caller's own over a cache that holds a pruned prompt."""
        if turn.owner != self.pruned.number:
            raise PruningError(turns.OTHERWISE)
        asking.refuse_images_behind(self.family, inputs)
        for name, value in turn.carried.items():
            setattr(self.family.core, name, value)
        given = inputs.get("input_ids") if inputs.get("input_ids") is not None else inputs["inputs_embeds"]
        with self.pruned.going_on(turn.call(len(given))) as call:
            return self._behind(call, turn, inputs)

    def _behind(self, call: Call, turn: Turn, inputs: dict[str, Any], *, made: bool = False) -> Any:
        """A pass over new tokens behind a pruned prompt; `made`: its mask is over what is left already."""
        asking.refuse_images_behind(self.family, inputs)
        named, stored = inputs.pop("return_dict", None), turns.stored_length(cache.given(inputs))
        given = inputs.get("input_ids") if inputs.get("input_ids") is not None else inputs["inputs_embeds"]
        rows, queries = given.shape[:2]
        left = turn.behind(rows, queries, stored)
        mask = inputs.get("attention_mask")
        if mask is not None:
            inputs["attention_mask"] = mask if made else left.mask(mask, queries)
        elif not left.full:
            inputs["attention_mask"] = left.valid.long()
        inputs |= {name: inputs[name][:, -queries:] for name in PER_TOKEN if inputs.get(name) is not None}
        if hasattr(self.family, "axes") and inputs.get("position_ids") is None:
            known = isinstance(mask, Tensor) and mask.ndim == 2
            real = mask if known else torch.ones(1, left.length, device=given.device)
            inputs["position_ids"] = self.family.following(real.long().cumsum(1) - 1)
        if inputs.get("position_ids") is not None:
            inputs["position_ids"] = turn.moved(inputs["position_ids"][..., -queries:])
        with spoken.inside():
            output = self.forward(**inputs, return_dict=True)
        answers.put_back(output, call, left, queries)
        return self._answered(output, named)

    def _compiled(self, turn: Turn, kwargs: dict[str, Any]) -> dict[str, Any]:
        """The arguments of a compiled decoding step, whose masks are made for what is left already."""
        if turn is None or kwargs.get("position_ids") is None:
            return kwargs
        return {**kwargs, "position_ids": turn.moved(kwargs["position_ids"])}

    def _answered(self, output: Any, named: bool | None) -> Any:
        """The output as an object with names, unless the caller or the model's configuration wants a tuple."""
        named = getattr(self.model.config, "return_dict", True) if named is None else named
        return output if named else output.to_tuple()


def _labelled(call: Call, left: Columns, wanted: answers.Wanted) -> Callable[..., tuple[Tensor, dict[str, Any]]]:
    """What the host's loss is asked about."""

    def translate(logits: Tensor, arguments: dict[str, Any]) -> tuple[Tensor, dict[str, Any]]:
        at = answers.seen(call, left)
        if not wanted.positions:
            return logits, losses.narrowed(arguments, at, wanted.first, logits.shape[1])
        there = at.valid[:, -logits.shape[1] :, None].to(logits)
        return wanted.of(logits, at), losses.predicted(arguments, wanted.of(there, at)[..., 0] > 0)

    return translate
