"""The ideal: the same model given exactly K visual tokens by hand, with no plugin at all.

pixels and vit: the tower's blocks run on K patches (LLaVA-NeXT: on an equal share of every tile; Qwen-VL: on an image
that makes K tokens). projector: K rows are projected (Qwen-VL's projector is part of its tower: K of its rows are
taken). llm: every decoder layer runs on as many columns as it has in the pruned model.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn

from vtp_plugin.hosts.transformers.architectures import QUESTION_TOKENS, Llava, LlavaNext, Qwen3, Qwen25, Shape
from vtp_plugin.surgery import cache

HALF = QUESTION_TOKENS // 2


def ideal(
    shape: Shape, model: nn.Module, inputs: dict[str, Tensor], *, seen: int, rows: int, lengths: Sequence[int]
) -> Tensor:
    """The first token, or an encoder's embeddings, with `seen` of an image's tokens in the tower's blocks and `rows`
    behind the projector; `lengths` are those of the prompt in every decoder layer."""
    if not shape.decodes:
        return _encoded(model, inputs["pixel_values"], seen)
    features, *deep = FEATURES[type(shape)](shape, model.model, inputs, seen, rows)  # each [B, rows, D]
    ids = inputs["input_ids"]
    text = model.model.get_input_embeddings()(torch.cat([ids[:, :HALF], ids[:, HALF - QUESTION_TOKENS :]], dim=1))
    embeds = torch.cat([text[:, :HALF], features, text[:, HALF:]], dim=1)
    hidden = _language(model.model.language_model, embeds, lengths, deep)
    return model.lm_head(hidden[:, -1:])


# -- tower and projector ----------------------------------------------------------------------------------------------


def _llava(shape: Shape, core: nn.Module, inputs: dict[str, Tensor], seen: int, rows: int) -> list[Tensor]:
    features = _tower(core.vision_tower, inputs["pixel_values"], seen, core.config.vision_feature_layer)
    return [core.multi_modal_projector(features[:, :rows])]


def _next(shape: LlavaNext, core: nn.Module, inputs: dict[str, Tensor], seen: int, rows: int) -> list[Tensor]:
    values = inputs["pixel_values"]
    side = shape.vision["image_size"] // shape.vision["patch_size"]
    per_tile = round((seen - 2 * side) / values.shape[1]) if seen < shape.tokens else side**2  # newlines stay
    features = _tower(core.vision_tower, values.flatten(0, 1), per_tile, core.config.vision_feature_layer)
    projected = core.multi_modal_projector(features.unflatten(0, values.shape[:2]).flatten(1, 2)[:, :rows])
    newlines = core.image_newline.expand(len(projected), rows - projected.shape[1], -1)
    return [torch.cat([projected, newlines], dim=1)]


def _qwen(shape: Qwen25, core: nn.Module, inputs: dict[str, Tensor], seen: int, rows: int) -> list[Tensor]:
    batch, height = len(inputs["image_grid_thw"]), _side(seen)
    grid = inputs["image_grid_thw"].new_tensor([[1, 2 * height, 2 * (seen // height)]] * batch)
    output = core.visual(inputs["pixel_values"][: batch * 4 * seen], grid_thw=grid)
    made = [output.pooler_output, *(getattr(output, "deepstack_features", None) or ())]
    return [level.unflatten(0, (batch, seen))[:, :rows] for level in made]


def _side(units: int) -> int:
    """The longer divisor pair's smaller side: the squarest image of that many tokens."""
    return next(side for side in range(int(units**0.5), 0, -1) if units % side == 0)


FEATURES: dict[type[Shape], Callable[..., list[Tensor]]] = {
    Llava: _llava,
    LlavaNext: _next,
    Qwen25: _qwen,
    Qwen3: _qwen,
}


def _tower(tower: nn.Module, pixels: Tensor, seen: int, layer: int) -> Tensor:
    """Hidden states `layer` of a CLIP tower without the class token, its blocks running on the first `seen` patches."""
    return _blocks(getattr(tower, "vision_model", tower), pixels, seen)[layer][:, 1:]


def _encoded(model: nn.Module, pixels: Tensor, seen: int) -> Tensor:
    inner = getattr(model.vision_model, "vision_model", model.vision_model)
    pooled = inner.post_layernorm(_blocks(inner, pixels, seen)[-1][:, 0])
    return model.visual_projection(pooled)


def _blocks(inner: nn.Module, pixels: Tensor, seen: int) -> list[Tensor]:
    hidden = [inner.pre_layrnorm(inner.embeddings(pixels)[:, : seen + 1])]
    for layer in inner.encoder.layers:
        hidden.append(_first(layer(hidden[-1], attention_mask=None)))
    return hidden


# -- language model ---------------------------------------------------------------------------------------------------


def _language(language: nn.Module, embeds: Tensor, lengths: Sequence[int], deep: Sequence[Tensor] = ()) -> Tensor:
    """The decoder layers, each on the length that it has; columns behind the first half of the text are dropped.

    `deep`: what is added to the visual columns behind the first layers.
    """
    from transformers import DynamicCache

    if set(lengths) == {embeds.shape[1]}:
        return language(inputs_embeds=embeds, use_cache=True, **_deep(embeds, deep)).last_hidden_state
    positions = torch.arange(embeds.shape[1], device=embeds.device)[None]
    if "mrope_section" in (getattr(language.config, "rope_parameters", None) or {}):
        positions = positions.expand(3, 1, -1)  # time, rows and columns
    tables, hidden = language.rotary_emb(embeds, position_ids=positions), embeds
    store, name = DynamicCache(config=language.config), cache.name_in(signature(language.layers[0].forward).parameters)
    for number, (layer, length) in enumerate(zip(language.layers, lengths, strict=True)):
        if (dropped := hidden.shape[1] - length) > 0:
            hidden, *tables = (torch.cat([t[:, :HALF], t[:, HALF + dropped :]], 1) for t in (hidden, *tables))
        hidden = _first(
            layer(hidden, attention_mask=None, position_embeddings=tuple(tables), use_cache=True, **{name: store})
        )
        if number < len(deep):
            hidden[:, HALF : HALF + deep[number].shape[1]] += deep[number]
    return language.norm(hidden)


def _deep(embeds: Tensor, deep: Sequence[Tensor]) -> dict[str, Any]:
    """The arguments of a language model that adds rows of the tower to its first layers."""
    if not deep:
        return {}
    mask = torch.zeros(embeds.shape[:2], dtype=torch.bool, device=embeds.device)
    mask[:, HALF : HALF + deep[0].shape[1]] = True
    return {"visual_pos_masks": mask, "deepstack_visual_embeds": [level.flatten(0, 1) for level in deep]}


def _first(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output
