"""Qwen2.5-Omni's thinker: the packed tower of Qwen2.5-VL with windows, 2x2 merger, audio in the same prompt.

Pictures and videos are pruned, audio is not: its tokens stay where they are, between the frames of a video, too.
Original positions are kept. Of the whole model the thinker is pruned: `model.thinker`, of transformers 5.21 or later,
where its parts lie as in the other families. It answers in text, by itself or asked by the whole model. What speaks
reads the thinker's hidden states, column by column, and of tokens that were dropped there are none: refused.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from vtp_plugin.adapters.qwen2_5_vl import Qwen25VL
from vtp_plugin.adapters.refused import Refused
from vtp_plugin.contract import TouchPoint
from vtp_plugin.errors import PruningError
from vtp_plugin.hosts.compatibility import TRANSFORMERS
from vtp_plugin.hosts.transformers import contract
from vtp_plugin.stages import Stage
from vtp_plugin.surgery.session import Session
from vtp_plugin.surgery.undo import Undo

PARTS = "speech is made of what its thinker made of every token: prune its `thinker`, and let it answer in text"
SPOKEN = "speech is made of what the thinker makes of every token of a picture, and it is pruned: ask for text "
SPOKEN += "(generation_mode='text', or return_audio=False where the model takes that), or detach first"
COUNTED = ("input_ids", "image_grid_thw", "video_grid_thw", "attention_mask")  # what positions follow from
COUNTED += ("use_audio_in_video", "audio_seqlens", "second_per_grids")


class Listening:
    """What thinkers have in common whose prompts hold audio beside pictures and videos. No family itself."""

    every_logit = True
    core: nn.Module

    @classmethod
    def unlike(cls, model: nn.Module) -> str:
        beside = not hasattr(getattr(model, "model", None), "visual")
        return (
            "up to transformers 5.20 its parts lie side by side, not in its `model`"
            if beside
            else super().unlike(model)
        )

    def install(self, pruned: Session, undo: Undo) -> None:
        super().install(pruned, undo)

        def answer(*args: Any, **kwargs: Any) -> Any:
            if pruned.strategies and self.has_images(kwargs) and kwargs.get("output_hidden_states"):
                _refuse_speech(self.model)
            return generate(*args, **kwargs)

        generate = undo.override(self.model, "generate", answer)

    def axes(self, inputs: Mapping[str, Any], ids: Tensor, real: Tensor) -> Tensor:
        """Positions [3, B, L] of the whole prompt, audio and seconds per frame counted in."""
        heard = inputs.get("feature_attention_mask")
        positions, self.core.rope_deltas = self.core.get_rope_index(
            input_ids=ids,
            image_grid_thw=inputs.get("image_grid_thw"),
            video_grid_thw=inputs.get("video_grid_thw"),
            attention_mask=real.long(),
            use_audio_in_video=bool(inputs.get("use_audio_in_video")),
            audio_seqlens=inputs.get("audio_feature_lengths") if heard is None else heard.sum(-1),
            second_per_grids=inputs.get("video_second_per_grid"),
        )
        return positions


def _refuse_speech(thinker: nn.Module) -> None:
    """PruningError if hidden states are wanted by a whole model's `generate` that is going to speak.

    A thinker does not know whose it is: its caller says so.
    """
    frame = inspect.currentframe()
    while frame is not None:
        asking = frame.f_locals if frame.f_code.co_name == "generate" else {}
        owner = asking.get("self")
        whole = isinstance(owner, nn.Module) and getattr(owner, "thinker", None) is thinker
        if whole and asking.get("generate_audio", True):
            raise PruningError(SPOKEN)
        frame = frame.f_back


class Qwen25Omni(Listening, Qwen25VL):
    """The thinker of transformers' Qwen2.5-Omni."""

    family = "qwen2_5_omni"
    touches = (
        *contract.SHARED,
        *contract.prompt(every_logit=True),
        *contract.decoder(contract.LANGUAGE),
        *contract.repeated(),
        *contract.packed("get_vision_window_index", counted=COUNTED),
        TouchPoint(
            TRANSFORMERS,
            ".model.visual",
            "windows of the tower",
            has=("window_size", "patch_size", "fullatt_block_indexes"),
        ),
    )
    models = "Qwen2.5-Omni (thinker)"
    names = ("Qwen2_5OmniThinkerForConditionalGeneration",)


class QwenOmniWhole(Refused):
    """transformers' Qwen2.5-Omni and Qwen3-Omni with everything that speaks."""

    family = "qwen_omni_whole"
    models = "Qwen-Omni as a whole"
    names = ("Qwen2_5OmniForConditionalGeneration", "Qwen3OmniMoeForConditionalGeneration")
    refused = PARTS
    stages = dict.fromkeys(Stage, PARTS)
