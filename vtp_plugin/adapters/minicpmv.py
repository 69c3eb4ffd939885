"""MiniCPM-V 4.6 and 4.7: pictures of any size in one sequence, merged behind a block of the tower and behind the tower.

Every picture, slice of a picture and frame of a video has a run of placeholders of its own and counts as an image:
what belongs together, the model is not told. A token is a square of 4x4 patches, with downsample_mode=4x of 2x2. There
is no class token: the attention that a patch receives from its own image, mean over queries, stands in for the class
token's. Three of four decoder layers are recurrent, so there is no llm stage. Version 4.6 renumbers positions after a
cut; 4.7 lays pictures out on three axes, and what is left keeps its place.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from vtp_plugin.adapter import Tower
from vtp_plugin.adapters.minicpmv_tower import PLACES, SQUARES
from vtp_plugin.adapters.qwen import Axes
from vtp_plugin.adapters.qwen3_5 import RECURRENT
from vtp_plugin.adapters.rows import VALUES, RowsAdapter, some
from vtp_plugin.contract import TouchPoint
from vtp_plugin.errors import PruningError
from vtp_plugin.facts.costs import matrices
from vtp_plugin.hosts.compatibility import TRANSFORMERS
from vtp_plugin.hosts.transformers import contract
from vtp_plugin.stages import Stage
from vtp_plugin.surgery.call import Image

SIZES = {"image": "target_sizes", "video": "target_sizes_videos"}  # rows and columns of patches
ONE_SIZE = "up to transformers 5.18 its tower takes pictures of one size only, a picture and its slices are of several"


def tower_points() -> tuple[TouchPoint, ...]:
    path = ".model.vision_tower"
    return (
        TouchPoint(
            TRANSFORMERS,
            path,
            "the vision tower",
            takes=("pixel_values", "target_sizes", "use_vit_merger"),
            has=("embeddings", "encoder", "post_layernorm", "vit_merger", "config"),
        ),
        TouchPoint(
            TRANSFORMERS,
            f"{path}.embeddings",
            "patches and their positions",
            takes=("pixel_values", "target_sizes"),
            has=("patch_embedding", "position_embedding", "num_patches_per_side"),
        ),
        TouchPoint(TRANSFORMERS, f"{path}@{PLACES}", "positions of kept patches", takes=("target_sizes", "kwargs")),
        TouchPoint(TRANSFORMERS, f"{path}.encoder.layers.0", "cuts and signals of the tower", has=("self_attn", "mlp")),
        TouchPoint(
            TRANSFORMERS,
            f"{path}.encoder.layers.0.self_attn",
            "attention rows",
            takes=("hidden_states", "cu_seqlens"),
            has=("q_proj", "k_proj", "v_proj", "head_dim", "scaling"),
        ),
        TouchPoint(TRANSFORMERS, f"{path}.vit_merger", "FLOPs", has=("self_attn", "linear_1", "linear_2")),
        TouchPoint(TRANSFORMERS, ".model.merger", "squares of patches", takes=("hidden_states", "target_sizes")),
        TouchPoint(
            TRANSFORMERS,
            ".model.get_image_features",
            "features of the images",
            takes=("target_sizes", "downsample_mode"),
        ),
        TouchPoint(TRANSFORMERS, ".model.get_video_features", "features of the videos", takes=("target_sizes_videos",)),
        TouchPoint(
            TRANSFORMERS, ".model.language_model.layers.0.linear_attn", "FLOPs", has=("head_k_dim", "num_v_heads")
        ),
    )


class MiniCPMV46(RowsAdapter):
    """transformers' MiniCPM-V 4.6 with pictures and the frames of videos."""

    family = "minicpmv4_6"
    touches = (*contract.SHARED, *contract.prompt(every_logit=True), *contract.repeated(), *tower_points())
    models = "MiniCPM-V 4.6"
    names = ("MiniCPMV4_6ForConditionalGeneration",)
    facts = {"merger_times": 1, "text_config.model_type": "qwen3_5_text"}
    stages = {Stage.PIXELS: "", Stage.VIT: "", Stage.PROJECTOR: "", Stage.LLM: RECURRENT}
    layout = SQUARES
    parts = ("merger", "language_model")
    every_logit = True

    def __init__(self, model: nn.Module, processor: Any = None) -> None:
        super().__init__(model, processor)
        vision, self.mode = self.core.vision_tower, model.config.downsample_mode
        self.tokens = {"image": model.config.image_token_id, "video": model.config.video_token_id}
        self.merge = model.config.merge_kernel_size[0]
        self.inner = 1 if self.mode == "4x" else vision.config.window_kernel_size[0]  # merged inside the tower
        self.tower = Tower(
            module=vision,
            embeddings=vision.embeddings,
            patch_embedding=vision.embeddings.patch_embedding,
            blocks=vision.encoder.layers,
            post_layernorm=vision.post_layernorm,
            prefix=0,
            grid=(1, 1),  # every image has its own
            patch_size=vision.config.patch_size,
            projected=-1,
            block=self.inner * self.merge,
        )

    @classmethod
    def unlike(cls, model: nn.Module) -> str:
        alone = hasattr(sys.modules[type(model).__module__], "get_vision_merged_shape")
        return ONE_SIZE if alone else super().unlike(model)

    def sizes(self, inputs: Mapping[str, Any]) -> dict[str, Tensor]:
        return {name: inputs[name] for name in SIZES.values() if isinstance(inputs.get(name), Tensor)}

    def images(self, inputs: Mapping[str, Any]) -> list[Image]:
        mode, side, found = inputs.get("downsample_mode") or self.mode, self.tower.block, []
        if mode != self.mode:
            raise PruningError(
                f"{self.family}: it was pruned with downsample_mode={self.mode}, this call says {mode}: set it in the "
                f"model's configuration before"
            )
        for kind, name in VALUES.items():
            for rows, columns in inputs[SIZES[kind]].tolist() if some(inputs.get(name)) else []:
                total, patches = rows // side * (columns // side), rows * columns
                index = torch.arange(total, device=inputs[name].device)
                facts = {"patches": patches, "projectable": total, "grid": (rows // side, columns // side)}
                found.append(Image(total=total, index=index, kind=kind, token=self.tokens[kind], **facts))
        return found

    def arrange(self, maps: Tensor, kind: str, inputs: Mapping[str, Any]) -> Sequence[Tensor]:
        """Channels of all patches [S, C], square by square -> rows per image [n, C]: their averages."""
        return maps.unflatten(0, (-1, self.tower.block**2)).mean(1).split(self._totals(kind, inputs))

    def units(self, entering: Tensor, kind: str, inputs: Mapping[str, Any]) -> Sequence[Tensor]:
        """[U, m D], square by square already -> what goes into the merger per image, [n, m D]."""
        return entering.split(self._totals(kind, inputs))

    def _totals(self, kind: str, inputs: Mapping[str, Any]) -> list[int]:
        return (inputs[SIZES[kind]].prod(-1) // self.tower.block**2).tolist()

    def sequences(self, image: Image) -> Sequence[Sequence[int]]:
        before = self.tower.module.config.insert_layer_id + 1
        behind = len(self.tower.blocks) - before
        return [[image.patches]] * before + [[image.patches // self.inner**2]] * behind

    def pooling_macs(self, tokens: int) -> int:
        """The merger inside the tower, per token that it makes: attention within its square, and an MLP."""
        if self.inner == 1:
            return 0
        merger, square = self.tower.module.vit_merger, self.inner**2
        attending = square * matrices(merger.self_attn) + 2 * square**2 * merger.self_attn.dim
        return tokens * (attending + matrices(merger.linear_1) + matrices(merger.linear_2))


class MiniCPMV47(Axes, MiniCPMV46):
    """transformers' MiniCPM-V 4.7."""

    family = "minicpmv4_7"
    touches = (
        *contract.SHARED,
        *contract.prompt(),
        *contract.repeated(),
        *tower_points(),
        TouchPoint(
            TRANSFORMERS,
            ".model.get_rope_index",
            "positions on three axes",
            takes=("input_ids", "mm_token_type_ids", *SIZES.values(), "downsample_mode", "attention_mask"),
        ),
    )
    models = "MiniCPM-V 4.7"
    names = ("MiniCPMV4_7ForConditionalGeneration",)
    every_logit = False
