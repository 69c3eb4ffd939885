"""A small DeepSeek-VL with random weights, for `vtp check-model vtp_example.small:build`."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from transformers import DeepseekVLConfig, DeepseekVLForConditionalGeneration

from vtp_plugin.promises import Case

IMAGE, SIDE, PATCH = 190, 16, 4


def build() -> Case:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4}
    config = DeepseekVLConfig(
        text_config={"model_type": "llama", **sizes, "num_key_value_heads": 2, "vocab_size": 200},
        vision_config={"model_type": "siglip_vision_model", **sizes, "image_size": SIDE, "patch_size": PATCH},
        image_token_id=IMAGE,
    )
    model = DeepseekVLForConditionalGeneration(config).eval()
    model.lm_head.weight.data[IMAGE] = 0  # an answer has no placeholders
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = None, 0
    prompts = [prompt(1, images=2), prompt(2, images=1)]
    levels = SimpleNamespace(
        image_mean=[0.5] * 3, image_std=[0.5] * 3, do_normalize=True, preprocess=lambda images: images
    )
    return Case(model, prompts, together(prompts), SimpleNamespace(image_processor=levels))


def prompt(seed: int, images: int) -> dict[str, Any]:
    """One sample: words, and behind every third of them a picture of noise."""
    draw = torch.Generator().manual_seed(seed)
    words = torch.randint(3, 180, (3 * images + 2,), generator=draw).tolist()
    ids = []
    for number, word in enumerate(words):
        ids += [word] + [IMAGE] * (SIDE // PATCH) ** 2 * (number % 3 == 2)
    pixels = (torch.randint(0, 256, (images, 3, SIDE, SIDE), generator=draw) / 255 - 0.5) / 0.5
    return {"input_ids": torch.tensor([ids]), "attention_mask": torch.ones(1, len(ids)).long(), "pixel_values": pixels}


def together(prompts: list[dict[str, Any]]) -> dict[str, Any]:
    """All samples, padded on the left."""
    longest = max(prompt["input_ids"].shape[1] for prompt in prompts)
    batch = {"pixel_values": torch.cat([prompt["pixel_values"] for prompt in prompts])}
    for name in ("input_ids", "attention_mask"):
        rows = [torch.nn.functional.pad(prompt[name], (longest - prompt[name].shape[1], 0)) for prompt in prompts]
        batch[name] = torch.cat(rows)
    return batch
