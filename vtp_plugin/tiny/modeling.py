"""The three networks at their tiny sizes, as transformers' own classes, and how their weights are named together."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import CLIPConfig, CLIPModel, LlamaConfig, LlamaForCausalLM

from .scenes import PATCH, SIZE

VISION_WIDTH, LLAMA_WIDTH, LLAMA_LAYERS = 128, 192, 8
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
SELECT_LAYER = -2


def clip_config(vocab_size: int) -> CLIPConfig:
    vision = {
        "hidden_size": VISION_WIDTH,
        "intermediate_size": 4 * VISION_WIDTH,
        "num_hidden_layers": 6,
        "num_attention_heads": 4,
        "image_size": SIZE,
        "patch_size": PATCH,
        "projection_dim": 128,
    }
    text = {
        "vocab_size": vocab_size,
        "hidden_size": 128,
        "intermediate_size": 512,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "max_position_embeddings": 77,
        "projection_dim": 128,
        "bos_token_id": vocab_size - 2,
        "eos_token_id": vocab_size - 1,
        "pad_token_id": vocab_size - 1,
    }
    return CLIPConfig(text_config=text, vision_config=vision, projection_dim=128)


def llama_config(vocab_size: int, layers: int = LLAMA_LAYERS) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=LLAMA_WIDTH,
        intermediate_size=512,
        num_hidden_layers=layers,
        num_attention_heads=6,
        num_key_value_heads=6,
        max_position_embeddings=2048,
        bos_token_id=1,
        eos_token_id=2,
        tie_word_embeddings=False,
    )


class Projector(nn.Module):
    """LLaVA-1.5's mlp2x_gelu, with transformers' parameter names."""

    def __init__(self) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(VISION_WIDTH, LLAMA_WIDTH)
        self.linear_2 = nn.Linear(LLAMA_WIDTH, LLAMA_WIDTH)

    def forward(self, features: Tensor) -> Tensor:  # [B, N, 128] -> [B, N, 192]
        return self.linear_2(nn.functional.gelu(self.linear_1(features)))


def normalize(images: Tensor) -> Tensor:  # uint8 [B, H, W, 3] -> [B, 3, H, W]
    pixels = images.permute(0, 3, 1, 2).float() / 255
    mean, std = (torch.tensor(values, device=images.device).view(1, 3, 1, 1) for values in (MEAN, STD))
    return (pixels - mean) / std


def build(clip_vocab: int, llama_vocab: int, seed: int = 0) -> dict[str, nn.Module]:
    """Fresh networks."""
    torch.manual_seed(seed)
    return {
        "clip": CLIPModel(clip_config(clip_vocab)),
        "projector": Projector(),
        "llama": LlamaForCausalLM(llama_config(llama_vocab)),
    }


def deepen(weights: dict[str, Tensor], layers: int = LLAMA_LAYERS) -> dict[str, Tensor]:
    """A LLaMA's weights for a deeper one that computes the same.

    Behind every layer stand copies of it whose outputs, `o_proj` and `down_proj`, are zero. ValueError if `layers` is
    not a multiple of the weights' own.
    """
    shallow = depth(weights)
    if layers % shallow:
        raise ValueError(f"{shallow} layers cannot become {layers}: not a multiple")
    times, grown = layers // shallow, {}
    for name, value in weights.items():
        if not name.startswith("model.layers."):
            grown[name] = value
            continue
        index, rest = name.removeprefix("model.layers.").split(".", 1)
        for copy in range(times):
            silent = copy > 0 and rest in ("self_attn.o_proj.weight", "mlp.down_proj.weight")
            grown[f"model.layers.{int(index) * times + copy}.{rest}"] = (
                value.new_zeros(value.shape) if silent else value
            )
    return grown


def depth(weights: dict[str, Tensor]) -> int:
    """How many layers a LLaMA with these weights has."""
    return 1 + max(int(name.split(".")[2]) for name in weights if name.startswith("model.layers."))
