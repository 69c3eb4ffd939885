"""InternVL in the layout of its own checkpoints: random folders that vLLM serves, and the model they are compared with.

The names of files, fields and weights are those of OpenGVLab's folders; `SOURCE` inside holds the same weights as
transformers saves them, of which `internvl_chat` makes the reference.
"""

from __future__ import annotations

import atexit
import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import transformers
from checkpoints import tokenizer
from families import IMAGE, VIDEO
from internvl_chat import InternVLChatModel
from safetensors.torch import save_file
from torch import tensor
from transformers import InternVLConfig, InternVLForConditionalGeneration, PreTrainedTokenizerFast
from transformers.models.internvl import InternVLVisionConfig
from transformers.utils import HF_MODULES_CACHE

SOURCE = "source"
IMAGENET = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
TILES = {"min_dynamic_patch": 1, "max_dynamic_patch": 4, "dynamic_image_size": True, "use_thumbnail": True}
FACTS = {"downsample_ratio": 0.5, "ps_version": "v2", "select_layer": -1, "template": "internvl2_5"} | TILES
LARGE = {"use_qk_norm": True, "norm_type": "rms_norm", "attention_bias": False}  # as in InternViT-6B
RENAMED = {"use_qk_norm": "qk_normalization", "attention_bias": "qkv_bias"}  # in the configuration of the tower
KEPT = ("hidden_size", "intermediate_size", "num_attention_heads", "num_hidden_layers", "norm_type", "layer_norm_eps")
MARKS = {185: "<img>", 186: "</img>", IMAGE: "<IMG_CONTEXT>", VIDEO: "<|video_pad|>"}
COPIES = Path(HF_MODULES_CACHE) / "transformers_modules"  # of the code in a folder, under the folder's name
CODE = """
from transformers import CONFIG_MAPPING, PretrainedConfig


class InternVisionConfig(PretrainedConfig):
    model_type = "intern_vit_6b"


class InternVLChatConfig(PretrainedConfig):
    model_type = "internvl_chat"

    def __init__(self, vision_config=None, llm_config=None, **facts):
        super().__init__(**facts)
        self.vision_config = InternVisionConfig(**vision_config)
        self.llm_config = CONFIG_MAPPING[llm_config["model_type"]](**llm_config)
"""


class Published(InternVLForConditionalGeneration):
    """Saves itself as the authors do."""

    def save_pretrained(self, target: Path) -> None:
        super().save_pretrained(target / SOURCE)
        weights = {name: weight.contiguous().clone() for name, weight in InternVLChatModel(self).state_dict().items()}
        save_file(weights, target / "model.safetensors", metadata={"format": "pt"})
        (target / "configuration_internvl_chat.py").write_text(CODE)
        atexit.register(shutil.rmtree, COPIES / target.name, ignore_errors=True)
        (target / "config.json").write_text(json.dumps(_published(self.config)))


def _published(config: InternVLConfig) -> dict[str, Any]:
    tower, text = config.vision_config, config.text_config
    side, patch = tower.image_size[0], tower.patch_size[0]
    vision = {name: getattr(tower, name) for name in KEPT} | {"image_size": side, "patch_size": patch}
    vision |= {theirs: getattr(tower, ours) for ours, theirs in RENAMED.items()}
    vision |= {"hidden_act": "gelu", "initializer_factor": 1.0, "model_type": "intern_vit_6b"}
    language = text.to_dict() | {"architectures": [type(text).__name__.replace("Config", "ForCausalLM")]}
    return {
        "architectures": ["InternVLChatModel"],
        "auto_map": {"AutoConfig": "configuration_internvl_chat.InternVLChatConfig"},
        "model_type": "internvl_chat",
        "force_image_size": side,
        "vision_config": vision,
        "llm_config": language,
        "dtype": "float32",
        **FACTS,
    }


def published(name: str, language: dict[str, Any], vision: dict[str, Any]) -> tuple[InternVLConfig, type, Any]:
    """Configuration, class and tokenizer of a folder; `name` is the language model's."""
    parts = InternVLVisionConfig(**vision), getattr(transformers, f"{name}Config")(**language)
    config = InternVLConfig(vision_config=parts[0], text_config=parts[1], image_token_id=IMAGE)
    return config, Published, tokenizer(MARKS)


class Tiler:
    """What a caller of `chat` does: vLLM's tiles, and a placeholder for each of their tokens."""

    def __init__(self, folder: Path) -> None:
        from vllm.transformers_utils.processors.internvl import InternVLImageProcessor

        vision = json.loads((folder / "config.json").read_text())["vision_config"]
        self.tiles = InternVLImageProcessor(vision["image_size"], **TILES)
        self.tokens = (vision["image_size"] // vision["patch_size"] // 2) ** 2
        self.tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
        self.image_processor = SimpleNamespace(**IMAGENET, do_normalize=True)

    def __call__(self, images: Any, text: str, return_tensors: str = "", **arguments: Any) -> dict[str, Any]:
        made = self.tiles(images=images, return_tensors="pt", **arguments)
        for tiles in made["image_num_patches"].tolist():
            text = text.replace("<image>", f"<img>{'<IMG_CONTEXT>' * tiles * self.tokens}</img>", 1)
        ids = [self.tokenizer(text)["input_ids"]]
        if not return_tensors:
            return {"input_ids": ids}
        return {
            "pixel_values": made["pixel_values_flat"],
            "input_ids": tensor(ids),
            "attention_mask": tensor(ids).ne(-1).long(),
        }


def loaded(folder: Path) -> tuple[InternVLChatModel, Tiler]:
    """The reference of a folder."""
    model = InternVLChatModel(InternVLForConditionalGeneration.from_pretrained(folder / SOURCE))
    model.img_context_token_id = IMAGE
    return model, Tiler(folder)
