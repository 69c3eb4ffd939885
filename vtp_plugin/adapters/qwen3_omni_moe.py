"""Qwen3-Omni's thinker: the tower of Qwen3-VL with deepstack, experts in the language model, audio in the same prompt.

Audio is not pruned, its tokens stay where they are. Original positions are kept, which are no whole numbers where a
video's frames lie between seconds. From transformers 5.21 on, as for Qwen2.5-Omni.
"""

from __future__ import annotations

from vtp_plugin.adapters.qwen2_5_omni import COUNTED, Listening
from vtp_plugin.adapters.qwen3_vl import Qwen3VL
from vtp_plugin.contract import TouchPoint
from vtp_plugin.hosts.compatibility import TRANSFORMERS
from vtp_plugin.hosts.transformers import contract


class Qwen3OmniMoe(Listening, Qwen3VL):
    """The thinker of transformers' Qwen3-Omni."""

    family = "qwen3_omni_moe"
    touches = (
        *contract.SHARED,
        *contract.prompt(every_logit=True),
        *contract.decoder(contract.LANGUAGE, normed=True),
        *contract.repeated(),
        *contract.packed("get_vision_interpolation_indices_and_weights", counted=COUNTED),
        TouchPoint(
            TRANSFORMERS,
            ".model.visual",
            "deepstack, and positions of kept patches",
            has=(
                "deepstack_visual_indexes",
                "deepstack_merger_list",
                "num_grid_per_side",
                "interpolation_mode",
                "interpolation_align_corners",
            ),
        ),
    )
    models = "Qwen3-Omni (thinker)"
    names = ("Qwen3OmniMoeThinkerForConditionalGeneration",)
