"""Which placeholders of a prompt are which image's, and which of them are left once the images are encoded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from vtp_plugin.errors import PruningError
from vtp_plugin.signals import reads_question
from vtp_plugin.stages import Stage
from vtp_plugin.surgery.batching import at_once, moved
from vtp_plugin.surgery.call import Call, Image
from vtp_plugin.surgery.columns import Columns, Rows, slots
from vtp_plugin.surgery.question import question_of
from vtp_plugin.tokens import last_true

if TYPE_CHECKING:
    from vtp_plugin.surgery.session import Session


class PlaceholderModel(Protocol):
    """What an adapter tells about its family; one with several axes of positions has `axes` and `following`, too."""

    model: nn.Module
    core: nn.Module  # the backbone, which the model calls
    image_token: int  # the placeholder of an image that names no other

    def has_images(self, inputs: Mapping[str, Any]) -> bool:
        """Whether pixels come with these arguments."""

    def sizes(self, inputs: Mapping[str, Any]) -> dict[str, Tensor]:
        """Whole numbers that tell how many tokens images make, by argument: read together with the prompt."""

    def images(self, inputs: Mapping[str, Any]) -> list[Image]:
        """The images of a call, in the order of their placeholders; `total` placeholders each.

        Here and in `encode`, ids and `sizes` are those on the host.
        """

    def encode(self, call: Call, inputs: Mapping[str, Any]) -> tuple[Any, list[Rows]]:
        """Run the tower; the host's features object with the kept rows, and which rows every image has."""

    def serving(self, features: Any) -> AbstractContextManager[None]:
        """While open, the model answers with these features instead of running its tower."""

    def decode(self, ids: Tensor) -> str:
        """The text of prompt ids."""


@dataclass(frozen=True)
class Read:
    """A prompt on the host: read once per call."""

    ids: Tensor  # [B, L]
    real: Tensor  # [B, L] bool
    sizes: Mapping[str, Tensor]  # of its images, by argument

    @classmethod
    def of(cls, ids: Tensor, real: Tensor, sizes: Mapping[str, Tensor]) -> Read:
        """One copy, one wait."""
        parts = [ids, real, *(size.to(ids.device) for size in sizes.values())]
        flat = torch.cat([part.long().flatten() for part in parts]).cpu().split([part.numel() for part in parts])
        ids, real, *read = (one.view(part.shape) for one, part in zip(flat, parts, strict=True))
        return cls(ids, real.bool(), dict(zip(sizes, read, strict=True)))

    @property
    def lengths(self) -> list[int]:
        """Real columns of every row."""
        return self.real.sum(1).tolist()

    @property
    def ends(self) -> list[int]:
        """The last real column of every row."""
        return last_true(self.real).tolist()

    @cached_property
    def full(self) -> bool:
        """Whether there is no padding."""
        return bool(self.real.all())

    @property
    def tail(self) -> int:
        """The last columns that are real in every row."""
        return self.real.shape[1] if self.full else int(self.real.all(0).flip(0).cumprod(0).sum())


class Prompt:
    """Decides what is left of a prompt; the arguments stay as they are."""

    def __init__(self, pruned: Session, family: PlaceholderModel) -> None:
        self.pruned, self.family = pruned, family

    def real(self, inputs: Mapping[str, Any]) -> Tensor:
        """Which columns of the caller's prompt are no padding, [B, L] bool."""
        ids, mask = inputs["input_ids"], inputs.get("attention_mask")
        if isinstance(mask, Mapping):
            mask = next(iter(mask.values()))
        if mask is None:
            return torch.ones_like(ids, dtype=torch.bool)
        if mask.ndim == 2:
            return mask.bool()
        seen = mask if mask.dtype is torch.bool else mask == 0
        later = seen.any(1).tril(-1).any(1)  # [B, L]: padding is seen by nobody behind it
        later[:, -1] = seen[:, :, -1, -1].any(1)
        return later.expand(ids.shape)

    def shortened(self, call: Call, inputs: Mapping[str, Any]) -> tuple[Columns | None, Any]:
        """Encode the images; the columns that are left (None: all of them) and the features to serve."""
        ids, real = inputs["input_ids"], self.real(inputs)
        read = Read.of(ids, real, self.family.sizes(inputs))
        inputs = {**inputs, **read.sizes, "input_ids": read.ids}
        call.images = self.family.images(inputs)
        places = self._placeholders(call, read.ids)
        self._read_questions(call, read)
        features, left = self.family.encode(call, inputs)
        left = [rows.to(ids.device) for rows in left]
        if all(len(rows.source) == image.total for image, rows in zip(call.images, left, strict=True)):
            judged = Rows.every_judged(left, moved(places, ids.device))
            call.place(real, judged, [image.sample for image in call.images], read.lengths)
            columns = None
        else:
            columns = self._shorter(call, read, real, places, left)
        if any(strategy.stage is Stage.LLM for strategy in self.pruned.strategies):
            _spare(call.images, read.ends, places, left)
        return columns, features

    def _shorter(self, call: Call, read: Read, mask: Tensor, places: Sequence[Tensor], left: Sequence[Rows]) -> Columns:
        """The prompt with `left` of its images, which are at the columns `places` [n] (on the host); tells the call.

        Every token has its own position. Images that are alike are put in their places together.
        """
        length, counts, totals = read.ids.shape[1], list(read.lengths), [len(place) for place in places]
        for image, rows in zip(call.images, left, strict=True):
            counts[image.sample] -= image.total - len(rows.source)
        flat = torch.cat([place + image.sample * length for image, place in zip(call.images, places, strict=True)])
        if not read.full and not (real := read.real.view(-1)[flat]).all():
            kind = next(image.kind for image, own in zip(call.images, real.split(totals), strict=True) if not own.all())
            raise PruningError(f"a placeholder of one {kind} is padding, as the attention mask says")
        tail = min(read.tail, length - 1 - max(int(place[-1]) for place in places if len(place)))
        (flat,) = moved([flat], mask.device)
        held, own = _places_of(left, flat.split(totals))
        wanted = mask.clone()
        wanted.view(-1).index_fill_(0, flat, False).index_fill_(0, held, True)
        shortened = Columns.of(wanted, counts, left=read.full or bool(read.real[:, -1].all()), tail=tail)
        place = shortened.places(wanted).view(-1)[held]
        if held is not own:
            origin = shortened.columns.clone()
            origin.view(-1).index_copy_(0, place + held // length * shortened.short, own % length)
            shortened = replace(shortened, origin=origin)
        judged = Rows.every_judged(left, place.split([len(rows.source) for rows in left]))
        call.place(shortened.valid, judged, [image.sample for image in call.images], counts)
        return shortened

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
        ends = list(accumulate(wanted))
        starts = [end - count for end, count in zip(ends, wanted, strict=True)]
        found = rows[starts + [end - 1 for end in ends]].tolist()
        if found[: len(images)] != found[len(images) :]:
            raise PruningError(f"the placeholders of one {kind} lie in two prompts of the batch")
        for image, row in zip(images, found, strict=False):
            image.sample = row
        return columns.split(wanted)

    def _read_questions(self, call: Call, read: Read) -> None:
        if not reads_question(self.pruned.strategies):
            return
        tokens = [self.family.image_token, *(image.token for image in call.images if image.token is not None)]
        text = read.real & ~torch.isin(read.ids, torch.tensor(tokens))
        questions = [question_of(self.family.decode(row[mask])) for row, mask in zip(read.ids, text, strict=True)]
        for image in call.images:
            image.question = questions[image.sample]


def _places_of(left: Sequence[Rows], placeholders: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Of all images, the placeholders that hold what is left, and those whose places in the prompt this has, [n]."""
    sources = [rows.source for rows in left]
    own = torch.cat(at_once(lambda at, source: at.gather(1, source.clamp(min=0)), placeholders, sources))
    if all(rows.ordered for rows in left):
        return own, own
    return torch.cat(at_once(lambda at, source: at.gather(1, slots(source, at.shape[1])), placeholders, sources)), own


def _spare(images: Sequence[Image], ends: Sequence[int], places: Sequence[Tensor], left: Sequence[Rows]) -> None:
    """Let no decoder layer judge the last token of a prompt that ends with an image: it says what comes next."""
    for image, place, rows in zip(images, places, left, strict=True):
        if not rows.fixed and len(image.columns) and int(place[-1]) == ends[image.sample]:  # else a newline is the last
            image.entered, image.fixed = len(image.columns), 1
            image.columns, image.index = image.columns[:-1], image.index[:-1]


def padding(model: nn.Module) -> int:
    """An id for padding that is no placeholder."""
    configs = (getattr(model, "generation_config", None), model.config.get_text_config())
    found = [config.pad_token_id for config in configs if getattr(config, "pad_token_id", None) is not None]
    return found[0] if found else 0
