"""CLIP and SigLIP by themselves: `prune(clip_model, "l2")`. There is no prompt and no language model.

Every call of the vision model is one call: its blocks run on the patches that are left, pooled outputs and embeddings
come from them. Where images keep unequal numbers, states and attentions are filled up with zeros.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from vtp_plugin.adapter import Adapter
from vtp_plugin.adapters.clip import clip_tower
from vtp_plugin.adapters.rows import flat_tower, pooled_macs
from vtp_plugin.errors import PruningError
from vtp_plugin.hosts.transformers.contract import FAMILIES
from vtp_plugin.stages import Stage
from vtp_plugin.surgery.batching import stacked
from vtp_plugin.surgery.call import Image
from vtp_plugin.surgery.session import Session
from vtp_plugin.surgery.undo import Undo

ENCODER = {
    Stage.PIXELS: "",
    Stage.VIT: "",
    Stage.PROJECTOR: "an encoder has nothing to project into",
    Stage.LLM: "an encoder has no language model",
}


class Encoder(Adapter):
    """A vision transformer that is called with pixel values."""

    uniform = True
    stages = ENCODER
    fixed_positions = "an encoder has no prompt"
    language_model = None
    decoder_layers: Sequence[nn.Module] = ()

    @property
    def projectors(self) -> Sequence[nn.Module]:
        return ()

    @property
    def vision_model(self) -> nn.Module:
        """What is called with pixel values: the vision part of a model with two, else the model."""
        return getattr(self.model, "vision_model", self.model)

    def install(self, pruned: Session, undo: Undo) -> None:
        self.pruned = pruned
        self.forward = undo.override(self.tower.module, "forward", self._forward)

    def _forward(self, pixel_values: Tensor, *args: Any, **kwargs: Any) -> Any:
        if kwargs.get("interpolate_pos_encoding"):
            raise PruningError(f"{self.family}: images of another size than the model's cannot be pruned")
        raster = torch.arange(self.tower.grid[0] * self.tower.grid[1], device=pixel_values.device)
        everything = list(range(len(pixel_values)))
        with self.pruned.calling() as call:
            call.images = [Image(total=len(raster), index=raster, sample=n) for n in everything]
            outputs = []
            size = 1 if self.pruned.one_by_one else len(everything)
            for start in everything[::size]:
                with call.in_tower(everything[start : start + size]):
                    outputs.append(self.forward(pixel_values[start : start + size], *args, **kwargs))
        return outputs[0] if len(outputs) == 1 else stacked(outputs)


class ClipEncoder(Encoder):
    """transformers' CLIP, whole or only its vision part."""

    family = "clip"
    touches = FAMILIES["clip"]
    models = "CLIP encoders"
    names = ("CLIPModel", "CLIPVisionModel", "CLIPVisionModelWithProjection")

    def __init__(self, model: nn.Module, processor: Any = None) -> None:
        super().__init__(model, processor)
        self.tower = clip_tower(self.vision_model, -1)
        self.projector = getattr(model, "visual_projection", nn.Identity())


class SiglipEncoder(Encoder):
    """transformers' SigLIP, whole or only its vision part."""

    family = "siglip"
    touches = FAMILIES["siglip"]
    models = "SigLIP encoders"
    names = ("SiglipModel", "SiglipVisionModel")

    def __init__(self, model: nn.Module, processor: Any = None) -> None:
        super().__init__(model, processor)
        self.tower = flat_tower(self.vision_model, -1)
        self.projector = nn.Identity()

    def pooling_macs(self, tokens: int) -> int:
        return pooled_macs(self.vision_model, tokens)
