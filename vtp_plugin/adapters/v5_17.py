"""What transformers 5.17 does otherwise than 5.18 and later with the features of images; no family itself.

Up to 5.17 a host repeats the pixels for beams and returned sequences and encodes them again; later it repeats the
features, where a model says that it sees (Qwen3.5 says so from 5.20 on). Its assistants fail behind a sliding window.
Families hand their features over in other forms, too: each asks `is_host()` where its own differ.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from copy import copy
from typing import Any

import torch
from torch import nn

from vtp_plugin import contract
from vtp_plugin.errors import PruningError
from vtp_plugin.surgery.binding import signature_of
from vtp_plugin.surgery.undo import Undo

FIRST_WITH_FEATURES = (5, 18)  # release
BESIDE_PIXELS = ("second_per_grid_ts",)  # per video, but no argument of `get_video_features`


def is_host() -> bool:
    """Whether the installed transformers is that old."""
    return contract.release("transformers") < FIRST_WITH_FEATURES


def repeats_pixels(model: nn.Module) -> bool:
    """Whether `generate` of the host leaves pictures to `forward`, and repeats them as they are."""
    return is_host() or "image" not in model.input_modalities


def arguments(function: Callable[..., Any], kind: str, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of `get_image_features` or `get_video_features`, whose pixels OneVision names alike in 5.17."""
    names = {name: name for name in signature_of(function).parameters}
    if kind == "video" and "pixel_values" in names:
        names["pixel_values"] = "pixel_values_videos"
    return {name: inputs[given] for name, given in names.items() if inputs.get(given) is not None}


def handed_over(output: Any) -> Any:
    """A features object as the host takes it: 5.17 wants the deepstack rows of all images in one tensor."""
    levels = getattr(output, "deepstack_features", None)
    if levels is None or not is_host():
        return output
    output = copy(output)
    output.deepstack_features = [torch.cat(list(level)) for level in levels]
    return output


def expanding(
    core: nn.Module, model: nn.Module, undo: Undo, answer: dict[str, Any], expanded: Callable[..., Any]
) -> None:
    """Let beams and returned sequences have features of their samples: `expanded(ids, answer, times)` repeats them."""
    if repeats_pixels(model):
        repeat_features(core, model, undo, lambda times: expanded(None, answer, times))
    else:
        undo.override(model, "_expand_multimodal_outputs", expanded)
    if is_host():
        refuse_windows(model, undo)


def repeat_features(core: nn.Module, model: nn.Module, undo: Undo, repeat: Callable[[int], None]) -> None:
    """Let `generate` leave pixels as they are where it repeats prompts; `repeat(times)` repeats the features."""
    functions = [getattr(core, f"get_{kind}_features", None) for kind in ("image", "video")]
    visual = {name for function in functions if function for name in signature_of(function).parameters}
    visual |= {"pixel_values_videos", *BESIDE_PIXELS}

    def expanded(expand_size: int = 1, input_ids: Any = None, **kwargs: Any) -> Any:
        aside = {name: kwargs.pop(name) for name in visual & kwargs.keys()}
        input_ids, kwargs = original(expand_size=expand_size, input_ids=input_ids, **kwargs)
        if expand_size > 1:
            repeat(expand_size)
        return input_ids, kwargs | aside

    original = undo.override(model, "_expand_inputs_for_generation", expanded)


def refuse_windows(model: nn.Module, undo: Undo) -> None:
    """Refuse an assistant that drafts beyond its sliding window: 5.17 gives it more keys than its mask has columns."""

    def candidates(*args: Any, generation_config: Any, assistant_model: Any = None, **kwargs: Any) -> Any:
        longest, window = generation_config.max_length, _window(assistant_model)
        if window is not None and longest > window:
            raise PruningError(
                f"in transformers 5.17 an assistant_model fails behind its sliding window ({window} tokens, and prompt "
                f"and answer may have {longest}): take transformers {'.'.join(map(str, FIRST_WITH_FEATURES))} or later"
            )
        return original(*args, generation_config=generation_config, assistant_model=assistant_model, **kwargs)

    original = undo.override(model, "_get_candidate_generator", candidates)


def _window(assistant: Any) -> int | None:
    """Tokens of the shortest window in the cache of an assistant, if it has any."""
    if assistant is None:
        return None
    from transformers import DynamicCache

    layers = DynamicCache(config=assistant.config).layers
    return min((layer.sliding_window for layer in layers if getattr(layer, "is_sliding", False)), default=None)
