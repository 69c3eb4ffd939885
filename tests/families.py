"""Tiny random checkpoints of every family, made from configuration classes, and prompts that fit them.

Only the sizes are small. What else shapes a computation is that of a published configuration, named at each family:
which layers slide, where norms and biases are, how many query heads share a key, which blocks have windows, how rotary
angles are divided, at how many depths visual features are added. VARIANTS are structures that others publish.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from types import SimpleNamespace
from typing import Any

import torch
from packaging.version import Version
from torch import Tensor, nn

IMAGE, VIDEO, PAD = 190, 191, 0
TEXT = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 200,
    "pad_token_id": PAD,
    "bos_token_id": 1,
    "eos_token_id": 199,
    "max_position_embeddings": 1024,
}
VISION = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}
STAGES = ("pixels", "vit", "projector", "llm")


class Numbers:
    """A tokenizer whose words are the numbers of their ids."""

    def decode(self, ids: Tensor, **kwargs: Any) -> str:
        return f"USER: {ids.tolist()} ASSISTANT:"

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        return {"input_ids": [int(number) for number in re.findall(r"\d+", text)]}


class Processor:
    """As much of a processor as the package reads."""

    def __init__(self) -> None:
        self.image_processor = SimpleNamespace(
            image_mean=[0.5] * 3, image_std=[0.25] * 3, do_normalize=True, preprocess=lambda images, **kwargs: images
        )
        self.tokenizer = Numbers()


@dataclass
class Prompt:
    """One sample: ids without padding, and its pixels by argument name."""

    ids: list[int]
    images: dict[str, Tensor] = field(default_factory=dict)
    totals: list[int] = field(default_factory=list)  # placeholders of every image


@dataclass(frozen=True)
class Family:
    """How to build one family, and what its prompts look like."""

    name: str
    build: Callable[[str], nn.Module]  # attention implementation -> model
    sample: Callable[[int, int], Prompt]  # seed, number of images -> one prompt
    batch: Callable[[list[Prompt]], dict[str, Any]]
    stages: tuple[str, ...] = STAGES
    video_stages: tuple[str, ...] = STAGES
    mrope: bool = False
    late: int = 2  # a decoder layer that may be cut
    video: Callable[[int], Prompt] | None = None
    later: Mapping[str, int] = field(default_factory=dict)  # of a new token, in arguments with a value per column


def pixels(*shape: int, seed: int) -> Tensor:
    """Normalised grey levels, exactly recoverable, with flat areas that repeat."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randint(0, 256, (*shape[:-2], shape[-2] // 4, shape[-1] // 4), generator=generator)
    coarse[..., : coarse.shape[-2] // 2, :] = coarse[..., :1, :1]  # the upper half repeats itself
    levels = coarse.repeat_interleave(4, -1).repeat_interleave(4, -2)
    return (levels / 255 - 0.5) / 0.25


def text(heads: int, keys: int, **more: Any) -> dict[str, Any]:
    """A language model's sizes: query heads, key heads; heads of width 8 unless said otherwise."""
    shape = {"num_attention_heads": heads, "num_key_value_heads": keys, "hidden_size": 8 * heads}
    return TEXT | shape | more


def words(n: int, seed: int) -> list[int]:
    return torch.randint(3, 180, (n,), generator=torch.Generator().manual_seed(seed)).tolist()


def padded(prompts: list[Prompt]) -> dict[str, Tensor]:
    """Left-padded ids and mask."""
    longest = max(len(prompt.ids) for prompt in prompts)
    ids = torch.tensor([[PAD] * (longest - len(p.ids)) + p.ids for p in prompts])
    mask = torch.tensor([[0] * (longest - len(p.ids)) + [1] * len(p.ids) for p in prompts])
    return {"input_ids": ids, "attention_mask": mask}


def stacked(prompts: list[Prompt]) -> dict[str, Any]:
    """Ids, mask, and the pixels of all prompts one after the other."""
    names = dict.fromkeys(name for prompt in prompts for name in prompt.images)
    return padded(prompts) | {n: torch.cat([p.images[n] for p in prompts if n in p.images]) for n in names}


def _text(blocks: list[list[int]], seed: int) -> list[int]:
    """Words around blocks of placeholders."""
    ids = words(3, seed)
    for number, block in enumerate(blocks):
        ids += block + words(2 + number, seed + number + 1)
    return ids + words(2 + seed % 4, seed + 9)


def _model(cls: type, config: Any, attention: str | dict[str, str]) -> nn.Module:
    torch.manual_seed(0)
    config._attn_implementation = attention
    model = cls._from_config(config, attn_implementation=attention).eval()
    for name, parameter in model.named_parameters():  # zero-initialised tables would hide mistakes
        if not parameter.any():
            nn.init.normal_(parameter, std=0.02)
        elif parameter.ndim > 1 and "embed" not in name:
            parameter.data.mul_(4)
    model.lm_head.weight.data[[IMAGE, VIDEO]] = 0  # hosts fail on an answer with placeholders
    model.generation_config.pad_token_id = PAD
    model.generation_config.eos_token_id = None
    return model


# -- LLaVA with SigLIP ------------------------------------------------------------------------------------------------


def _llava_siglip(attention: str) -> nn.Module:
    """llava-interleave-qwen-7b: every query head has its own key, biases; the tower has no pooling."""
    from transformers import Qwen2Config

    return _siglip(attention, Qwen2Config(**text(4, 4)), vision_feature_layer=-1, vision_use_head=False)


def _joycaption(attention: str) -> nn.Module:
    """llama-joycaption-beta-one: the last but one layer is projected, the tower pools; LLaMA 3.1, 32 / 8 heads."""
    from transformers import LlamaConfig

    return _siglip(attention, LlamaConfig(**text(4, 1)), vision_feature_layer=-2, vision_use_head=True)


def _siglip(attention: str, language: Any, vision_feature_layer: int, vision_use_head: bool) -> nn.Module:
    from transformers import LlavaConfig, LlavaForConditionalGeneration, SiglipVisionConfig

    config = LlavaConfig(
        vision_config=SiglipVisionConfig(**VISION, patch_size=4, image_size=24, vision_use_head=vision_use_head),
        text_config=language,
        image_token_id=IMAGE,
        vision_feature_layer=vision_feature_layer,
        vision_feature_select_strategy="full",
    )
    return _model(LlavaForConditionalGeneration, config, attention)


def _siglip_sample(seed: int, images: int) -> Prompt:
    values = pixels(images, 3, 24, 24, seed=seed)
    return Prompt(_text([[IMAGE] * 36] * images, seed), {"pixel_values": values}, [36] * images)


# -- LLaVA-NeXT -------------------------------------------------------------------------------------------------------

NEXT_SIZES = [(20, 30), (30, 16), (16, 16)]
PINPOINTS = [[16, 32], [32, 16], [32, 32]]


def _llava_next(attention: str) -> nn.Module:
    """llava-v1.6-mistral-7b: four query heads share a key, no sliding window."""
    from transformers import MistralConfig

    return _next(attention, MistralConfig(**text(4, 1), sliding_window=None))


def _llava_next_vicuna(attention: str) -> nn.Module:
    """llava-v1.6-vicuna-7b: every query head has its own key."""
    from transformers import LlamaConfig

    return _next(attention, LlamaConfig(**text(4, 4)))


def _next(attention: str, language: Any) -> nn.Module:
    from transformers import CLIPVisionConfig, LlavaNextConfig, LlavaNextForConditionalGeneration

    vision = CLIPVisionConfig(**VISION, patch_size=4, image_size=16, projection_dim=16)
    config = LlavaNextConfig(
        vision_config=vision, text_config=language, image_token_id=IMAGE, image_grid_pinpoints=PINPOINTS
    )
    return _model(LlavaNextForConditionalGeneration, config, attention)


def _next_sample(seed: int, images: int) -> Prompt:
    from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches

    sizes = [NEXT_SIZES[(seed + n) % len(NEXT_SIZES)] for n in range(images)]
    tiles = [image_size_to_num_patches(size, PINPOINTS, 16) for size in sizes]
    values = torch.zeros(images, 5, 3, 16, 16)
    for number, count in enumerate(tiles):
        values[number, :count] = pixels(count, 3, 16, 16, seed=seed * 10 + number)
    blocks = [[IMAGE] * _next_rows(size) for size in sizes]
    return Prompt(
        _text(blocks, seed), {"pixel_values": values, "image_sizes": torch.tensor(sizes)}, list(map(len, blocks))
    )


def _next_rows(size: tuple[int, int]) -> int:
    return sum(anyres_rows(size, PINPOINTS, 16, 4))


def anyres_rows(size: tuple[int, int], pinpoints: list[list[int]], side: int, grid: int) -> tuple[int, int]:
    """Rows of an image (height, width) in tiles of grid x grid patches: base and unpadded crops, and newlines."""
    from transformers.models.llava_next.modeling_llava_next import get_anyres_image_grid_shape, unpad_image

    rows, columns = get_anyres_image_grid_shape(size, pinpoints, side)
    _, height, width = unpad_image(torch.zeros(1, rows * grid, columns * grid), size).shape
    return grid * grid + height * width, height


def _llava_next_video(attention: str) -> nn.Module:
    """LLaVA-NeXT-Video-7B: Vicuna, squares of 2 x 2 patches of a frame averaged."""
    from transformers import (
        CLIPVisionConfig,
        LlamaConfig,
        LlavaNextVideoConfig,
        LlavaNextVideoForConditionalGeneration,
    )

    config = LlavaNextVideoConfig(
        vision_config=CLIPVisionConfig(**VISION, patch_size=4, image_size=16, projection_dim=16),
        text_config=LlamaConfig(**text(4, 4)),
        image_token_index=IMAGE,
        video_token_index=VIDEO,
        image_grid_pinpoints=PINPOINTS,
    )
    return _model(LlavaNextVideoForConditionalGeneration, config, attention)


def _next_video(seed: int) -> Prompt:
    values = pixels(1, 3, 3, 16, 16, seed=seed)  # three frames of 2 x 2 pooled rows
    return Prompt(_text([[VIDEO] * 12], seed), {"pixel_values_videos": values}, [12])


# -- Qwen -------------------------------------------------------------------------------------------------------------

QWEN_GRIDS = [(1, 8, 12), (1, 12, 4), (1, 4, 4)]
QWEN_VISION = {"depth": 3, "num_heads": 4, "patch_size": 4, "spatial_merge_size": 2, "temporal_patch_size": 2}
QWEN2_TEXT = text(7, 1, hidden_size=112) | {  # the 7B: 28 / 4 heads of 128, angles in parts of 16, 24 and 24 of 64
    "rope_parameters": {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 1000000.0},
    "use_sliding_window": False,
}
QWEN3_TEXT = text(4, 1, hidden_size=32, head_dim=32, num_hidden_layers=12) | {  # the 8B: 32 / 8 heads, 24, 20, 20 of 64
    "rope_parameters": {
        "rope_type": "default",
        "mrope_interleaved": True,
        "mrope_section": [6, 5, 5],
        "rope_theta": 5000000.0,
    },
}


def _qwen2_vl(attention: str) -> nn.Module:
    """Qwen2-VL-7B."""
    from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

    vision = QWEN_VISION | {"embed_dim": 32, "hidden_size": 112, "mlp_ratio": 2, "in_channels": 3}
    return _qwen(Qwen2VLConfig, Qwen2VLForConditionalGeneration, vision, QWEN2_TEXT, attention)


def _qwen2_5_vl(attention: str) -> nn.Module:
    """Qwen2.5-VL-7B: windows but for every so-many-th block, the last among them."""
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    vision = QWEN_VISION | {
        "depth": 4,
        "hidden_size": 32,
        "intermediate_size": 48,
        "out_hidden_size": 112,
        "window_size": 16,
        "fullatt_block_indexes": [1, 3],
    }
    return _qwen(Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, vision, QWEN2_TEXT, attention)


def _qwen3_vl(attention: str) -> nn.Module:
    """Qwen3-VL-8B: features of three depths, none of them the last, are added in the first three decoder layers."""
    from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

    vision = QWEN_VISION | {
        "depth": 4,
        "hidden_size": 32,
        "intermediate_size": 48,
        "out_hidden_size": 32,
        "num_position_embeddings": 16,
        "deepstack_visual_indexes": [0, 1, 2],
    }
    return _qwen(Qwen3VLConfig, Qwen3VLForConditionalGeneration, vision, QWEN3_TEXT, attention)


def _qwen3_vl_moe(attention: str) -> nn.Module:
    """Qwen3-VL-30B-A3B: 32 / 4 heads, every layer has experts (128, of which a token passes 8)."""
    from transformers import Qwen3VLMoeConfig, Qwen3VLMoeForConditionalGeneration

    vision = QWEN_VISION | {
        "depth": 4,
        "hidden_size": 32,
        "intermediate_size": 48,
        "out_hidden_size": 32,
        "num_position_embeddings": 16,
        "deepstack_visual_indexes": [0, 1, 2],
    }
    experts = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "decoder_sparse_step": 1}
    language = QWEN3_TEXT | {"mlp_only_layers": []} | experts
    return _qwen(Qwen3VLMoeConfig, Qwen3VLMoeForConditionalGeneration, vision, language, attention)


QWEN3_5_VISION = QWEN_VISION | {
    "hidden_size": 32,
    "intermediate_size": 48,
    "out_hidden_size": 32,
    "num_position_embeddings": 16,
}
QWEN3_5_TEXT = text(4, 1, hidden_size=32, head_dim=32, num_hidden_layers=8) | {
    "layer_types": (["linear_attention"] * 3 + ["full_attention"]) * 2,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "rope_parameters": {
        "rope_type": "default",
        "mrope_interleaved": True,
        "mrope_section": [2, 1, 1],
        "partial_rotary_factor": 0.25,
        "rope_theta": 10000000.0,
    },
}


def _qwen3_5(attention: str) -> nn.Module:
    """Qwen3.5-9B: three recurrent layers, then one with gated attention (16 / 4 heads), a quarter of it turned."""
    from transformers import Qwen3_5Config, Qwen3_5ForConditionalGeneration

    return _qwen(Qwen3_5Config, Qwen3_5ForConditionalGeneration, QWEN3_5_VISION, QWEN3_5_TEXT, attention)


def _qwen3_5_moe(attention: str) -> nn.Module:
    """Qwen3.5-35B-A3B: 16 / 2 heads, experts and one that every token passes."""
    from transformers import Qwen3_5MoeConfig, Qwen3_5MoeForConditionalGeneration

    experts = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
    language = QWEN3_5_TEXT | experts | {"shared_expert_intermediate_size": 24}
    return _qwen(Qwen3_5MoeConfig, Qwen3_5MoeForConditionalGeneration, QWEN3_5_VISION, language, attention)


def _qwen(config: type, model: type, vision: dict[str, Any], language: dict[str, Any], attention: str) -> nn.Module:
    built = config(vision_config=vision, text_config=dict(language), image_token_id=IMAGE, video_token_id=VIDEO)
    return _model(model, built, attention)


def _qwen_sample(seed: int, images: int) -> Prompt:
    grids = [QWEN_GRIDS[(seed + n) % len(QWEN_GRIDS)] for n in range(images)]
    values = [_patches(grid, seed * 10 + n) for n, grid in enumerate(grids)]
    blocks = [[IMAGE] * (t * h * w // 4) for t, h, w in grids]
    images = {"pixel_values": torch.cat(values), "image_grid_thw": torch.tensor(grids)}
    return Prompt(_text(blocks, seed), images, list(map(len, blocks)))


def _qwen_video(seed: int) -> Prompt:
    grid = (3, 4, 8)
    values = _patches(grid, seed)
    ids = _text([[VIDEO] * (3 * 4 * 8 // 4)], seed)
    return Prompt(ids, {"pixel_values_videos": values, "video_grid_thw": torch.tensor([grid])}, [24])


def _qwen3_video(seed: int) -> Prompt:
    prompt = _qwen_video(seed)
    prompt.ids = _text([[VIDEO] * 8] * 3, seed)  # a time stamp between frames
    return prompt


def _patches(grid: tuple[int, int, int], seed: int) -> Tensor:
    """Patches in merge-unit order, the frame repeated in time: [t h w, 3 * 2 * 4 * 4]."""
    t, h, w = grid
    image = pixels(t, 3, h * 4, w * 4, seed=seed).view(t, 3, h // 2, 2, 4, w // 2, 2, 4)
    units = image.permute(0, 2, 5, 3, 6, 1, 4, 7).reshape(t * h * w, 3, 1, 4, 4)
    return units.expand(-1, -1, 2, -1, -1).flatten(1)


def _qwen_batch(prompts: list[Prompt]) -> dict[str, Any]:
    inputs = stacked(prompts)
    ids = inputs["input_ids"]
    return inputs | {"mm_token_type_ids": (ids == IMAGE).int() + 2 * (ids == VIDEO).int()}


MARKS = 185, 186  # in front of a picture and behind it
AUDIO, SPOKEN = 193, (187, 188)


def _qwen2_5_omni(attention: str) -> nn.Module:
    """The thinker of Qwen2.5-Omni-7B: Qwen2.5-VL's tower with projections of their own for q, k and v."""
    from transformers import Qwen2_5OmniThinkerConfig, Qwen2_5OmniThinkerForConditionalGeneration

    vision = QWEN_VISION | {
        "depth": 4,
        "hidden_size": 32,
        "intermediate_size": 48,
        "out_hidden_size": 112,
        "window_size": 16,
        "fullatt_block_indexes": [1, 3],
    }
    audio = {"num_mel_bins": 8, "encoder_layers": 1, "encoder_attention_heads": 2, "encoder_ffn_dim": 16}
    audio |= {"d_model": 16, "n_window": 20, "output_dim": 112, "max_source_positions": 40}
    config = Qwen2_5OmniThinkerConfig(
        audio_config=audio,
        vision_config=vision,
        text_config=dict(QWEN2_TEXT),
        image_token_index=IMAGE,
        video_token_index=VIDEO,
        audio_token_index=AUDIO,
        vision_start_token_id=MARKS[0],
        vision_end_token_id=MARKS[1],
        audio_start_token_id=SPOKEN[0],
        audio_end_token_id=SPOKEN[1],
    )
    return _model(Qwen2_5OmniThinkerForConditionalGeneration, config, attention)


def _qwen3_omni_moe(attention: str) -> nn.Module:
    """The thinker of Qwen3-Omni-30B-A3B: Qwen3-VL's tower and features of three depths, experts in every layer."""
    from transformers import Qwen3OmniMoeThinkerConfig, Qwen3OmniMoeThinkerForConditionalGeneration

    vision = QWEN_VISION | {
        "depth": 4,
        "hidden_size": 32,
        "intermediate_size": 48,
        "out_hidden_size": 32,
        "num_position_embeddings": 16,
        "deepstack_visual_indexes": [0, 1, 2],
    }
    audio = {"num_mel_bins": 8, "encoder_layers": 1, "encoder_attention_heads": 2, "encoder_ffn_dim": 16}
    audio |= {"d_model": 16, "n_window": 20, "output_dim": 32, "max_source_positions": 40, "downsample_hidden_size": 4}
    experts = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "decoder_sparse_step": 1}
    config = Qwen3OmniMoeThinkerConfig(
        audio_config=audio,
        vision_config=vision,
        text_config=QWEN3_TEXT | {"mlp_only_layers": []} | experts,
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        audio_token_id=AUDIO,
        vision_start_token_id=MARKS[0],
        vision_end_token_id=MARKS[1],
        audio_start_token_id=SPOKEN[0],
        audio_end_token_id=SPOKEN[1],
    )
    return _model(Qwen3OmniMoeThinkerForConditionalGeneration, config, attention)


def _omni_sample(seed: int, images: int) -> Prompt:
    prompt = _qwen_sample(seed, images)
    prompt.ids = _text([[MARKS[0], *[IMAGE] * n, MARKS[1]] for n in prompt.totals], seed)
    return prompt


def _omni_video(seed: int) -> Prompt:
    prompt = _qwen_video(seed)
    prompt.ids = _text([[MARKS[0], *[VIDEO] * 24, MARKS[1]]], seed)
    prompt.images["video_second_per_grid"] = torch.tensor([0.2])
    return prompt


GLM_VISION = QWEN_VISION | {"image_size": 16, "hidden_size": 32, "intermediate_size": 48, "out_hidden_size": 64}
GLM_TEXT = text(4, 1, hidden_size=64) | {
    "rope_parameters": {
        "rope_type": "default",
        "partial_rotary_factor": 0.5,
        "mrope_section": [1, 1, 2],
        "rope_theta": 10000.0,
    }
}


def _glm4v(attention: str) -> nn.Module:
    """GLM-4.1V-9B: 32 / 2 heads with biases, half of a head turned, norms before and behind attention and MLP."""
    from transformers import Glm4vConfig, Glm4vForConditionalGeneration

    return _glm(Glm4vConfig, Glm4vForConditionalGeneration, GLM_VISION, GLM_TEXT, attention)


def _glm46v(attention: str) -> nn.Module:
    """GLM-4.6V-Flash: as GLM-4.1V."""
    from transformers import Glm46VConfig, Glm46VForConditionalGeneration

    kinds = {"model_type": "glm4v_vision"}, {"model_type": "glm4v_text"}
    parts = GLM_VISION | kinds[0], GLM_TEXT | kinds[1]
    return _glm(Glm46VConfig, Glm46VForConditionalGeneration, *parts, attention)


def _glm4v_moe(attention: str) -> nn.Module:
    """GLM-4.5V: 96 / 8 heads, the first layer without experts, then some of 128 and one that every token passes."""
    from transformers import Glm4vMoeConfig, Glm4vMoeForConditionalGeneration

    experts = {"n_routed_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "first_k_dense_replace": 1}
    return _glm(Glm4vMoeConfig, Glm4vMoeForConditionalGeneration, GLM_VISION, GLM_TEXT | experts, attention)


def _glm(*parts: Any) -> nn.Module:
    """Unequal gains in the norm in front of the convolution: with equal ones all of its inputs are equally long."""
    model = _qwen(*parts)
    nn.init.uniform_(model.model.visual.post_layernorm.weight, 0.5, 1.5)
    return model


def _glm_video(seed: int) -> Prompt:
    """A frame's placeholders are an image's, with something between two frames."""
    prompt = _qwen_video(seed)
    prompt.ids = _text([[IMAGE] * 8] * 3, seed)
    return prompt


def _glm_batch(prompts: list[Prompt]) -> dict[str, Any]:
    inputs = stacked(prompts)
    kind = 2 if "pixel_values_videos" in inputs else 1
    return inputs | {"mm_token_type_ids": kind * (inputs["input_ids"] == IMAGE).int()}


# -- MiniCPM-V --------------------------------------------------------------------------------------------------------

CPM_SIZES = [(8, 12), (12, 4), (4, 8)]  # rows and columns of patches; 4 x 4 of them are a token
CPM_TEXT = QWEN3_5_TEXT | {"linear_num_key_heads": 4}


def _minicpmv4_6(attention: str) -> nn.Module:
    """MiniCPM-V-4.6: Qwen3.5 (heads as in its 0.8B: 8 / 2, and as many for keys as for values in recurrent layers) with
    a tied output layer; 2 x 2 patches are merged behind an early block of the tower, 2 x 2 of these behind it."""
    from transformers import MiniCPMV4_6Config, MiniCPMV4_6ForConditionalGeneration

    return _cpm(MiniCPMV4_6Config, MiniCPMV4_6ForConditionalGeneration, attention)


def _minicpmv4_7(attention: str) -> nn.Module:
    """As MiniCPM-V-4.6, with three axes of positions, which marks around a picture and its slices tell."""
    from transformers import MiniCPMV4_7Config, MiniCPMV4_7ForConditionalGeneration

    marks = dict(zip(("image_start_id", "image_end_id", "slice_start_id", "slice_end_id"), CPM_MARKS, strict=True))
    return _cpm(MiniCPMV4_7Config, MiniCPMV4_7ForConditionalGeneration, attention, newline_id=184, **marks)


def _minicpmv4_6_4x(attention: str) -> nn.Module:
    """MiniCPM-V-4.6 as it can be told to read details: nothing is merged inside its tower."""
    from transformers import MiniCPMV4_6Config, MiniCPMV4_6ForConditionalGeneration

    return _cpm(MiniCPMV4_6Config, MiniCPMV4_6ForConditionalGeneration, attention, downsample_mode="4x")


def _cpm(config: type, model: type, attention: str, **more: Any) -> nn.Module:
    vision = VISION | {"num_hidden_layers": 4, "patch_size": 4, "image_size": 40}
    built = config(
        vision_config=vision | {"model_type": f"{config.model_type}_vision"},
        text_config=CPM_TEXT | {"model_type": "qwen3_5_text", "tie_word_embeddings": True},
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        insert_layer_id=1,
        image_size=40,
        tie_word_embeddings=True,
        **more,
    )
    return _model(model, built, attention)


CPM_MARKS = 185, 186, 187, 188  # in front of a picture and behind it, and the same of a slice


def _cpm_sample(seed: int, images: int, square: int = 16) -> Prompt:
    """Pictures; the second is a slice of the first."""
    sizes = [CPM_SIZES[(seed + n) % len(CPM_SIZES)] for n in range(images)]
    values = torch.cat([_side_by_side(size, seed * 10 + n) for n, size in enumerate(sizes)], dim=-1)
    seen = {"pixel_values": values, "target_sizes": torch.tensor(sizes)}
    return Prompt(*_cpm_text(sizes, IMAGE, seed, seen, square=square))


def _cpm_sample_4x(seed: int, images: int) -> Prompt:
    return _cpm_sample(seed, images, square=4)


def _cpm_video(seed: int) -> Prompt:
    sizes = [(8, 8)] * 3
    values = torch.cat([_side_by_side(size, seed * 10 + n) for n, size in enumerate(sizes)], dim=-1)
    seen = {"pixel_values_videos": values, "target_sizes_videos": torch.tensor(sizes)}
    return Prompt(*_cpm_text(sizes, VIDEO, seed, seen, slices=False))


def _cpm_text(
    sizes: list[tuple[int, int]], token: int, seed: int, seen: dict[str, Tensor], slices: bool = True, square: int = 16
) -> tuple[list[int], dict[str, Tensor], list[int]]:
    totals = [rows * columns // square for rows, columns in sizes]
    first, last, begin, end = CPM_MARKS
    block = []
    for n, total in enumerate(totals):
        marks = (begin, end) if n and slices else (first, last)
        block += [marks[0], *[token] * total, marks[1]]
    return _text([block], seed), seen, totals


def _side_by_side(size: tuple[int, int], seed: int) -> Tensor:
    """Patches in raster order, [1, 3, 4, 4 h w]."""
    image = pixels(3, size[0] * 4, size[1] * 4, seed=seed)
    return image.unfold(1, 4, 4).unfold(2, 4, 4).flatten(1, 2).transpose(1, 2).flatten(2)[None]


def _cpm_batch(prompts: list[Prompt]) -> dict[str, Any]:
    inputs = padded(prompts)
    for name in dict.fromkeys(name for prompt in prompts for name in prompt.images):
        dim = -1 if name.startswith("pixel") else 0
        inputs[name] = torch.cat([prompt.images[name] for prompt in prompts if name in prompt.images], dim)
    return inputs


def _cpm_typed(prompts: list[Prompt]) -> dict[str, Any]:
    inputs = _cpm_batch(prompts)
    return inputs | {"mm_token_type_ids": (inputs["input_ids"] == IMAGE).int() + 2 * (inputs["input_ids"] == VIDEO)}


# -- LLaVA-OneVision --------------------------------------------------------------------------------------------------


def _llava_onevision(attention: str) -> nn.Module:
    """llava-onevision-qwen2-7b-ov: 28 / 4 heads with biases; the whole output of a tower without a class token."""
    from transformers import (
        LlavaOnevisionConfig,
        LlavaOnevisionForConditionalGeneration,
        Qwen2Config,
        SiglipVisionConfig,
    )

    config = LlavaOnevisionConfig(
        vision_config=SiglipVisionConfig(**VISION, patch_size=4, image_size=16, vision_use_head=False),
        text_config=Qwen2Config(**text(7, 1)),
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        image_grid_pinpoints=PINPOINTS,
        vision_feature_layer=-1,
    )
    return _model(LlavaOnevisionForConditionalGeneration, config, attention)


def _onevision_video(seed: int) -> Prompt:
    values = pixels(1, 3, 3, 16, 16, seed=seed)  # three frames of 2 x 2 pooled rows, and a newline
    return Prompt(_text([[VIDEO] * (3 * 4 + 1)], seed), {"pixel_values_videos": values}, [13])


# -- InternVL, Gemma 3, Mistral 3, Idefics3 ---------------------------------------------------------------------------


def _internvl(attention: str) -> nn.Module:
    """InternVL3-8B-hf: biases in the tower, Qwen2 with 28 / 4 heads."""
    from transformers import Qwen2Config

    return _intern(attention, Qwen2Config(**text(7, 1)), attention_bias=True)


def _internvl3_5(attention: str) -> nn.Module:
    """InternVL3_5-8B-HF: Qwen3, whose heads have norms and a width of their own."""
    from transformers import Qwen3Config

    return _intern(attention, Qwen3Config(**text(4, 1, hidden_size=32, head_dim=16)), attention_bias=True)


def _internvl_6b(attention: str) -> nn.Module:
    """InternVL3-78B-hf: the large tower has RMS norms, also of queries and keys over all heads, and no biases."""
    from transformers import Qwen2Config

    large = {"use_qk_norm": True, "norm_type": "rms_norm", "attention_bias": False}
    return _intern(attention, Qwen2Config(**text(8, 1)), **large)


def _intern(attention: str, language: Any, **tower: Any) -> nn.Module:
    from transformers import InternVLConfig, InternVLForConditionalGeneration
    from transformers.models.internvl import InternVLVisionConfig

    vision = InternVLVisionConfig(**VISION, patch_size=[4, 4], image_size=[24, 24], **tower)
    config = InternVLConfig(vision_config=vision, text_config=language, image_token_id=IMAGE)
    return _model(InternVLForConditionalGeneration, config, attention)


def _internvl_sample(seed: int, images: int) -> Prompt:
    tiles = [1 + (seed + n) % 3 for n in range(images)]
    values = pixels(sum(tiles), 3, 24, 24, seed=seed)
    return Prompt(_text([[IMAGE] * (9 * n) for n in tiles], seed), {"pixel_values": values}, [9 * n for n in tiles])


GEMMA_LAYERS = ["full_attention" if layer % 6 == 5 else "sliding_attention" for layer in range(8)]
GEMMA_ROPE = {
    "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
    "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1000000.0},
}


def _gemma3(attention: str) -> nn.Module:
    """gemma-3-4b-it: five sliding layers, a full one, and so on, with two rotary tables; windows of a few images."""
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration, Gemma3TextConfig, SiglipVisionConfig

    config = Gemma3Config(
        vision_config=SiglipVisionConfig(**VISION, patch_size=4, image_size=32, vision_use_head=False),
        text_config=Gemma3TextConfig(
            **text(4, 2, num_hidden_layers=len(GEMMA_LAYERS), head_dim=12),
            sliding_window=24,
            query_pre_attn_scalar=12,
            layer_types=GEMMA_LAYERS,
            rope_parameters=GEMMA_ROPE,
        ),
        mm_tokens_per_image=16,
        image_token_id=IMAGE,
    )
    return _model(Gemma3ForConditionalGeneration, config, attention)


def _gemma3_sample(seed: int, images: int) -> Prompt:
    values = pixels(images, 3, 32, 32, seed=seed)
    return Prompt(_text([[IMAGE] * 16] * images, seed), {"pixel_values": values}, [16] * images)


def _gemma3_batch(prompts: list[Prompt]) -> dict[str, Any]:
    inputs = stacked(prompts)
    return inputs | {"token_type_ids": (inputs["input_ids"] == IMAGE).int()}


GEMMA4_GRIDS, GEMMA4_PATCHES = [(2, 3), (3, 2), (2, 2)], 63  # rows and columns of tokens; the largest has 54 patches


def _gemma4(attention: str) -> nn.Module:
    """Without experts, inputs per layer and shared caches, by transformers' configuration class (no published
    configuration was at hand): five sliding layers and a full one, whose heads are wider and fewer and whose keys are
    its values; images attend both ways in the sliding ones."""
    from transformers import Gemma4Config, Gemma4ForConditionalGeneration, Gemma4TextConfig, Gemma4VisionConfig

    config = Gemma4Config(
        vision_config=Gemma4VisionConfig(
            **VISION,
            num_key_value_heads=4,
            head_dim=8,
            patch_size=4,
            position_embedding_size=256,
            standardize=True,
        ),
        text_config=Gemma4TextConfig(
            **text(4, 2, num_hidden_layers=6, head_dim=8),
            global_head_dim=16,
            num_global_key_value_heads=1,
            attention_k_eq_v=True,
            sliding_window=24,
            final_logit_softcapping=30.0,
            use_bidirectional_attention="vision",
            hidden_size_per_layer_input=0,
        ),
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        audio_token_id=192,
    )
    model = _model(Gemma4ForConditionalGeneration, config, attention)
    model.model.vision_tower.std_bias.zero_(), model.model.vision_tower.std_scale.fill_(1)
    return model


def _gemma4_sample(seed: int, images: int) -> Prompt:
    values, places, totals = [], [], []
    for n in range(images):
        rows, columns = GEMMA4_GRIDS[(seed + n) % len(GEMMA4_GRIDS)]
        image = pixels(3, 12 * rows, 12 * columns, seed=seed + n) * 0.25 + 0.5
        patches = image.unfold(1, 4, 4).unfold(2, 4, 4).permute(1, 2, 3, 4, 0).flatten(2).flatten(0, 1)
        where = torch.cartesian_prod(torch.arange(3 * rows), torch.arange(3 * columns)).flip(1)
        filled = GEMMA4_PATCHES - len(patches)
        values.append(nn.functional.pad(patches, (0, 0, 0, filled)))
        places.append(nn.functional.pad(where, (0, 0, 0, filled), value=-1))
        totals.append(rows * columns)
    seen = {"pixel_values": torch.stack(values), "image_position_ids": torch.stack(places)}
    return Prompt(_text([[IMAGE] * total for total in totals], seed), seen, totals)


def _gemma4_batch(prompts: list[Prompt]) -> dict[str, Any]:
    inputs = stacked(prompts)
    return inputs | {"mm_token_type_ids": (inputs["input_ids"] == IMAGE).int()}


MISTRAL_SIZES = [(16, 24), (24, 16), (16, 16)]
BREAK = 192


def _mistral3(attention: str) -> nn.Module:
    """Mistral-Small-3.1-24B: 32 / 8 heads of a width of their own, no sliding window."""
    from transformers import Mistral3Config, Mistral3ForConditionalGeneration, MistralConfig, PixtralVisionConfig

    config = Mistral3Config(
        vision_config=PixtralVisionConfig(**VISION, head_dim=8, patch_size=4, image_size=32),
        text_config=MistralConfig(**text(4, 1, head_dim=12), sliding_window=None),
        image_token_index=IMAGE,
        spatial_merge_size=2,
        vision_feature_layer=-1,
    )
    return _model(Mistral3ForConditionalGeneration, config, attention)


def _mistral3_sample(seed: int, images: int) -> Prompt:
    sizes = [MISTRAL_SIZES[(seed + n) % len(MISTRAL_SIZES)] for n in range(images)]
    values = torch.zeros(images, 3, 24, 24)
    for number, (height, width) in enumerate(sizes):
        values[number, :, :height, :width] = pixels(3, height, width, seed=seed * 10 + number)
    blocks = [([IMAGE] * (width // 8) + [BREAK]) * (height // 8) for height, width in sizes]
    totals = [block.count(IMAGE) for block in blocks]
    return Prompt(_text(blocks, seed), {"pixel_values": values, "image_sizes": torch.tensor(sizes)}, totals)


def _idefics3(attention: str) -> nn.Module:
    """Idefics3-8B-Llama3: 32 / 8 heads, squares of 2 x 2."""
    from transformers import Idefics3Config, Idefics3ForConditionalGeneration, LlamaConfig

    vision = VISION | {"patch_size": 4, "image_size": 24}
    language = LlamaConfig(**text(4, 1))
    config = Idefics3Config(
        vision_config=vision, text_config=language, image_token_id=IMAGE, scale_factor=2, pad_token_id=PAD
    )
    return _model(Idefics3ForConditionalGeneration, config, attention)


def _smolvlm(attention: str) -> nn.Module:
    """SmolVLM2-2.2B: every query head has its own key, squares of 3 x 3."""
    from transformers import LlamaConfig, SmolVLMConfig, SmolVLMForConditionalGeneration

    vision = VISION | {"patch_size": 4, "image_size": 24}
    language = LlamaConfig(**text(4, 4))
    config = SmolVLMConfig(
        vision_config=vision, text_config=language, image_token_id=IMAGE, scale_factor=3, pad_token_id=PAD
    )
    return _model(SmolVLMForConditionalGeneration, config, attention)


def _idefics3_sample(seed: int, images: int) -> Prompt:
    return _connected(seed, images, 9)


def _smolvlm_sample(seed: int, images: int) -> Prompt:
    return _connected(seed, images, 4)


def _connected(seed: int, images: int, rows: int) -> Prompt:
    """Tiles of so many rows each."""
    values = torch.zeros(1, 3, 3, 24, 24)  # up to three tiles, the rest is padding
    values[0, :images] = pixels(images, 3, 24, 24, seed=seed)
    return Prompt(_text([[IMAGE] * rows] * images, seed), {"pixel_values": values}, [rows] * images)


# -- PaliGemma, Aya Vision, Command A Vision --------------------------------------------------------------------------


def _paligemma(attention: str) -> nn.Module:
    """paligemma-3b-mix-224: 8 / 1 heads; the prompt attends both ways."""
    from transformers import GemmaConfig

    return _prefix(attention, GemmaConfig(**text(8, 1, head_dim=8)))


def _paligemma2(attention: str) -> nn.Module:
    """paligemma2-3b-mix-224: 8 / 4 heads of a width of their own, every other layer slides, bounded logits.

    The bound is as much smaller as the logits of random weights are. Its language model knows eager attention only.
    """
    from transformers import Gemma2Config

    bounds = {"attn_logit_softcapping": 1.5, "final_logit_softcapping": 3.0, "query_pre_attn_scalar": 12}
    kernels = {"": "eager", "text_config": "eager", "vision_config": attention}
    return _prefix(kernels, Gemma2Config(**text(8, 4, head_dim=12), sliding_window=24, **bounds))


def _prefix(attention: str | dict[str, str], language: Any) -> nn.Module:
    from transformers import PaliGemmaConfig, PaliGemmaForConditionalGeneration, SiglipVisionConfig

    config = PaliGemmaConfig(
        vision_config=SiglipVisionConfig(**VISION, patch_size=4, image_size=16, vision_use_head=False),
        text_config=language,
        image_token_index=IMAGE,
        projection_dim=language.hidden_size,
        hidden_size=language.hidden_size,
    )
    return _model(PaliGemmaForConditionalGeneration, config, attention)


def _paligemma_sample(seed: int, images: int) -> Prompt:
    values = pixels(images, 3, 16, 16, seed=seed)
    return Prompt(_text([[IMAGE] * 16] * images, seed), {"pixel_values": values}, [16] * images)


def _paligemma_batch(prompts: list[Prompt]) -> dict[str, Any]:
    """Everything is prefix."""
    inputs = stacked(prompts)
    return inputs | {"token_type_ids": torch.zeros_like(inputs["input_ids"])}


COHERE_LAYERS = (["sliding_attention"] * 3 + ["full_attention"]) * 2


def _aya_vision(attention: str) -> nn.Module:
    """aya-vision-8b: three sliding layers, then a full one without rotation; 32 / 8 heads, squares of 2 x 2."""
    from transformers import AyaVisionConfig, AyaVisionForConditionalGeneration

    config = AyaVisionConfig(
        vision_config=_siglip_24(vision_use_head=False), text_config=_cohere2(), image_token_index=IMAGE
    )
    return _model(AyaVisionForConditionalGeneration, config, attention)


def _cohere2_vision(attention: str) -> nn.Module:
    """command-a-vision: as aya-vision, the tower pools."""
    from transformers import Cohere2VisionConfig, Cohere2VisionForConditionalGeneration

    config = Cohere2VisionConfig(
        vision_config=_siglip_24(vision_use_head=True),
        text_config=_cohere2(),
        image_token_id=IMAGE,
        alignment_intermediate_size=48,
    )
    return _model(Cohere2VisionForConditionalGeneration, config, attention)


def _siglip_24(**more: Any) -> Any:
    from transformers import SiglipVisionConfig

    return SiglipVisionConfig(**VISION, patch_size=4, image_size=24, **more)


def _cohere2() -> Any:
    from transformers import Cohere2Config

    sizes = text(4, 1, num_hidden_layers=len(COHERE_LAYERS))
    return Cohere2Config(**sizes, layer_types=COHERE_LAYERS, sliding_window=24)


def _aya_sample(seed: int, images: int) -> Prompt:
    values = pixels(images, 3, 24, 24, seed=seed)
    return Prompt(_text([[IMAGE] * 9] * images, seed), {"pixel_values": values}, [9] * images)


FAMILIES = {
    family.name: family
    for family in (
        Family("llava_siglip", _llava_siglip, _siglip_sample, stacked),
        Family("llava_next", _llava_next, _next_sample, stacked),
        Family(
            "llava_next_video",
            _llava_next_video,
            _next_sample,
            stacked,
            video=_next_video,
            video_stages=STAGES[2:],
        ),
        Family(
            "llava_onevision", _llava_onevision, _next_sample, stacked, video=_onevision_video, video_stages=STAGES[2:]
        ),
        Family("qwen2_vl", _qwen2_vl, _qwen_sample, _qwen_batch, video=_qwen_video, mrope=True),
        Family("qwen2_5_vl", _qwen2_5_vl, _qwen_sample, _qwen_batch, video=_qwen_video, mrope=True),
        Family("qwen2_5_omni", _qwen2_5_omni, _omni_sample, stacked, video=_omni_video, mrope=True),
        Family("qwen3_omni_moe", _qwen3_omni_moe, _omni_sample, stacked, video=_omni_video, mrope=True, late=3),
        Family("qwen3_vl", _qwen3_vl, _qwen_sample, _qwen_batch, video=_qwen3_video, mrope=True, late=3),
        Family("qwen3_vl_moe", _qwen3_vl_moe, _qwen_sample, _qwen_batch, video=_qwen3_video, mrope=True, late=3),
        *(
            Family(
                name,
                build,
                _qwen_sample,
                _qwen_batch,
                stages=STAGES[:3],
                video_stages=STAGES[:3],
                video=_qwen3_video,
                mrope=True,
            )
            for name, build in (("qwen3_5", _qwen3_5), ("qwen3_5_moe", _qwen3_5_moe))
        ),
        *(
            Family(name, build, _qwen_sample, _glm_batch, video=_glm_video, mrope=True)
            for name, build in (("glm4v", _glm4v), ("glm46v", _glm46v), ("glm4v_moe", _glm4v_moe))
        ),
        *(
            Family(
                name,
                build,
                _cpm_sample,
                batch,
                stages=STAGES[:3],
                video_stages=STAGES[:3],
                video=_cpm_video,
                mrope=name == "minicpmv4_7",
            )
            for name, build, batch in (
                ("minicpmv4_6", _minicpmv4_6, _cpm_batch),
                ("minicpmv4_7", _minicpmv4_7, _cpm_typed),
            )
        ),
        Family("internvl", _internvl, _internvl_sample, stacked),
        Family("gemma3", _gemma3, _gemma3_sample, _gemma3_batch),
        Family("gemma4", _gemma4, _gemma4_sample, _gemma4_batch, stages=STAGES[2:3]),
        Family("mistral3", _mistral3, _mistral3_sample, stacked, stages=STAGES[2:]),
        Family("idefics3", _idefics3, _idefics3_sample, stacked, stages=STAGES[2:]),
        Family("smolvlm", _smolvlm, _smolvlm_sample, stacked, stages=STAGES[2:]),
        *(
            Family(name, build, _paligemma_sample, _paligemma_batch, later={"token_type_ids": 1})
            for name, build in (("paligemma", _paligemma), ("paligemma2", _paligemma2))
        ),
        Family("aya_vision", _aya_vision, _aya_sample, stacked),
        Family("cohere2_vision", _cohere2_vision, _aya_sample, stacked),
    )
}
if Version(version("transformers")) < Version("5.21"):  # its parts lie otherwise
    del FAMILIES["qwen2_5_omni"], FAMILIES["qwen3_omni_moe"]
VARIANTS = {
    family.name: family
    for family in (
        Family("joycaption", _joycaption, _siglip_sample, stacked),
        Family("llava_next_vicuna", _llava_next_vicuna, _next_sample, stacked),
        Family("internvl3_5", _internvl3_5, _internvl_sample, stacked),
        Family("internvl_6b", _internvl_6b, _internvl_sample, stacked),
        Family("minicpmv4_6_4x", _minicpmv4_6_4x, _cpm_sample_4x, _cpm_batch, stages=STAGES[:3]),
    )
}
if Version(version("transformers")) < Version("5.19"):  # whose tower takes pictures of one size
    del FAMILIES["minicpmv4_6"], FAMILIES["minicpmv4_7"], VARIANTS["minicpmv4_6_4x"]
