"""`vtp-tiny-qwen` on disk: the embedded model as transformers' Qwen2-VL, with a tower and a merger of its own.

Tower and merger are stored whole. The language model's matrices are `vtp-tiny`'s and the products of the factors in
`weights/qwen.safetensors` (lowrank.py), added when the folder is written; its biases are zero.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..folders import save_model
from ..lowrank import merged
from ..modeling import LLAMA_WIDTH, MEAN, STD, VISION_WIDTH, depth, llama_config
from ..prompts import CHAT_TEMPLATE, IMAGE, Layout, load_llama_tokenizer
from ..scenes import PATCH
from ..store import QWEN_WEIGHTS, WEIGHTS, load_weights, read_parts

if TYPE_CHECKING:
    from transformers import Qwen2VLConfig

PATCHES, MERGED, FRAMES = 16, 2, 2  # patches on a side of a picture and of a token's square; frames a patch
UNITS = PATCHES // MERGED  # 8 x 8 tokens a picture
PIXELS = PATCHES * PATCH  # 224: scenes are enlarged
SECTIONS = [4, 6, 6]  # of the angles of a head, for time, height and width: Qwen2-VL's proportions
START, END, PICTURE, VIDEO = "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"
PARTS = ("visual", "factors")
_SHOWN = f"{START}{PICTURE}{END}"
_IMAGES = "{% for part in message['content'] if part['type'] == 'image' %}{{ '<image>\n' }}{% endfor %}"
_VIDEOS = _IMAGES.replace("'image'", "'video'").replace(IMAGE, _SHOWN.replace(PICTURE, VIDEO))
TEMPLATE = CHAT_TEMPLATE.replace(_IMAGES, _IMAGES.replace(IMAGE, _SHOWN) + _VIDEOS)
HELPFUL = "You are a helpful assistant."  # what lmms-eval's qwen2_vl says first
TEXTS = {
    "plain": f"USER: {_SHOWN}\n{{question}} ASSISTANT:",
    "helpful": f"{HELPFUL} USER: {_SHOWN}\n{{question}} ASSISTANT:",
}


def write_qwen(folder: Path) -> None:
    """Model and processor."""
    from transformers import Qwen2VLForConditionalGeneration

    learned, tokenizer = learned_weights(), qwen_tokenizer()
    text = merged(language_weights(tokenizer, load_weights("llama")), learned["factors"])
    model = Qwen2VLForConditionalGeneration(qwen_config(tokenizer, depth(text)))
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    weights = {f"model.visual.{name}": value for name, value in learned["visual"].items()}
    weights |= {name.replace("model.", "model.language_model.", 1): value for name, value in text.items()}
    save_model(model, weights, folder)
    qwen_processor(tokenizer).save_pretrained(folder)


def qwen_tokenizer() -> Any:
    """The embedded model's, and four more tokens."""
    tokenizer = load_llama_tokenizer(WEIGHTS)
    tokenizer.add_tokens([START, END, PICTURE, VIDEO], special_tokens=True)
    return tokenizer


def qwen_layouts(tokenizer: Any) -> dict[str, Layout]:
    """The prompts that the processor makes, without and with a system prompt."""
    return {name: Layout(tokenizer, text, chunked=False, image=PICTURE) for name, text in TEXTS.items()}


def language_weights(tokenizer: Any, text: dict[str, Tensor]) -> dict[str, Tensor]:
    """A Llama's weights as Qwen2's: biases of zero, and of the new tokens the row of the old picture's."""
    grown = dict(text)
    image = tokenizer.convert_tokens_to_ids(IMAGE)
    for table in ("model.embed_tokens.weight", "lm_head.weight"):
        more = len(tokenizer) - len(text[table])
        grown[table] = torch.cat([text[table], text[table][image : image + 1].expand(more, -1)])
    for layer in range(depth(text)):
        for part in "qkv":
            grown[f"model.layers.{layer}.self_attn.{part}_proj.bias"] = text["lm_head.weight"].new_zeros(LLAMA_WIDTH)
    return grown


def qwen_config(tokenizer: Any, layers: int) -> Qwen2VLConfig:
    from transformers import Qwen2VLConfig

    llama = llama_config(len(tokenizer), layers).to_dict()
    same = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    same += ("vocab_size", "max_position_embeddings", "rms_norm_eps", "bos_token_id", "eos_token_id")
    rope = {"rope_type": "default", "rope_theta": llama["rope_parameters"]["rope_theta"], "mrope_section": SECTIONS}
    words = (PICTURE, VIDEO, START, END)
    picture, video, start, end = tokenizer.convert_tokens_to_ids(list(words))
    return Qwen2VLConfig(
        text_config={name: llama[name] for name in same}
        | {"rope_parameters": rope, "pad_token_id": tokenizer.pad_token_id, "tie_word_embeddings": False},
        vision_config={
            "depth": 6,
            "embed_dim": VISION_WIDTH,
            "hidden_size": LLAMA_WIDTH,
            "num_heads": 4,
            "mlp_ratio": 4,
            "patch_size": PATCH,
            "temporal_patch_size": FRAMES,
            "spatial_merge_size": MERGED,
        },
        image_token_id=picture,
        video_token_id=video,
        vision_start_token_id=start,
        vision_end_token_id=end,
        tie_word_embeddings=False,
    )


def qwen_processor(tokenizer: Any) -> Any:
    """Pictures are enlarged to 224 x 224 pixels."""
    from transformers import Qwen2VLImageProcessor, Qwen2VLProcessor, Qwen2VLVideoProcessor

    said = {"size": {"shortest_edge": PIXELS**2, "longest_edge": PIXELS**2}, "patch_size": PATCH, "merge_size": MERGED}
    said |= {"temporal_patch_size": FRAMES, "image_mean": list(MEAN), "image_std": list(STD)}
    return Qwen2VLProcessor(
        image_processor=Qwen2VLImageProcessor(**said),
        tokenizer=tokenizer,
        video_processor=Qwen2VLVideoProcessor(**said),
        chat_template=TEMPLATE,
    )


def learned_weights() -> dict[str, dict[str, Tensor]]:
    """`visual`, the tower with its merger, and `factors`, as they were trained."""
    return read_parts(WEIGHTS / QWEN_WEIGHTS, *PARTS)
