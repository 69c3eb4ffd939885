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


def _next_video() -> Any:
    from transformers import LlavaNextImageProcessor, LlavaNextVideoProcessor, LlavaNextVideoVideoProcessor

    images = LlavaNextImageProcessor(
        size={"shortest_edge": 16}, crop_size=SIDE, image_grid_pinpoints=PINPOINTS, **MEANS
    )
    return LlavaNextVideoProcessor(
        LlavaNextVideoVideoProcessor(size={"shortest_edge": 16}, crop_size=SIDE, **MEANS),
        images,
        tokenizer({IMAGE: "<image>", VIDEO: "<video>"}),
        patch_size=4,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=template("<image>", "<video>"),
    )


def _minicpmv() -> Any:
    """A picture of more than 64 x 64 is shown as a whole, and in slices."""
    from transformers import MiniCPMV4_6ImageProcessor, MiniCPMV4_6Processor, MiniCPMV4_6VideoProcessor

    marks = {"image_start": "<image>", "image_end": "</image>", "slice_start": "<slice>", "slice_end": "</slice>"}
    marks |= {"image_id_start": "<image_id>", "image_id_end": "</image_id>", "image": "<|image|>", "video": "<|video|>"}
    named = {f"{name}_token": mark for name, mark in marks.items()}
    ids = (185, 186, 187, 188, 189, 192, IMAGE, VIDEO)
    sizes = {"patch_size": 4, "scale_resolution": 64, "max_slice_nums": 4}
    return MiniCPMV4_6Processor(
        MiniCPMV4_6ImageProcessor(**sizes, **MEANS),
        MiniCPMV4_6VideoProcessor(**sizes, **MEANS),
        tokenizer(dict(zip(ids, marks.values(), strict=True)), **named),
        chat_template=template("<|image|>", "<|video|>"),
    )


def _paligemma() -> Any:
    from transformers import PaliGemmaProcessor, SiglipImageProcessor

    return PaliGemmaProcessor(
        SiglipImageProcessor(size=SIDE, image_seq_length=16, **MEANS),
        tokenizer({IMAGE: "<image>"}, image_token="<image>"),
        chat_template=template("<image>"),
    )


def _aya_vision() -> Any:
    from transformers import AyaVisionProcessor, GotOcr2ImageProcessor

    marks = {185: "<|START_OF_IMG|>", 186: "<|END_OF_IMG|>", IMAGE: "<|IMG_PATCH|>", 187: "<|IMG_LINE_BREAK|>"}
    return AyaVisionProcessor(
        GotOcr2ImageProcessor(size={"height": 24, "width": 24}, max_patches=1, **MEANS),
        tokenizer(marks | {188: "<image>", 189: "TILE", 192: "TILE_GLOBAL"}),
        patch_size=4,
        img_size=24,
        downsample_factor=2,
        chat_template=template("<image>"),
    )


def _cohere2_vision() -> Any:
    from transformers import Cohere2VisionImageProcessor, Cohere2VisionProcessor

    marks = {"boi_token": "<|START_OF_IMG|>", "eoi_token": "<|END_OF_IMG|>", "image_token": "<|IMG_PATCH|>"}
    marks |= {"img_line_break_token": "<|IMG_LINE_BREAK|>"}
    return Cohere2VisionProcessor(
        Cohere2VisionImageProcessor(size={"height": 24, "width": 24}, patch_size=3, max_patches=1, **MEANS),
        tokenizer(dict(zip((185, 186, IMAGE, 187), marks.values(), strict=True)), **marks),
        chat_template=template("<|IMG_PATCH|>"),
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


def _glm(names: str) -> Any:
    import transformers

    marks = {185: "<|begin_of_image|>", 186: "<|end_of_image|>", 187: "<|begin_of_video|>", 188: "<|end_of_video|>"}
    size = {"shortest_edge": 1024, "longest_edge": 8192}
    sizes = {"patch_size": 4, "merge_size": 2, "temporal_patch_size": 2, "size": size}
    return getattr(transformers, f"{names}Processor")(
        getattr(transformers, f"{names}ImageProcessor")(**sizes, **MEANS),
        tokenizer(marks | {IMAGE: "<|image|>", VIDEO: "<|video|>"}),
        getattr(transformers, f"{names}VideoProcessor")(**sizes, **MEANS),
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


def _gemma4() -> Any:
    from transformers import Gemma4ImageProcessor, Gemma4Processor, Gemma4VideoProcessor, SeamlessM4TFeatureExtractor

    named = {"boi": "<|image>", "image": "<|image|>", "eoi": "<image|>"}
    named |= {"boa": "<|audio>", "audio": "<|audio|>", "eoa": "<audio|>"}
    marks = {f"{name}_token": mark for name, mark in named.items()}
    return Gemma4Processor(
        SeamlessM4TFeatureExtractor(),
        Gemma4ImageProcessor(patch_size=4, max_soft_tokens=70),
        tokenizer(
            dict(zip((185, IMAGE, 186, 187, 192, 188), named.values(), strict=True)) | {VIDEO: "<|video|>"}, **marks
        ),
        Gemma4VideoProcessor(patch_size=4, max_soft_tokens=70),
        chat_template=template("<|image|>"),
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
ANY = "device=cpu"
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
    "qwen3_5-A3B": Host(
        "qwen3_5", "qwen3_5_moe", _saved("qwen3_5_moe", partial(qwen, "Qwen3VL")), f"{CPU},{PIXELS}", 3
    ),
    "glm4v-Flash": Host("glm4v", "glm4v", _saved("glm4v", partial(_glm, "Glm4v")), CPU),  # the host asks the name
    "glm4v": Host("glm4v", "glm4v_moe", _saved("glm4v_moe", partial(_glm, "Glm4v")), CPU),  # whether there are experts
    "hf-glm46v": Host("huggingface", "glm46v", _saved("glm46v", partial(_glm, "Glm46V")), ANY, text_only=False),
    "hf-next_video": Host(
        "huggingface", "llava_next_video", _saved("llava_next_video", _next_video), ANY, text_only=False
    ),
    "hf-minicpmv4_6": Host("huggingface", "minicpmv4_6", _saved("minicpmv4_6", _minicpmv), ANY, text_only=False),
    "hf-paligemma": Host("huggingface", "paligemma", _saved("paligemma", _paligemma), ANY, text_only=False),
    "hf-aya_vision": Host("huggingface", "aya_vision", _saved("aya_vision", _aya_vision), ANY, text_only=False),
    "hf-cohere2_vision": Host(
        "huggingface", "cohere2_vision", _saved("cohere2_vision", _cohere2_vision), ANY, text_only=False
    ),
    "internvl_hf": Host("internvl_hf", "internvl", _saved("internvl", _internvl), f"{CPU},max_patches=3"),
    "gemma3": Host("gemma3", "gemma3", _saved("gemma3", _gemma3), CPU, 3),
    "gemma4": Host("gemma4", "gemma4", _saved("gemma4", _gemma4), f"{CPU},max_soft_tokens=70", 3),
    "mistral3_vl": Host("mistral3_vl", "mistral3", _saved("mistral3", _mistral3), CPU, 3),
}
HOSTS = {
    key: host for key, host in HOSTS.items() if not key.startswith("hf-minicpmv") or host.family in families.FAMILIES
}
