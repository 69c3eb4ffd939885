"""Prompts that hold one placeholder id per visual token, as in transformers: made shorter, and taken back.

The prompt is rewritten to the number of tokens that are left, the kept features are served in place of the full ones,
and the host's own `generate` or `forward` runs. All lengths of the host agree (ids = mask = KV cache), so nothing is
patched while decoding. The caller gets the original prompt ids back.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from copy import copy
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from vtp_plugin.errors import PruningError
from vtp_plugin.surgery import cache
from vtp_plugin.surgery.call import Call, Image
from vtp_plugin.surgery.decoder import IGNORED, narrowed_labels, refuse_cropping, refuse_filled_cache
from vtp_plugin.surgery.positions import lookup
from vtp_plugin.surgery.question import question_of
from vtp_plugin.surgery.undo import Undo

if TYPE_CHECKING:
    from vtp_plugin.surgery.session import Session

PER_TOKEN = {
    "token_type_ids": 0,
    "mm_token_type_ids": 0,
    "labels": IGNORED,
}  # arguments that follow ids, and their padding


class PlaceholderModel(Protocol):
    """What an adapter tells about its family."""

    model: nn.Module
    image_token: int  # the placeholder of an image that names no other

    def has_images(self, inputs: Mapping[str, Any]) -> bool:
        """Whether pixels come with these arguments."""

    def images(self, inputs: Mapping[str, Any]) -> list[Image]:
        """The images of a call, in the order of their placeholders; `total` placeholders each."""

    def encode(self, call: Call, inputs: Mapping[str, Any]) -> tuple[Any, list[Rows]]:
        """Run the tower; the host's features object with the kept rows, and which rows every image has."""

    def serving(self, features: Any) -> AbstractContextManager[None]:
        """While open, the model answers with these features instead of running its tower."""

    def decode(self, ids: Tensor) -> str:
        """The text of prompt ids."""


@dataclass(frozen=True)
class Rows:
    """Which of an image's feature rows are left, in the order in which they are served."""

    source: Tensor  # [K] long: number of the row among those that the host makes, -1 for a row that is none of them
    judged: Tensor  # [K] bool: False for a row that no strategy may drop (a newline)

    @property
    def slots(self) -> Tensor:
        """The placeholders that hold the rows, [K] ascending: their own, and the first free ones for the others."""
        own = self.source[self.source >= 0].unique()
        spare = torch.arange(len(self.source) + len(own), device=own.device)
        spare = spare[~torch.isin(spare, own)][: len(self.source) - len(own)]
        return torch.cat([own, spare]).sort().values

    def to(self, device: torch.device) -> Rows:
        """The same next to the prompt, which may live on another device than the tower."""
        return Rows(self.source.to(device), self.judged.to(device))


@dataclass(frozen=True)
class Shortened:
    """A prompt without the placeholders of dropped tokens."""

    columns: Tensor  # [B, L'] long: column of the original prompt, -1 for padding
    origin: Tensor | None = None  # [B, L'] long: the column whose position a token has, where it is not its own

    @classmethod
    def of(cls, keep: Tensor, real: Tensor, left: bool) -> Shortened:
        """Keep columns [B, L] that are wanted and real, padded on the given side to the longest row."""
        rows = [row.nonzero().flatten() for row in keep & real]
        columns = keep.new_full((len(rows), max(map(len, rows))), -1, dtype=torch.long)
        for target, row in zip(columns, rows, strict=True):
            target[len(target) - len(row) :] = row if left else target[len(target) - len(row) :]
            target[: len(row)] = target[: len(row)] if left else row
        return cls(columns)

    @property
    def valid(self) -> Tensor:
        """[B, L'] bool: no padding."""
        return self.columns >= 0

    def take(self, tensor: Tensor, padding: Any) -> Tensor:
        """The columns of [B, L], with `padding` where there is none."""
        return torch.where(self.valid, tensor.gather(1, self.columns.clamp(min=0)), padding)

    def put(self, short: Tensor, length: int) -> Tensor:
        """[B, L', V] back at its original columns, [B, L, V]; zero where a token was dropped."""
        full = short.new_zeros(len(short), length, short.shape[-1])
        row, column = self.valid.nonzero(as_tuple=True)
        full[row, self.columns[row, column]] = short[row, column]
        return full


class PlaceholderCalls:
    """Wraps `generate` and `forward` of one model instance."""

    def __init__(self, pruned: Session, family: PlaceholderModel) -> None:
        self.pruned, self.family, self.model = pruned, family, family.model

    def install(self, undo: Undo) -> None:
        self.generate = undo.override(self.model, "generate", self._wrapped(self.model.generate, self._generate))
        self.forward = undo.override(self.model, "forward", self._wrapped(self.model.forward, self._forward))

    def _wrapped(self, original: Callable, replacement: Callable) -> Callable:
        """The replacement under the original's signature; calls inside a call pass through."""
        signature = inspect.signature(original)
        rest = [p.name for p in signature.parameters.values() if p.kind is p.VAR_KEYWORD]

        def wrapper(*args: Any, **kwargs: Any) -> Any:
            if self.pruned.call is not None:
                return original(*args, **kwargs)
            bound = dict(signature.bind(*args, **kwargs).arguments)
            return replacement(bound | {k: v for name in rest for k, v in bound.pop(name, {}).items()})

        return wrapper

    def _generate(self, inputs: dict[str, Any]) -> Any:
        if inputs.get("input_ids") is None:
            inputs["input_ids"] = inputs.pop("inputs", None)
        ids = inputs["input_ids"]
        self._check(inputs, generating=True)
        real = _real(inputs)
        with self.pruned.calling() as call, torch.no_grad():
            call.rows = 1 if ids is None else len(ids)
            shortened, features = self._prepare(call, inputs)
            if shortened is not None:
                _shift_lengths(inputs, ids.shape[1] - shortened.columns.shape[1])
            with self.family.serving(features), self._positions(call, shortened, ids, real, by_column=False):
                output = self.generate(**inputs)
        return output if shortened is None else _with_prompt(output, ids, shortened.columns.shape[1])

    def _forward(self, inputs: dict[str, Any]) -> Any:
        ids = inputs.get("input_ids")
        self._check(inputs, generating=False)
        real = _real(inputs)
        with self.pruned.calling() as call:
            shortened, features = self._prepare(call, inputs)
            labels, named = inputs.pop("labels", None), inputs.pop("return_dict", None)
            with self.family.serving(features), self._positions(call, shortened, ids, real, by_column=True):
                output = self.forward(**inputs, return_dict=True)
        output = self._expanded(output, call, shortened, labels, ids, inputs.get("logits_to_keep", 0))
        return output.to_tuple() if named is False else output

    def _check(self, inputs: Mapping[str, Any], *, generating: bool) -> None:
        if not self.family.has_images(inputs):
            return
        if inputs.get("input_ids") is None:
            raise PruningError("pruning needs input_ids: prompts given as inputs_embeds cannot be shortened")
        refuse_filled_cache(cache.given(inputs))
        if generating:
            refuse_cropping(self.pruned.strategies, inputs)

    def _prepare(self, call: Call, inputs: dict[str, Any]) -> tuple[Shortened | None, Any]:
        """Encode the images and shorten `inputs` in place; None if the prompt stays as it is."""
        ids = inputs.get("input_ids")
        if ids is None or not self.family.has_images(inputs):
            return None, None
        real = _real(inputs)
        call.images = self.family.images(inputs)
        columns = self._placeholders(call, ids)
        self._read_questions(call, ids, real)
        features, left = self.family.encode(call, inputs)
        left = [rows.to(ids.device) for rows in left]
        keep = torch.ones_like(real)
        for image, where, rows in zip(call.images, columns, left, strict=True):
            keep[image.sample, where] = False
            keep[image.sample, where[rows.slots]] = True
        if keep.all():
            judged = [where[rows.judged] for where, rows in zip(columns, left, strict=True)]
            call.place(real, judged, [image.sample for image in call.images])
            return None, features
        shortened = Shortened.of(keep, real, left=bool(real[:, -1].all()))
        self._rewrite(inputs, shortened)
        return self._place(call, shortened, columns, left), features

    def _placeholders(self, call: Call, ids: Tensor) -> list[Tensor]:
        """The columns of every image; sets its sample. The placeholders of a kind are handed out in order."""
        found: dict[int, Tensor] = {}
        for kind in dict.fromkeys(image.kind for image in call.images):
            numbers = [n for n, image in enumerate(call.images) if image.kind == kind]
            found |= zip(numbers, self._handed_out(kind, [call.images[n] for n in numbers], ids), strict=True)
        return [found[number] for number in range(len(call.images))]

    def _handed_out(self, kind: str, images: Sequence[Image], ids: Tensor) -> Sequence[Tensor]:
        token = self.family.image_token if images[0].token is None else images[0].token
        rows, columns = (ids == token).nonzero(as_tuple=True)
        wanted = [image.total for image in images]
        if sum(wanted) != len(rows):
            raise PruningError(f"the prompt has {len(rows)} {kind} placeholders, its {kind}s make {sum(wanted)} tokens")
        for image, row in zip(images, rows.split(wanted), strict=True):
            if len(row) and (row != row[0]).any():
                raise PruningError(f"the placeholders of one {kind} lie in two prompts of the batch")
            image.sample = int(row[0])
        return columns.split(wanted)

    def _read_questions(self, call: Call, ids: Tensor, real: Tensor) -> None:
        if not any("text" in s.needs for s in self.pruned.strategies):
            return
        tokens = [self.family.image_token, *(image.token for image in call.images if image.token is not None)]
        text = real & ~torch.isin(ids, torch.tensor(tokens, device=ids.device))
        questions = [question_of(self.family.decode(row[mask])) for row, mask in zip(ids, text, strict=True)]
        for image in call.images:
            image.question = questions[image.sample]

    def _rewrite(self, inputs: dict[str, Any], shortened: Shortened) -> None:
        """Every argument with one entry per prompt column, for the shorter prompt."""
        ids = inputs["input_ids"]
        if inputs.get("position_ids") is not None:
            raise PruningError("pruning cannot shorten a prompt that comes with its own position_ids")
        inputs["input_ids"] = shortened.take(ids, _padding(self.model))
        if inputs.get("attention_mask") is not None or not shortened.valid.all():
            dtype = torch.long if inputs.get("attention_mask") is None else inputs["attention_mask"].dtype
            inputs["attention_mask"] = shortened.valid.to(dtype)
        for name, padding in PER_TOKEN.items():
            if inputs.get(name) is not None:
                inputs[name] = shortened.take(inputs[name], padding)

    def _place(self, call: Call, shortened: Shortened, columns: Sequence[Tensor], left: Sequence[Rows]) -> Shortened:
        """Tell the call where the images are in the shorter prompt; the prompt with every token's own position."""
        origin, places = shortened.columns.clone(), []
        for image, where, rows in zip(call.images, columns, left, strict=True):
            place = torch.isin(shortened.columns[image.sample], where[rows.slots]).nonzero().flatten()
            origin[image.sample, place] = where[rows.source.clamp(min=0)]
            places.append(place[rows.judged])
        call.place(shortened.valid, places, [image.sample for image in call.images])
        return replace(shortened, origin=origin)

    def _positions(
        self, call: Call, shortened: Shortened | None, ids: Tensor, real: Tensor, *, by_column: bool
    ) -> AbstractContextManager[None]:
        """While open, the model computes positions as they were chosen for a shortened prompt.

        `by_column`: the host counts the columns of a plain forward, padding included.
        """
        if shortened is None:
            return nullcontext()
        choice, family = self.pruned.positions.prompt, getattr(self.family, "positions", None)
        if family is not None:
            return family(shortened, ids, real, compact=choice == "compact")
        if choice == "original":
            columns = torch.ones_like(real) if by_column else real
            kept = torch.ones_like(shortened.valid) if by_column else shortened.valid
            ranks = (columns.cumsum(1) - 1).gather(1, shortened.origin.clamp(min=0))
            call.positions = lookup(ranks, kept, columns.sum(1))
        return nullcontext()

    def _expanded(
        self, output: Any, call: Call, shortened: Shortened | None, labels: Tensor | None, ids: Tensor, kept: Any
    ) -> Any:
        """The output with logits for every column of the caller's prompt, and the loss over those that are left."""
        seen = shortened
        if call.cuts:
            cut = call.cuts[max(call.cuts)].to(ids.device)
            before = shortened.columns if shortened is not None else torch.arange(ids.shape[1], device=ids.device)
            seen = Shortened(torch.where(cut.valid, before.expand(len(ids), -1).gather(1, cut.columns), -1))
        if labels is not None:
            vocabulary = self.model.config.get_text_config().vocab_size
            output.loss = self.model.loss_function(output.logits, narrowed_labels(call, labels), vocabulary)
        if seen is not None and isinstance(kept, int) and kept == 0:
            output.logits = seen.put(output.logits, ids.shape[1])
        return output


def _real(inputs: Mapping[str, Any]) -> Tensor | None:
    """Which columns of the caller's prompt are no padding, [B, L] bool."""
    ids, mask = inputs.get("input_ids"), inputs.get("attention_mask")
    if ids is None:
        return None
    return torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()


def _with_prompt(output: Any, ids: Tensor, length: int) -> Any:
    """Generated sequences behind the caller's prompt instead of the shortened one."""
    sequences = output if isinstance(output, Tensor) else output.sequences
    prompt = ids.repeat_interleave(len(sequences) // len(ids), dim=0)
    sequences = torch.cat([prompt, sequences[:, length:]], dim=1)
    if isinstance(output, Tensor):
        return sequences
    output.sequences = sequences
    return output


def _shift_lengths(inputs: dict[str, Any], dropped: int) -> None:
    """Limits on the total length were meant for the caller's prompt."""
    config = inputs.get("generation_config")
    for name in ("max_length", "min_length"):
        if isinstance(inputs.get(name), int):
            inputs[name] -= dropped
        elif getattr(config, name, None):
            config = copy(config)
            setattr(config, name, getattr(config, name) - dropped)
            inputs["generation_config"] = config


def _padding(model: nn.Module) -> int:
    """An id for padding that is no placeholder."""
    configs = (getattr(model, "generation_config", None), model.config.get_text_config())
    found = [config.pad_token_id for config in configs if getattr(config, "pad_token_id", None) is not None]
    return found[0] if found else 0
