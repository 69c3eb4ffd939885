"""LLaVA-1.5 in transformers (`LlavaForConditionalGeneration`): CLIP tower, MLP projector, LLaMA.

One image is one 576-token (24 x 24) block of placeholders; positions are renumbered after a cut.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from vtp_plugin.adapter import Adapter, SharedSpace
from vtp_plugin.adapters import v5_17
from vtp_plugin.adapters.clip import clip_tower, space_of
from vtp_plugin.adapters.rows import asked, repeated, serve, some, together
from vtp_plugin.hosts.transformers.contract import FAMILIES
from vtp_plugin.stages import Stage
from vtp_plugin.surgery.call import Call, Image
from vtp_plugin.surgery.columns import Rows
from vtp_plugin.surgery.prompt import PlaceholderCalls
from vtp_plugin.surgery.session import Session
from vtp_plugin.surgery.undo import Undo


class LlavaHf(Adapter):
    """transformers' LLaVA-1.5."""

    family = "llava_hf"
    touches = FAMILIES["llava_hf"]
    models = "LLaVA-1.5 (transformers)"
    names = ("LlavaForConditionalGeneration",)
    facts = {
        "vision_config.model_type": "clip_vision_model",
        "vision_feature_layer": int,
        "vision_feature_select_strategy": "default",
    }
    stages = dict.fromkeys(Stage, "")
    uniform = True

    def __init__(self, model: nn.Module, processor: Any = None) -> None:
        super().__init__(model, processor)
        core = model.model
        self.core = core
        self.tower = clip_tower(core.vision_tower, model.config.vision_feature_layer)
        self.projector = core.multi_modal_projector
        self.language_model = core.language_model
        self.decoder_layers = core.language_model.layers
        self.image_token = model.config.image_token_id

    def install(self, pruned: Session, undo: Undo) -> None:
        self.pruned = pruned
        PlaceholderCalls(pruned, self).install(undo)

    # -- one image ------------------------------------------------------------------------------------------------

    def has_images(self, inputs: Mapping[str, Any]) -> bool:
        return some(inputs.get("pixel_values"))

    def sizes(self, inputs: Mapping[str, Any]) -> dict[str, Tensor]:
        return {}  # every image is of the tower's size

    def images(self, inputs: Mapping[str, Any]) -> list[Image]:
        rows, columns = self.tower.grid
        raster = torch.arange(rows * columns, device=inputs["pixel_values"].device)
        return [Image(total=len(raster), index=raster) for _ in inputs["pixel_values"]]

    def encode(self, call: Call, inputs: Mapping[str, Any]) -> tuple[Any, list[Rows]]:
        pixels = inputs["pixel_values"]
        chosen = {k: inputs[k] for k in ("vision_feature_layer", "vision_feature_select_strategy") if k in inputs}
        chosen |= asked(self.core, "get_image_features", inputs)
        outputs, start = [], 0
        for part in pixels.split(1 if self.pruned.one_by_one else len(pixels)):
            with call.in_tower(range(start, start + len(part))):
                outputs.append(self.core.get_image_features(part, return_dict=True, **chosen))
            start += len(part)
        return together(outputs), [Rows(image.index, ordered=image.ordered) for image in call.images]

    @contextmanager
    def serving(self, features: Any) -> Iterator[None]:
        if features is None:
            yield
            return
        with Undo() as undo:
            serve(self.pruned, self.core, "get_image_features", features, undo)
            v5_17.expanding(self.core, self.model, undo, {"image": features}, self._expanded)
            yield

    def _expanded(self, input_ids: Tensor | None, outputs: Any, expand_size: int = 1, **kwargs: Any) -> Any:
        """Features for beams and returned sequences: the host counts placeholders, of which rows may be left out."""
        rows = outputs["image"].pooler_output
        order = repeated([image.sample for image in self.pruned.call.images], expand_size)
        outputs["image"].pooler_output = [rows[image] for image in order]
        return outputs

    # -- facts ----------------------------------------------------------------------------------------------------

    def shared_space(self, checkpoint: str | None) -> SharedSpace:
        return space_of(self.model, self.tower, checkpoint)
