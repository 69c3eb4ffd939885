"""Which placeholders of a prompt are which image's, and which of them are left once the images are encoded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from vtp_plugin.errors import PruningError
from vtp_plugin.surgery.call import Call, Image
from vtp_plugin.surgery.columns import Columns, Rows
from vtp_plugin.surgery.question import question_of

if TYPE_CHECKING:
    from vtp_plugin.surgery.session import Session


class PlaceholderModel(Protocol):
    """What an adapter tells about its family; one with several axes of positions has `axes` and `following`, too."""

    model: nn.Module
    core: nn.Module  # the backbone, which the model calls
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
        shortened = Columns.of(keep, real, left=bool(real[:, -1].all()))
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

    def _place(self, call: Call, shortened: Columns, columns: Sequence[Tensor], left: Sequence[Rows]) -> Columns:
        """Tell the call where the images are in the shorter prompt; the prompt with every token's own position."""
        origin, places = shortened.columns.clone(), []
        for image, where, rows in zip(call.images, columns, left, strict=True):
            place = torch.isin(shortened.columns[image.sample], where[rows.slots]).nonzero().flatten()
            origin[image.sample, place] = where[rows.source.clamp(min=0)]
            places.append(place[rows.judged])
        call.place(shortened.valid, places, [image.sample for image in call.images])
        return replace(shortened, origin=origin)


def padding(model: nn.Module) -> int:
    """An id for padding that is no placeholder."""
    configs = (getattr(model, "generation_config", None), model.config.get_text_config())
    found = [config.pad_token_id for config in configs if getattr(config, "pad_token_id", None) is not None]
    return found[0] if found else 0
