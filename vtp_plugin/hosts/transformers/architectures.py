"""Model families as shapes: configurations with random weights, and random inputs that fit them.

A shape is a family and the sizes of one model; `shapes` has those of published models.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

QUESTION_TOKENS = 75  # text tokens around the image: system prompt, question and tail of a usual request
IMAGE_TOKEN = 32000


@dataclass(frozen=True)
class Shape(ABC):
    """One model's sizes, in the words of its configuration."""

    vision: Mapping[str, Any]
    text: Mapping[str, Any] | None = None  # None: an encoder
    decodes: ClassVar[bool] = True

    @property
    def first_cut(self) -> int:
        """The first decoder layer that may see fewer tokens."""
        return max(1, len(self.vision.get("deepstack_visual_indexes", ())))

    @abstractmethod
    def model(self, layers: int | None, attention: str) -> nn.Module:
        """The model; `layers` cuts the language model short."""

    @abstractmethod
    def pixels(self, batch: int, generator: torch.Generator) -> dict[str, Tensor]:
        """Random images, one per prompt, by argument name."""

    @property
    @abstractmethod
    def tokens(self) -> int:
        """Visual tokens of one image."""

    def prompt(self, batch: int, generator: torch.Generator) -> dict[str, Tensor]:
        """Random text with the placeholders of one image in its middle."""
        ids = random_text(batch, QUESTION_TOKENS + self.tokens, generator)
        ids[:, QUESTION_TOKENS // 2 : QUESTION_TOKENS // 2 + self.tokens] = IMAGE_TOKEN
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

    def build(self, layers: int | None, device: torch.device, dtype: torch.dtype, attention: str) -> nn.Module:
        """The model with random weights on a device."""
        default = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        try:
            with torch.device(device):
                model = self.model(layers, attention).eval().requires_grad_(False)
        finally:
            torch.set_default_dtype(default)
        if self.decodes:
            model.generation_config.eos_token_id, model.generation_config.pad_token_id = None, 0
        return model

    def inputs(self, model: nn.Module, batch: int) -> dict[str, Tensor]:
        """Random pictures and prompts of one image each."""
        generator = torch.Generator().manual_seed(0)
        prompt = self.prompt(batch, generator) if self.decodes else {}
        pixels = self.pixels(batch, generator)
        device = next(model.parameters()).device
        cast = {k: v.to(model.dtype) if v.is_floating_point() else v for k, v in (prompt | pixels).items()}
        return {name: value.to(device) for name, value in cast.items()}

    def _text(self, layers: int | None) -> dict[str, Any]:
        return {**self.text, "pad_token_id": 0, "num_hidden_layers": layers or self.text["num_hidden_layers"]}

    @property
    def _side(self) -> int:
        return self.vision["image_size"] // self.vision["patch_size"]


class Llava(Shape):
    """LLaVA-1.5: one image of the tower's size."""

    def model(self, layers: int | None, attention: str) -> nn.Module:
        from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

        vision, text = CLIPVisionConfig(**self.vision), LlamaConfig(**self._text(layers))
        config = LlavaConfig(
            vision_config=vision, text_config=text, image_token_id=IMAGE_TOKEN, attn_implementation=attention
        )
        return LlavaForConditionalGeneration(config)

    def pixels(self, batch: int, generator: torch.Generator) -> dict[str, Tensor]:
        side = self.vision["image_size"]
        return {"pixel_values": torch.randn(batch, 3, side, side, generator=generator)}

    @property
    def tokens(self) -> int:
        return self._side**2


class LlavaNext(Shape):
    """LLaVA-NeXT: a square image of 2 x 2 crops and a base tile: 5 tiles (2880 tokens) and the newlines of the rows."""

    def model(self, layers: int | None, attention: str) -> nn.Module:
        from transformers import CLIPVisionConfig, LlamaConfig, LlavaNextConfig, LlavaNextForConditionalGeneration

        side, vision, text = self.vision["image_size"], CLIPVisionConfig(**self.vision), self._text(layers)
        config = LlavaNextConfig(
            vision_config=vision,
            text_config=LlamaConfig(**text),
            image_token_id=IMAGE_TOKEN,
            image_grid_pinpoints=[[2 * side, 2 * side]],
            attn_implementation=attention,
        )
        return LlavaNextForConditionalGeneration(config)

    def pixels(self, batch: int, generator: torch.Generator) -> dict[str, Tensor]:
        side = self.vision["image_size"]
        values = torch.randn(batch, 5, 3, side, side, generator=generator)
        return {"pixel_values": values, "image_sizes": torch.tensor([[2 * side, 2 * side]] * batch)}

    @property
    def tokens(self) -> int:
        return self._side**2 + 2 * self._side * (2 * self._side + 1)


@dataclass(frozen=True)
class Qwen25(Shape):
    """Qwen2.5-VL: one square image of any resolution."""

    classes: ClassVar[tuple[str, str]] = ("Qwen2_5_VLConfig", "Qwen2_5_VLForConditionalGeneration")

    side: int = 36  # visual tokens along one side

    def model(self, layers: int | None, attention: str) -> nn.Module:
        import transformers

        config, model = (getattr(transformers, name) for name in self.classes)
        facts = {"vision_config": dict(self.vision), "text_config": self._text(layers), "image_token_id": IMAGE_TOKEN}
        return model(config(**facts, attn_implementation=attention))

    def prompt(self, batch: int, generator: torch.Generator) -> dict[str, Tensor]:
        prompt = super().prompt(batch, generator)
        return prompt | {"mm_token_type_ids": (prompt["input_ids"] == IMAGE_TOKEN).int()}

    def pixels(self, batch: int, generator: torch.Generator) -> dict[str, Tensor]:
        grid = (1, 2 * self.side, 2 * self.side)
        width = 3 * 2 * self.vision["patch_size"] ** 2
        values = torch.randn(batch * grid[1] * grid[2], width, generator=generator)
        return {"pixel_values": values, "image_grid_thw": torch.tensor([grid] * batch)}

    @property
    def tokens(self) -> int:
        return self.side**2


class Qwen3(Qwen25):
    """Qwen3-VL: one square image of any resolution; rows of three tower blocks are added to decoder layers."""

    classes = ("Qwen3VLConfig", "Qwen3VLForConditionalGeneration")


class Clip(Shape):
    """CLIP's vision transformer by itself."""

    decodes = False

    def model(self, layers: int | None, attention: str) -> nn.Module:
        from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

        vision = {**self.vision, "num_hidden_layers": layers or self.vision["num_hidden_layers"]}
        return CLIPVisionModelWithProjection(CLIPVisionConfig(**vision, attn_implementation=attention))

    pixels = Llava.pixels
    tokens = Llava.tokens


def random_text(batch: int, length: int, generator: torch.Generator) -> Tensor:
    """Ids that are no placeholder, [B, L]."""
    return torch.randint(100, 30000, (batch, length), generator=generator)
