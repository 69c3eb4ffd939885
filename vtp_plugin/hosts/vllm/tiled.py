"""Towers inside vLLM that see tiles of one size, of which squares of patches become tokens. No family itself.

A unit is such a square. Pixel strategies judge units of raw pixels, tile by tile, in the process that takes requests;
behind the tower all units of an image are judged together.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from vllm.model_executor.models.utils import StageMissingLayer
from vllm.multimodal.processing import PromptUpdateDetails
from vllm.transformers_utils.processor import cached_image_processor_from_config

from vtp_plugin.errors import PruningError
from vtp_plugin.hosts.vllm.plan import Plan
from vtp_plugin.hosts.vllm.processing import KEEP, CountsKept, Decides, theirs
from vtp_plugin.hosts.vllm.worker import Around, Parts, Served, ServedLate
from vtp_plugin.stages import Stage
from vtp_plugin.surgery.call import Call, Image
from vtp_plugin.surgery.layout import Layout
from vtp_plugin.surgery.tiles import TiledEarly, refuse_shared_number

ABSENT = {"text", "aligned", "film"}  # signals of towers that CLIP trained, and of videos


def checked(plan: Plan, models: str, absent: set[str]) -> Plan:
    """The plan for such a model; PruningError if it cannot be served."""
    for strategy in plan.strategies:
        if strategy.stage is Stage.PIXELS and strategy.merges:
            raise strategy.error(f"new patches have no place in the vision tower of {models}: use one that drops them")
        if strategy.stage is not Stage.PROJECTOR:
            refuse_shared_number(strategy)
        if missing := sorted(absent & set(strategy.needs)):
            raise strategy.error(f"{models} has no {', '.join(missing)} inside vLLM: use a strategy that reads neither")
    return plan


# -- the process that takes requests -----------------------------------------------------------------------------------


class CountsTiles(CountsKept):
    """Mixed into a family's processing info, whose `plan` has the units of one tile as its grid."""

    def get_supported_mm_limits(self) -> Mapping[str, int | None]:
        return {"image": None}

    def left(self, *tiles: int) -> int:
        """How many tokens an image has, of whose tiles the pixel strategies leave so many units."""
        rows, columns = self.plan.grid
        return self.plan.at((rows * len(tiles), columns)).count(*tiles)

    def get_num_image_tokens(self, **size: Any) -> int:
        tiles = super(CountsKept, self).get_num_image_tokens(**size) // self.plan.whole
        return self.left(*[self.plan.whole] * tiles)


class DecidesTiles(Decides):
    """Mixed into a family's multi-modal processor: shortens every run of placeholders that vLLM makes of an image."""

    number: str  # field of an image: how many tiles it has
    per_tile = False  # whether every tile is a run, and judged as an image of its own

    def _decisions(self, outputs: Any) -> Sequence[Tensor]:
        tiles = torch.stack(list(super()._decisions(outputs)))
        return tiles.split(outputs[self.number].tolist())

    def _get_prompt_updates(self, mm_items: Any, hf_processor_mm_kwargs: Any, out_mm_kwargs: Any) -> Sequence[Any]:
        updates = super(Decides, self)._get_prompt_updates(mm_items, theirs(hf_processor_mm_kwargs), out_mm_kwargs)
        images = [update for update in updates if update.modality == "image"]
        return [replace(update, replacement=partial(self._shorter, update, out_mm_kwargs)) for update in images]

    def _shorter(self, update: Any, fields: Any, number: int) -> PromptUpdateDetails:
        """What vLLM writes for an image, with a placeholder for every token that is kept."""
        whole, image = update.resolve(number).content, fields["image"][number]
        marked = whole.is_embed(whole.full)
        token = whole.full[int(marked.long().argmax())]
        tiles = int(image[self.number].data)
        units = image[KEEP].data.sum(1).tolist() if self.plan.decided else [self.plan.whole] * tiles
        runs = iter([[n] for n in units] if self.per_tile else [units])
        shorter: list[int] = []
        for place, (one, placeholder) in enumerate(zip(whole.full, marked.tolist(), strict=True)):
            if not placeholder:
                shorter.append(one)
            elif not place or not marked[place - 1]:
                shorter += [token] * self.info.left(*next(runs))
        return PromptUpdateDetails.select_token_id(shorter, token)


# -- the workers -------------------------------------------------------------------------------------------------------


class TiledParts(Parts):
    """A model whose tower sees tiles: where its parts are."""

    layout = Layout(TiledEarly, ServedLate)
    tiled = True
    packed = True

    @property
    def sides(self) -> tuple[int, int]:
        """Rows and columns of the units of a tile."""
        return self.tower.grid[0] // self.tower.block, self.tower.grid[1] // self.tower.block

    def images(self, inputs: Mapping[str, Any]) -> list[Image]:
        """[T, 3, H, W] each."""
        rows, columns = self.sides
        return [self._image(len(tiles), rows, columns, tiles.device) for tiles in inputs["pixel_values"]]

    def _image(self, tiles: int, rows: int, columns: int, device: torch.device) -> Image:
        total = tiles * rows * columns
        return Image(
            total=total,
            index=torch.arange(total, device=device),
            tiles=tiles,
            patches=total * self.tower.block**2,
            projectable=total,
            grid=(tiles * rows, columns),
        )

    def encode(self, call: Call, encode: Callable[..., Any], inputs: Mapping[str, list[Tensor]]) -> Iterable[Tensor]:
        """Encode and merge all tiles as vLLM does, then take rows out."""
        tiles = inputs["pixel_values"]
        call.tower.owners = [number for number, image in zip(call.batch, tiles, strict=True) for _ in image]
        call.tower.inputs = inputs
        return [rows for rows, _ in self.pruned.vision.rows(self.rows(encode, inputs))]

    @abstractmethod
    def rows(self, encode: Callable[..., Any], inputs: Mapping[str, list[Tensor]]) -> Sequence[Tensor]:
        """What vLLM makes of the tiles of images [T, 3, H, W], per image [T n, D]."""

    def by_image(self, rows: Tensor, inputs: Mapping[str, Any]) -> Sequence[Tensor]:
        """Rows of all tiles [T, n, C] -> [tiles n, C] per image."""
        return rows.flatten(0, 1).split([len(tiles) * rows.shape[1] for tiles in inputs["pixel_values"]])


class AroundTiles(Around):
    """Mixed into a model class of vLLM: attaches the strategies, and serves what they leave."""

    parts: type[TiledParts]
    number: str  # field of an image: how many tiles it has
    values = "pixel_values"  # field of an image: its tiles
    tower = "vision_tower"  # attribute of the model
    per_tile = False  # whether every tile is an image of its own

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        models = vllm_config.model_config
        if models.get_multimodal_config().mm_encoder_tp_mode == "data":
            raise PruningError("--mm-encoder-tp-mode data is not possible with pruning: workers must decide alike")
        if not isinstance(getattr(self, self.tower), StageMissingLayer):  # as after --limit-mm-per-prompt image=0
            parts, room = self.parts(self, self.image_processor(models)), vllm_config.scheduler_config
            self.vtp = Served(self, parts, self.plan_of(self.config), room.max_num_batched_tokens)

    def image_processor(self, models: Any) -> Any:
        """What says the mean and deviation of the pixels, from vLLM's configuration of the model."""
        return cached_image_processor_from_config(models)

    def embed_multimodal(self, **kwargs: Any) -> Any:
        keep = kwargs.pop(KEEP, None)
        if kwargs.get(self.values) is None:
            return super().embed_multimodal(**kwargs)
        tiles = kwargs[self.values].split(numbers := kwargs[self.number].tolist())
        if self.per_tile:
            tiles = [tile[None] for image in tiles for tile in image]
            keep = None if keep is None else [tile for image in keep for tile in image]
        features = self.vtp.embed(super().embed_multimodal, {"pixel_values": tiles} | self.shared(kwargs, tiles), keep)
        parts = iter(features)
        return [torch.cat([next(parts) for _ in range(n)]) for n in numbers] if self.per_tile else features

    def shared(self, kwargs: Mapping[str, Any], images: Sequence[Tensor]) -> dict[str, Any]:
        """Further arguments of a family's `embed_multimodal`, one entry per image."""
        return {}
