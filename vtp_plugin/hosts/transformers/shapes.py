"""The sizes of published models, with random weights. `small` and `clip-vit-small` are for trying commands."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vtp_plugin.errors import PruningError, unknown
from vtp_plugin.hosts.transformers.architectures import IMAGE_TOKEN, Clip, Llava, LlavaNext, Qwen3, Qwen25, Shape


def _vision(width: int, layers: int, image: int, patch: int = 14) -> dict[str, int]:
    """A CLIP tower with heads of 64."""
    return {
        "hidden_size": width,
        "intermediate_size": 4 * width,
        "num_hidden_layers": layers,
        "num_attention_heads": width // 64,
        "image_size": image,
        "patch_size": patch,
        "projection_dim": 768 if width > 768 else 512,
    }


def _decoder(width: int, mlp: int, layers: int, vocabulary: int = 32064, **more: Any) -> dict[str, Any]:
    """A LLaMA with heads of 128."""
    return {
        "hidden_size": width,
        "intermediate_size": mlp,
        "num_hidden_layers": layers,
        "num_attention_heads": width // 128,
        "vocab_size": vocabulary,
        **more,
    }


def _qwen_vision(width: int, mlp: int, layers: int, heads: int, out: int, whole: list[int]) -> dict[str, Any]:
    """A Qwen2.5-VL tower with patches of 14 pixels and windows of 112; blocks in `whole` see all."""
    return {
        "hidden_size": width,
        "intermediate_size": mlp,
        "depth": layers,
        "num_heads": heads,
        "out_hidden_size": out,
        "patch_size": 14,
        "fullatt_block_indexes": whole,
    }


def _qwen_text(width: int, mlp: int, layers: int, heads: int, groups: int, sections: list[int]) -> dict[str, Any]:
    rope = {"rope_type": "default", "mrope_section": sections, "rope_theta": 1e6}
    sizes = {"num_attention_heads": heads, "num_key_value_heads": groups, "rope_parameters": rope}
    return _decoder(width, mlp, layers, 152064) | sizes


def _qwen3_vision(width: int, layers: int, heads: int, out: int, deep: list[int]) -> dict[str, Any]:
    """A Qwen3-VL tower with patches of 16 pixels; what blocks in `deep` make is added to decoder layers."""
    return {
        "hidden_size": width,
        "intermediate_size": 4 * width,
        "depth": layers,
        "num_heads": heads,
        "out_hidden_size": out,
        "patch_size": 16,
        "deepstack_visual_indexes": deep,
    }


def _qwen3_text(width: int, mlp: int, layers: int, heads: int, groups: int, sections: list[int]) -> dict[str, Any]:
    """With heads of 128, however wide the model is."""
    rope = {"rope_type": "default", "mrope_section": sections, "mrope_interleaved": True, "rope_theta": 5e6}
    sizes = {"num_attention_heads": heads, "num_key_value_heads": groups, "head_dim": 128, "rope_parameters": rope}
    return _decoder(width, mlp, layers, 151936) | sizes


SHAPES: dict[str, Shape] = {
    "llava-1.5-7b": Llava(_vision(1024, 24, 336), _decoder(4096, 11008, 32)),
    "llava-1.5-13b": Llava(_vision(1024, 24, 336), _decoder(5120, 13824, 40)),
    "llava-next-7b": LlavaNext(_vision(1024, 24, 336), _decoder(4096, 11008, 32)),
    "qwen2.5-vl-7b": Qwen25(
        _qwen_vision(1280, 3420, 32, 16, 3584, [7, 15, 23, 31]),
        _qwen_text(3584, 18944, 28, 28, 4, [16, 24, 24]),
    ),
    "qwen3-vl-4b": Qwen3(
        _qwen3_vision(1024, 24, 16, 2560, [5, 11, 17]), _qwen3_text(2560, 9728, 36, 32, 8, [24, 20, 20])
    ),
    "clip-vit-b-32": Clip(_vision(768, 12, 224, 32)),
    "clip-vit-b-16": Clip(_vision(768, 12, 224, 16)),
    "clip-vit-l-14": Clip(_vision(1024, 24, 224)),
    "clip-vit-l-14-336": Clip(_vision(1024, 24, 336)),
    "small": Llava(_vision(128, 4, 168), _decoder(256, 512, 4)),
    "small-next": LlavaNext(_vision(128, 4, 84), _decoder(256, 512, 4)),
    "small-qwen": Qwen25(
        _qwen_vision(128, 256, 4, 2, 256, [1, 3]), _qwen_text(256, 512, 4, 4, 2, [8, 12, 12]), side=12
    ),
    "small-qwen3": Qwen3(_qwen3_vision(128, 4, 2, 256, [1, 2]), _qwen3_text(256, 512, 4, 4, 2, [24, 20, 20]), side=12),
    "clip-vit-small": Clip(_vision(128, 4, 168)),
}


def shape_of(name: str) -> Shape:
    """The shape of that name; PruningError for an unknown one."""
    if name not in SHAPES:
        raise unknown("shape", name, SHAPES)
    return SHAPES[name]


# -- configurations ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Configured(Shape):
    """A model by its config.json; prompts and pictures are those of `like`, one square picture."""

    like: Shape | None = None
    config: Any = None

    def model(self, layers: int | None, attention: str) -> nn.Module:
        from copy import deepcopy

        from transformers import AutoModelForImageTextToText

        config = deepcopy(self.config)
        config.get_text_config().num_hidden_layers = layers or self.text["num_hidden_layers"]
        return AutoModelForImageTextToText.from_config(config, attn_implementation=attention)

    def prompt(self, batch: int, generator: torch.Generator) -> dict[str, Tensor]:
        prompt, token = self.like.prompt(batch, generator), self.config.image_token_id
        ids = prompt["input_ids"]
        return prompt | {"input_ids": ids.masked_fill(ids == IMAGE_TOKEN, token)}

    def pixels(self, batch: int, generator: torch.Generator) -> dict[str, Tensor]:
        return self.like.pixels(batch, generator)

    @property
    def tokens(self) -> int:
        return self.like.tokens


LIKE: dict[str, type[Shape]] = {"llava": Llava, "llava_next": LlavaNext, "qwen2_5_vl": Qwen25, "qwen3_vl": Qwen3}


def shape_from(path: Path) -> Shape:
    """The shape of a published configuration; PruningError for a file that is none, or another family's."""
    import json

    from transformers import AutoConfig

    if not path.is_file():
        raise PruningError(f"file not found: {path}")
    try:
        read = json.loads(path.read_text())
        kind = read["model_type"]
    except (ValueError, KeyError, TypeError, RecursionError):
        raise PruningError(f"{path} is not a model's config.json: it has no model_type") from None
    if kind not in LIKE:
        raise unknown("model_type", kind, LIKE, of=f" in {path}")
    config = AutoConfig.for_model(**read)
    vision, text = config.vision_config.to_dict(), config.get_text_config().to_dict()
    return Configured(vision, text, like=LIKE[kind](vision, text), config=config)
