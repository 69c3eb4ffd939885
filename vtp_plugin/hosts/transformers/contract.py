"""Where this package touches transformers: by family, from the model, and what all families share.

Paths start at the model that is pruned, so that a check needs no import; they are checked when it is attached to.
A family that is not here puts its touch points together in its own file, of the functions below.
"""

from __future__ import annotations

from functools import partial

from vtp_plugin.contract import TouchPoint
from vtp_plugin.hosts.compatibility import TRANSFORMERS

CACHE = "cache|past_key_values"  # renamed in 5.24
FEATURES = (5, 18)  # `generate` repeats features for beams since; before, it repeated pixels
_At = partial(TouchPoint, TRANSFORMERS)


def decoder(path: str, normed: bool = False, window: bool = False, numbered: bool = True) -> tuple[TouchPoint, ...]:
    """A language model's layers, whose keywords the llm stage rewrites, and its rotary embedding.

    `numbered`: a layer names its position ids; else they are among what it hands on.
    """
    layer = f"{path}.layers.0"
    keywords = ("hidden_states", "attention_mask", "position_embeddings", *("position_ids",) * numbered, CACHE)
    parts = ("q_proj", "k_proj", "head_dim", "scaling|scale")
    norms = ("q_norm", "k_norm") if normed else ()
    sliding = ("sliding_window",) if window else ()
    return (
        _At(layer, "cuts between decoder layers", takes=keywords, has=("self_attn", "input_layernorm")),
        _At(f"{layer}.self_attn", "the last prompt token's attention", has=(*parts, *norms, *sliding), takes=(CACHE,)),
        _At(f"{layer}@apply_rotary_pos_emb", "the last prompt token's attention", takes=("q", "k", "cos", "sin")),
        _At(f"{path}.rotary_emb", "positions of the tokens that are left", takes=("x", "position_ids")),
        _At(path, "the normed hidden states", has=("norm",)),
    )


def prompt(core: str = ".model", every_logit: bool = False) -> tuple[TouchPoint, ...]:
    """A model whose prompt is shortened and whose features are served; `every_logit`: it keeps them of all columns."""
    keeping = () if every_logit else ("logits_to_keep",)
    return (
        _At(".", "calls of the model", takes=("input_ids", "attention_mask", "labels", *keeping, CACHE)),
        _At(".generate", "calls of the model", takes=("inputs", "generation_config")),
        _At(".prepare_inputs_for_generation", "one forward pass of a generation"),
        _At(".", "losses and configuration", has=("loss_function", "config", "generation_config")),
        _At(f"{core}.get_image_features", "features of the images", takes=("pixel_values",)),
    )


def repeated() -> tuple[TouchPoint, ...]:
    where, why = "._expand_multimodal_outputs", "beams and returned sequences"
    sees = _At(".input_modalities", "whether `generate` encodes pictures", since=FEATURES)
    return (_At(where, why, takes=("input_ids", "expand_size"), since=FEATURES), sees)


def clip(path: str) -> tuple[TouchPoint, ...]:
    """A CLIP or SigLIP tower."""
    parts = ("embeddings", "encoder", "post_layernorm", "config")
    return (
        _At(path, "the vision tower", takes=("pixel_values",), has=parts),
        _At(f"{path}.embeddings", "patches and their positions", has=("patch_embedding",)),
        _At(f"{path}.encoder.layers.0", "cuts and signals of the tower", has=("self_attn", "layer_norm2", "mlp")),
        _At(f"{path}.encoder.layers.0.self_attn", "attention rows", has=("q_proj", "k_proj", "head_dim", "scale")),
    )


COUNTED = ("input_ids", "mm_token_type_ids", "image_grid_thw", "video_grid_thw", "attention_mask")


def packed(*functions: str, counted: tuple[str, ...] = COUNTED) -> tuple[TouchPoint, ...]:
    """A Qwen-VL's tower and positions; `functions` of its file that compute something per patch.

    `counted`: what its positions follow from.
    """
    path = ".model.visual"
    parts = ("patch_embed", "blocks", "merger", "spatial_merge_size")
    return (
        _At(path, "the vision tower", takes=("hidden_states", "grid_thw"), has=parts),
        _At(f"{path}.patch_embed", "patches", has=("patch_size",)),
        _At(f"{path}.blocks.0", "cuts and signals of the tower", takes=("cu_seqlens",), has=("attn",)),
        _At(f"{path}.blocks.0.attn", "attention rows", has=("qkv|q", "num_heads", "scaling")),
        _At(f"{path}@apply_rotary_pos_emb_vision", "attention rows", takes=("q", "k", "cos", "sin")),
        _At(f"{path}@get_vision_position_ids", "positions of kept patches"),
        *(_At(f"{path}@{name}", "what the tower computes per patch") for name in functions),
        _At(".model.get_rope_index", "positions on three axes", takes=counted),
        _At(".model.get_image_features", "features of the images", takes=("image_grid_thw",)),
        _At(".model.get_video_features", "features of the videos", takes=("video_grid_thw",)),
    )


def crops(module: str, packing: tuple[str, ...]) -> tuple[TouchPoint, ...]:
    """Tiles of any resolution, packed by the host."""
    home = f"transformers.models.{module}.modeling_{module}"
    return (
        _At(".model.pack_image_features", "which row is which patch", takes=packing),
        _At(f"{home}:image_size_to_num_patches", "the number of tiles", takes=("image_size", "grid_pinpoints")),
        _At(f"{home}:get_anyres_image_grid_shape", "how tiles lie", takes=("image_size", "grid_pinpoints")),
    )


def encoder(module: str, name: str) -> tuple[TouchPoint, ...]:
    """A vision transformer by itself, or beside a text tower."""
    home, why = f"transformers.models.{module}.modeling_{module}:{name}", "calls of the model"
    return (
        _At(f"{home}VisionModel.forward", why, takes=("pixel_values",)),
        _At(f"{home}VisionEmbeddings.forward", "kept patches", takes=("pixel_values", "interpolate_pos_encoding")),
        _At(f"{home}EncoderLayer.forward", "cuts inside the tower", takes=("hidden_states", "attention_mask")),
        _At(f"{home}Attention.forward", "attention rows", takes=("hidden_states", "attention_mask")),
    )


SHARED = (
    _At("transformers.cache_utils:DynamicCache().layers", "the cache of every layer"),
    _At("transformers.cache_utils:DynamicLayer()", "keys of the prompt", has=("keys",)),
    _At(
        "transformers.cache_utils:Cache",
        "the length of the cache",
        has=("get_seq_length", "get_mask_sizes", "is_compileable"),
    ),
)

LANGUAGE = ".model.language_model"
TOWER = ".model.vision_tower"
PLAIN = (*SHARED, *prompt(), *decoder(LANGUAGE))
ROWS = (*PLAIN, *repeated())

FAMILIES: dict[str, tuple[TouchPoint, ...]] = {
    "clip": encoder("clip", "CLIP"),
    "siglip": encoder("siglip", "Siglip"),
    "llava_hf": (*PLAIN, *clip(TOWER)),
    "llava_next": (
        *ROWS,
        *clip(TOWER),
        *crops("llava_next", ("image_features", "image_sizes", "vision_feature_select_strategy", "image_newline")),
    ),
    "llava_onevision": (
        *ROWS,
        *clip(TOWER),
        *crops("llava_onevision", ("image_features", "image_sizes", "image_newline", "vision_aspect_ratio")),
        _At(".model.apply_pooling", "rows of a video", takes=("image_features",)),
        _At(".model.get_video_features", "features of the videos", takes=("pixel_values_videos|pixel_values",)),
    ),
    "qwen2_vl": (*ROWS, *packed()),
    "qwen2_5_vl": (
        *ROWS,
        *packed("get_vision_window_index"),
        _At(".model.visual", "windows of the tower", has=("window_size", "patch_size", "fullatt_block_indexes")),
    ),
    "qwen3_vl": (
        *SHARED,
        *prompt(),
        *repeated(),
        *decoder(LANGUAGE, normed=True),
        *packed("get_vision_interpolation_indices_and_weights"),
        _At(".model.visual", "deepstack", has=("deepstack_visual_indexes", "deepstack_merger_list")),
        _At(
            ".model.visual",
            "positions of kept patches",
            has=("num_grid_per_side", "interpolation_mode", "interpolation_align_corners"),
        ),
        _At(
            "transformers.models.qwen3_vl.modeling_qwen3_vl:BaseModelOutputWithDeepstackFeatures",
            "deepstack",
            has=("deepstack_features",),
        ),
    ),
    "internvl": (
        *ROWS,
        _At(TOWER, "the vision tower", takes=("pixel_values",), has=("embeddings", "encoder", "layernorm")),
        _At(f"{TOWER}.embeddings.patch_embeddings.projection", "patches"),
        _At(f"{TOWER}.encoder.layer.0.attention", "attention rows", has=("q_proj", "k_proj", "head_dim")),
        _At(".model.pixel_shuffle", "squares of patches", takes=("vision_features", "scale_factor")),
    ),
    "gemma3": (
        *SHARED,
        *prompt(),
        *repeated(),
        *decoder(LANGUAGE, normed=True, window=True),
        *clip(TOWER),
        _At(f"{LANGUAGE}.rotary_emb", "positions per kind of layer", takes=("layer_type",)),
        _At(".model.multi_modal_projector", "squares of patches", has=("kernel_size", "tokens_per_side", "avg_pool")),
    ),
    "mistral3": (
        *ROWS,
        _At(TOWER, "the vision tower", takes=("pixel_values", "image_sizes"), has=("patch_conv", "patch_size")),
        _At(f"{TOWER}.transformer.layers.0.attention", "attention rows", has=("q_proj", "k_proj", "head_dim")),
        _At(f"{TOWER}@apply_rotary_pos_emb", "attention rows", takes=("q", "k", "cos", "sin", "unsqueeze_dim")),
    ),
    "idefics3": (
        *SHARED,
        *prompt(),
        *repeated(),
        *decoder(".model.text_model"),
        *clip(".model.vision_model"),
        _At(".model.connector.pixel_shuffle", "squares of patches", takes=("x", "scale_factor")),
    ),
    "blip2": (
        _At(".", "calls of the model", takes=("input_ids", "attention_mask")),
        _At(".vision_model", "the vision tower", takes=("pixel_values",), has=("embeddings", "post_layernorm")),
        _At(".vision_model.encoder.layers.0.self_attn", "attention rows", has=("qkv", "num_heads", "scale")),
        _At(".qformer", "what the queries read", takes=("encoder_hidden_states", "encoder_attention_mask")),
        _At(".qformer.encoder.layer.0", "FLOPs", has=("attention", "intermediate_query", "output_query")),
        _At(".", "FLOPs", has=("query_tokens", "language_projection", "language_model")),
    ),
}
