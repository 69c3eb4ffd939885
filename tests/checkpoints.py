"""Folders that lmms-eval can load: the tiny random models of every family with real processors, nothing downloaded.

The tokenizer knows single characters and the special tokens of a family, so that every processor of transformers
writes its own placeholders, and every chat template its own frame.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import families
from families import BREAK, IMAGE, PAD, PINPOINTS, VIDEO
from transformers import PreTrainedTokenizerFast

MEANS = {"image_mean": [0.5] * 3, "image_std": [0.25] * 3}
SIDE = {"height": 16, "width": 16}
LARGE_PINPOINTS = [[168, 336], [336, 168], [336, 336]]  # of the embedded model as a LLaVA-1.6
VISION_MARKS = {185: "<|vision_start|>", 186: "<|vision_end|>", 187: "<|im_start|>", 188: "<|im_end|>"}
CONTENT = """
{%- for message in messages -%}{{ 'ROLE' }}
{%- if message['content'] is string -%}{{ message['content'] }}{%- else -%}
{%- for part in message['content'] -%}
{%- if part['type'] == 'image' -%}{{ 'IMAGE' }}{%- elif part['type'] == 'video' -%}{{ 'VIDEO' }}
{%- else -%}{{ part['text'] }}{%- endif -%}
{%- endfor -%}{%- endif -%}
{{ '\\n' }}
{%- endfor -%}{{ 'Answer:' }}"""


def template(image: str, video: str = "", role: str = "Q:") -> str:
    """A chat template that writes a placeholder for every picture."""
    text = "".join(CONTENT.splitlines())
    return text.replace("IMAGE", image).replace("VIDEO", video).replace("ROLE", role)


def tokenizer(special: dict[int, str], **named: str) -> PreTrainedTokenizerFast:
    """Characters and special tokens; `named` are attributes that a processor reads from its tokenizer."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    fixed = {PAD: "<pad>", 1: "<s>", 2: "<unk>", 199: "</s>"} | special
    letters = ["\n", *map(chr, range(32, 127))]
    words = {fixed.get(i) or (letters.pop(0) if letters else f"<unused{i}>"): i for i in range(200)}
    whole = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    whole.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    whole.decoder = decoders.Fuse()
    whole.add_special_tokens(list(fixed.values()))
    return PreTrainedTokenizerFast(
        tokenizer_object=whole,
        pad_token="<pad>",
        bos_token="<s>",
        unk_token="<unk>",
        eos_token="</s>",
        padding_side="left",
        extra_special_tokens=named or list(special.values()),
    )


@dataclass(frozen=True)
class Host:
    """One `--model` of lmms-eval with a checkpoint of one family."""

    name: str  # --model
    family: str  # what the adapter calls itself
    build: Callable[[Path], None]
    arguments: str
    batch: int = 1  # batch size of its image task
    text_only: bool = True  # the host takes documents without a picture beside others


def _saved(family: str, processor: Callable[[], Any]) -> Callable[[Path], None]:
    """Writes weights and processor into one folder."""

    def build(folder: Path) -> None:
        families.FAMILIES[family].build("sdpa").save_pretrained(folder)
        processor().save_pretrained(folder)

    return build


def _llava_next() -> Any:
    from transformers import LlavaNextImageProcessor, LlavaNextProcessor

    images = LlavaNextImageProcessor(
        size={"shortest_edge": 16}, crop_size=SIDE, image_grid_pinpoints=PINPOINTS, **MEANS
    )
    return LlavaNextProcessor(
        images,
        tokenizer({IMAGE: "<image>"}),
        patch_size=4,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=template("<image>"),
    )


def _llava_siglip() -> Any:
    from transformers import LlavaProcessor, SiglipImageProcessor

    return LlavaProcessor(
        SiglipImageProcessor(size={"height": 24, "width": 24}, **MEANS),
        tokenizer({IMAGE: "<image>"}),
        patch_size=4,
        vision_feature_select_strategy="full",
        chat_template=template("<image>"),
    )


def _onevision() -> Any:
    from transformers import LlavaOnevisionImageProcessor, LlavaOnevisionProcessor, LlavaOnevisionVideoProcessor

    return LlavaOnevisionProcessor(
        LlavaOnevisionImageProcessor(size=SIDE, image_grid_pinpoints=PINPOINTS, **MEANS),
        tokenizer({IMAGE: "<image>", VIDEO: "<video>"}),
        LlavaOnevisionVideoProcessor(size=SIDE, **MEANS),
        num_image_tokens=16,
        vision_feature_select_strategy="full",
        chat_template=template("<image>", "<video>"),
    )


def qwen(names: str) -> Any:
    import transformers

    patches = {"patch_size": 4, "merge_size": 2, "temporal_patch_size": 2}
    image = "<|vision_start|><|image_pad|><|vision_end|>"
    return getattr(transformers, f"{names}Processor")(
        transformers.Qwen2VLImageProcessor(**patches, **MEANS),
        tokenizer(VISION_MARKS | {IMAGE: "<|image_pad|>", VIDEO: "<|video_pad|>"}),
        getattr(transformers, f"{names.replace('2_5_', '2')}VideoProcessor")(**patches, **MEANS),
        chat_template=template(image, image.replace("image", "video"), "<|im_start|>"),
    )


def _glm4v() -> Any:
    from transformers import Glm4vImageProcessor, Glm4vProcessor, Glm4vVideoProcessor

    marks = {185: "<|begin_of_image|>", 186: "<|end_of_image|>", 187: "<|begin_of_video|>", 188: "<|end_of_video|>"}
    size = {"shortest_edge": 1024, "longest_edge": 8192}
    sizes = {"patch_size": 4, "merge_size": 2, "temporal_patch_size": 2, "size": size}
    return Glm4vProcessor(
        Glm4vImageProcessor(**sizes, **MEANS),
        tokenizer(marks | {IMAGE: "<|image|>", VIDEO: "<|video|>"}),
        Glm4vVideoProcessor(**sizes, **MEANS),
        chat_template=template("<|begin_of_image|><|image|><|end_of_image|>", "<|video|>"),
    )


def _internvl() -> Any:
    from transformers import GotOcr2ImageProcessor, InternVLProcessor, InternVLVideoProcessor

    size = {"height": 24, "width": 24}
    marks = {"start_image_token": "<img>", "end_image_token": "</img>"}
    return InternVLProcessor(
        GotOcr2ImageProcessor(size=size, crop_to_patches=True, **MEANS),
        tokenizer(
            {185: "<img>", 186: "</img>", IMAGE: "<IMG_CONTEXT>", VIDEO: "<video>"},
            **marks,
            context_image_token="<IMG_CONTEXT>",
            video_token="<video>",
        ),
        InternVLVideoProcessor(size=size, **MEANS),
        image_seq_length=9,
        chat_template=template("<IMG_CONTEXT>\n", "<video>\n"),
    )


def _gemma3() -> Any:
    from transformers import Gemma3ImageProcessor, Gemma3Processor

    marks = {"boi_token": "<start_of_image>", "eoi_token": "<end_of_image>", "image_token": "<image_soft_token>"}
    return Gemma3Processor(
        Gemma3ImageProcessor(size={"height": 32, "width": 32}, **MEANS),
        tokenizer(dict(zip((185, 186, IMAGE), marks.values(), strict=True)), **marks),
        image_seq_length=16,
        chat_template=template("<start_of_image>"),
    )


def _mistral3() -> Any:
    from transformers import PixtralImageProcessor, PixtralProcessor

    return PixtralProcessor(
        PixtralImageProcessor(size={"longest_edge": 32}, patch_size={"height": 4, "width": 4}, **MEANS),
        tokenizer({IMAGE: "[IMG]", BREAK: "[IMG_BREAK]", 193: "[IMG_END]", 185: "[INST]", 186: "[/INST]"}),
        patch_size=4,
        spatial_merge_size=2,
        chat_template=template("[IMG]", role="[INST]"),
    )


def _embedded(layout: str, folder: Path) -> None:
    """The embedded model as a folder like any other."""
    from vtp_plugin.tiny.checkpoint import resolve

    shutil.copytree(resolve("vtp-tiny", layout), folder, dirs_exist_ok=True)


def _llava_anyres(folder: Path) -> None:
    """The embedded model as a LLaVA-1.6: crops, unpadding, and a newline."""
    import torch
    from safetensors.torch import load_file, save_file

    _embedded("llava", folder)
    facts = {"image_aspect_ratio": "anyres", "mm_patch_merge_type": "spatial_unpad"}
    facts["image_grid_pinpoints"] = LARGE_PINPOINTS
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | facts))
    weights = load_file(folder / "model.safetensors")
    newline = torch.randn(config["hidden_size"], generator=torch.Generator().manual_seed(0)).half()
    save_file(weights | {"model.image_newline": newline}, folder / "model.safetensors", metadata={"format": "pt"})


CPU = "device=cpu,device_map=cpu"
AUTHORS = "device=cpu,device_map=auto"
PIXELS = "min_pixels=1024,max_pixels=4096"
HOSTS = {
    "llava-1.5": Host("llava", "llava", partial(_embedded, "llava"), AUTHORS, 3, text_only=False),
    "llava-1.6": Host("llava", "llava_anyres", _llava_anyres, AUTHORS, 3, text_only=False),
    "llava_hf-1.5": Host("llava_hf", "llava_hf", partial(_embedded, "hf"), CPU, text_only=False),
    "llava_hf-next": Host("llava_hf", "llava_next", _saved("llava_next", _llava_next), CPU, text_only=False),
    "llava_hf-onevision": Host(
        "llava_hf", "llava_onevision", _saved("llava_onevision", _onevision), CPU, text_only=False
    ),
    "llava_hf-siglip": Host("llava_hf", "llava_siglip", _saved("llava_siglip", _llava_siglip), CPU, text_only=False),
    "qwen2_vl": Host("qwen2_vl", "qwen2_vl", _saved("qwen2_vl", partial(qwen, "Qwen2VL")), f"{CPU},{PIXELS}", 3),
    "qwen2_5_vl": Host(
        "qwen2_5_vl", "qwen2_5_vl", _saved("qwen2_5_vl", partial(qwen, "Qwen2_5_VL")), f"{CPU},{PIXELS}", 3
    ),
    "qwen3_vl": Host("qwen3_vl", "qwen3_vl", _saved("qwen3_vl", partial(qwen, "Qwen3VL")), f"{CPU},{PIXELS}", 3),
    "qwen3_vl-A3B": Host(  # the host asks the name whether there are experts
        "qwen3_vl", "qwen3_vl_moe", _saved("qwen3_vl_moe", partial(qwen, "Qwen3VL")), f"{CPU},{PIXELS}", 3
    ),
    "qwen3_5": Host("qwen3_5", "qwen3_5", _saved("qwen3_5", partial(qwen, "Qwen3VL")), f"{CPU},{PIXELS}", 3),
    "glm4v-Flash": Host("glm4v", "glm4v", _saved("glm4v", _glm4v), CPU),  # the host asks the name for experts
    "internvl_hf": Host("internvl_hf", "internvl", _saved("internvl", _internvl), f"{CPU},max_patches=3"),
    "gemma3": Host("gemma3", "gemma3", _saved("gemma3", _gemma3), CPU, 3),
    "mistral3_vl": Host("mistral3_vl", "mistral3", _saved("mistral3", _mistral3), CPU, 3),
}
