"""`vtp-tiny-video` on disk: the embedded model as transformers' LLaVA-NeXT-Video, its language model adapted to clips.

The tower is `vtp-tiny`'s. The projector is its own, and so are the language model's matrices: `vtp-tiny`'s and the
products of the factors in `weights/clips.safetensors` (lowrank.py), added when the folder is written.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..folders import composed, save_model, use_published_names
from ..lowrank import merged
from ..prompts import CHAT_TEMPLATE, IMAGE, load_llama_tokenizer
from ..scenes import GRID, PATCH, SIZE
from ..store import CLIP_FACTORS, WEIGHTS, load_weights, read_parts

VIDEO = "<video>"
POOLED = 2  # patches on a side of the square that becomes one token of a frame
CELLS = GRID // POOLED  # 6 x 6 tokens a frame
PINPOINTS = [[SIZE, 2 * SIZE], [2 * SIZE, SIZE], [2 * SIZE, 2 * SIZE]]  # of pictures, which it was not shown
_PART = "{% for part in message['content'] if part['type'] == 'image' %}{{ '<image>\n' }}{% endfor %}"
TEMPLATE = CHAT_TEMPLATE.replace(_PART, _PART + _PART.replace("image", "video"))


def write_video(folder: Path) -> None:
    """Model and processor. The new placeholder's rows are copies of the picture's."""
    from transformers import CLIPVisionConfig, LlavaNextVideoConfig, LlavaNextVideoForConditionalGeneration

    from ..modeling import SELECT_LAYER, clip_config, depth, llama_config

    tokenizer, learned = video_tokenizer(), learned_weights()
    image, video = tokenizer.convert_tokens_to_ids([IMAGE, VIDEO])
    text = merged(load_weights("llama"), learned["factors"])
    for table in ("model.embed_tokens.weight", "lm_head.weight"):
        text[table] = torch.cat([text[table], text[table][image : image + 1]])
    config = LlavaNextVideoConfig(
        vision_config=CLIPVisionConfig(**clip_config(8).vision_config.to_dict()),
        text_config=llama_config(len(tokenizer), depth(text)),
        image_token_id=image,
        video_token_id=video,
        projector_hidden_act="gelu",
        vision_feature_select_strategy="default",
        vision_feature_layer=SELECT_LAYER,
        image_grid_pinpoints=PINPOINTS,
        image_seq_length=GRID**2,
        video_seq_length=CELLS**2,
        spatial_pool_mode="average",
        spatial_pool_stride=POOLED,
        pad_token_id=tokenizer.pad_token_id,
    )
    newline = torch.zeros(config.text_config.hidden_size)
    weights = composed(text, learned["projector"]) | {"model.image_newline": newline}
    model = LlavaNextVideoForConditionalGeneration(config)
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    save_model(model, weights, folder)
    use_published_names(folder / "model.safetensors")
    processor(tokenizer).save_pretrained(folder)


def video_tokenizer() -> Any:
    """The embedded model's, and one more token."""
    tokenizer = load_llama_tokenizer(WEIGHTS)
    tokenizer.add_tokens([VIDEO], special_tokens=True)
    return tokenizer


def processor(tokenizer: Any) -> Any:
    from transformers import LlavaNextImageProcessor, LlavaNextVideoProcessor, LlavaNextVideoVideoProcessor

    from ..modeling import MEAN, STD

    said = {"size": {"shortest_edge": SIZE}, "crop_size": {"height": SIZE, "width": SIZE}}
    said |= {"image_mean": list(MEAN), "image_std": list(STD)}
    return LlavaNextVideoProcessor(
        video_processor=LlavaNextVideoVideoProcessor(**said),
        image_processor=LlavaNextImageProcessor(image_grid_pinpoints=PINPOINTS, **said),
        tokenizer=tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=TEMPLATE,
        image_token=IMAGE,
        video_token=VIDEO,
    )


def learned_weights() -> dict[str, dict[str, Tensor]]:
    """`factors` and `projector` as they were trained."""
    return read_parts(WEIGHTS / CLIP_FACTORS, "factors", "projector")
