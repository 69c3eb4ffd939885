"""What a caller may ask of a pruned model: everything else is refused here, in one sentence, before anything runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from vtp_plugin.errors import PruningError
from vtp_plugin.stages import Stage
from vtp_plugin.strategy import PruningStrategy
from vtp_plugin.surgery import cache, owning, turns

if TYPE_CHECKING:
    from vtp_plugin.surgery.placeholders import PlaceholderModel
    from vtp_plugin.surgery.session import Session
    from vtp_plugin.surgery.undo import Undo

CROPPING = ("assistant_model", "prompt_lookup_num_tokens", "assistant_early_exit", "use_mtp")
NOT_WITH_IMAGES = {  # settings of generate, and why they are refused
    "prefill_chunk_size": "a prompt that is cut needs its prefill in one pass",
    "token_healing": "it rewrites the prompt that is cut",
}
PACKED = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx")


def setting(model: nn.Module, inputs: Mapping[str, Any], name: str) -> Any:
    """A setting of `generate` wherever it was made: in the call, in the passed configuration, in the model's own."""
    places = (inputs.get("generation_config"), getattr(model, "generation_config", None))
    found = (inputs.get(name), *(getattr(place, name, None) for place in places))
    return next((value for value in found if value is not None), None)


def check(pruned: Session, inputs: Mapping[str, Any], images: bool, *, generating: bool) -> None:
    """Refuse what cannot be right; `images`: pixels come with these arguments."""
    if not pruned.strategies:
        return
    if inputs.get("mm_encoder_outputs"):
        raise PruningError("pruning needs pixels: features given as mm_encoder_outputs were never seen by a strategy")
    if inputs.get("inputs_embeds") is not None or (images and inputs.get("input_ids") is None):
        raise PruningError("pruning needs input_ids: prompts given as inputs_embeds cannot be shortened")
    if not images:
        return
    refuse_filled_cache(cache.given(inputs))
    packed = [name for name in PACKED if inputs.get(name) is not None]
    if packed:
        raise PruningError(f"pruning cannot shorten packed sequences ({packed[0]}): give one prompt per row")
    if generating:
        refuse_settings(pruned.model, pruned.strategies, inputs)


def refuse_settings(model: nn.Module, strategies: Sequence[PruningStrategy], inputs: Mapping[str, Any]) -> None:
    """Refuse ways of generating that know neither a shorter prompt nor caches of unequal lengths."""
    for name, reason in NOT_WITH_IMAGES.items():
        if setting(model, inputs, name):
            raise PruningError(f"{name} is not possible while a model is pruned: {reason}")
    if setting(model, inputs, "cache_implementation") == "paged":
        raise PruningError("continuous batching (cache_implementation=paged) takes no images, so nothing can be pruned")
    late = [s for s in strategies if s.stage is Stage.LLM]
    asked = [name for name in CROPPING if setting(model, inputs, name)]
    if late and asked:  # they crop the cache
        raise PruningError(f"{late[0].name}: {asked[0]} is not possible when decoder layers cache unequal lengths")


def guard(session: Session, undo: Undo) -> None:
    """Refuse embeddings that are given to the language model itself: whose features they hold, nobody knows."""

    def entered(module: nn.Module, args: Any, kwargs: Mapping[str, Any]) -> None:
        if torch.compiler.is_compiling() or owning.anyone() or kwargs.get("inputs_embeds") is None:
            return
        raise PruningError(
            "the language model was called directly with inputs_embeds, where nothing is pruned: call the model "
            "itself, with input_ids and pixels"
        )

    if session.strategies and session.adapter.language_model is not None:
        undo.before(session.adapter.language_model, entered)


def refuse_export(pruned: Session) -> None:
    """A graph for every picture would keep what one picture lost."""
    if pruned.strategies and torch.compiler.is_exporting():
        raise PruningError("torch.export cannot follow what is cut from a picture: detach, and export the whole model")


def refuse_filled_cache(stored: Any) -> None:
    """Images can only be pruned in the first pass."""
    if turns.stored_length(stored) > 0:
        raise PruningError("pruning cannot add images behind a filled cache of the caller")


def refuse_fixed_cache(stored: Any) -> None:
    """The host's `generate` would take what is left in a static cache for all of the prompt, and make masks of it."""
    if getattr(stored, "is_compileable", False):
        raise PruningError(
            "generate cannot go on behind a pruned prompt in a static cache: take a dynamic one, or a loop of your own"
        )


def refuse_images_behind(family: PlaceholderModel, inputs: Mapping[str, Any]) -> None:
    """The same where the cache holds a pruned prompt."""
    if family.has_images(inputs) or inputs.get("mm_encoder_outputs"):
        raise PruningError("pruning cannot add images behind a filled cache of the caller")
