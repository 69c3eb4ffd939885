"""The networks of `vtp-tiny-qwen` while it learns: Qwen2-VL's tower, merger and language model, begun from LLaVA's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..examining import shipped
from ..fitting import Run
from ..lowrank import adapt
from ..missing import Sight
from ..modeling import normalize
from ..pool import draw
from ..scenes import GRID, PATCH, sample_scene
from ..store import load_weights
from ..vision import DenseHeads, embed
from .folder import FRAMES, MERGED, PATCHES, PIXELS, UNITS, language_weights, qwen_config, qwen_tokenizer

RANK = 16


class Reader(nn.Module):
    """A language model of transformers with its head, named like a Llama's."""

    def __init__(self, model: nn.Module, lm_head: nn.Module) -> None:
        super().__init__()
        self.model, self.lm_head = model, lm_head

    @property
    def dtype(self) -> torch.dtype:
        return self.lm_head.weight.dtype

    def get_input_embeddings(self) -> nn.Module:
        return self.model.embed_tokens


@dataclass
class Student:
    """The language model, frozen, and what is learned: `visual` in front of it, `factors` beside it, dense heads."""

    reader: Reader
    learned: nn.ModuleDict

    def look(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Pictures uint8 [B, H, W, 3] -> patches [B, N, D] in the order of the merger, tokens [B, n, D] in raster's."""
        visual = self.learned["visual"]
        grid = torch.tensor([[1, PATCHES, PATCHES]], device=images.device).expand(len(images), -1)
        seen = visual(patches(images), grid_thw=grid)
        shape = (len(images), -1)
        return seen.last_hidden_state.unflatten(0, shape), seen.pooler_output.unflatten(0, shape)


def student(run: Run, stages: Sequence[str], dtype: torch.dtype = torch.float32) -> Student:
    """From the package's networks, then as far as these stages have trained; `dtype` of the matrices that rest."""
    from transformers import Qwen2VLForConditionalGeneration

    torch.manual_seed(0)
    tokenizer, text = qwen_tokenizer(), load_weights("llama")
    whole = Qwen2VLForConditionalGeneration(qwen_config(tokenizer, layers=8))
    reader = Reader(whole.model.language_model, whole.lm_head)
    reader.load_state_dict({name: value.float() for name, value in language_weights(tokenizer, text).items()})
    visual = whole.model.visual
    visual.load_state_dict(first_tower(shipped()[0]["clip"].vision_model), strict=False)  # the merger begins anew
    reader = reader.to(run.device, dtype)
    parts = {"visual": visual, "heads": DenseHeads(), "factors": adapt(reader, RANK)}
    learned = nn.ModuleDict(parts).to(run.device)
    for stage in stages:
        if state := run.load(stage):
            learned.load_state_dict(state["modules"], strict=False)
    return Student(reader, learned)


def first_tower(clip: nn.Module) -> dict[str, Tensor]:
    """A CLIP's blocks as Qwen2-VL's; the last one, which LLaVA does not read, says nothing at first.

    Class token, position embeddings and biases in front of the blocks have no place there. The layer norm in front is
    made part of the patch embedding, as if all patches had the deviation that those of a few scenes have on average.
    """
    scenes = np.stack([draw(sample_scene("train", seed)) for seed in range(8)])
    spread = embed(clip.embeddings, normalize(torch.from_numpy(scenes)))[:, 1:].std(-1).mean()
    kernel, gain = clip.embeddings.patch_embedding.weight, clip.pre_layrnorm.weight
    kernel = (kernel - kernel.mean(0)) * (gain / spread / FRAMES)[:, None, None, None]
    state = {"patch_embed.proj.weight": kernel[:, :, None].expand(-1, -1, FRAMES, -1, -1)}
    names = {"norm1": "layer_norm1", "norm2": "layer_norm2", "mlp.fc1": "mlp.fc1", "mlp.fc2": "mlp.fc2"}
    names |= {"attn.proj": "self_attn.out_proj"}
    for number, block in enumerate(clip.encoder.layers):
        old, last = block.state_dict(), number + 1 == len(clip.encoder.layers)
        for kind in ("weight", "bias"):
            for new, name in names.items():
                silent = last and new in ("attn.proj", "mlp.fc2")
                state[f"blocks.{number}.{new}.{kind}"] = old[f"{name}.{kind}"] * (not silent)
            joined = torch.cat([old[f"self_attn.{part}_proj.{kind}"] for part in "qkv"])
            state[f"blocks.{number}.attn.qkv.{kind}"] = joined
    return state


def patches(images: Tensor) -> Tensor:
    """Pictures uint8 [B, H, W, 3] as the processor of Qwen2-VL gives them: [B N, 3 * 2 * 14 * 14]."""
    larger = F.interpolate(images.permute(0, 3, 1, 2), (PIXELS, PIXELS), mode="bicubic", antialias=True)
    pixels = normalize(larger.permute(0, 2, 3, 1))
    cut = pixels.unflatten(3, (UNITS, MERGED, PATCH)).unflatten(2, (UNITS, MERGED, PATCH))  # b c (u m p) (v w q)
    rows = cut.permute(0, 2, 5, 3, 6, 1, 4, 7)  # b u v m w c p q
    return rows.unsqueeze(6).expand(*rows.shape[:6], FRAMES, PATCH, PATCH).flatten(5).flatten(0, 4)


def nearest() -> Tensor:
    """[N] in the order of the merger: which of the 12 x 12 patches of the embedded CLIP lies under a patch's middle."""
    middle = (torch.arange(PATCHES) * 2 + 1) * GRID // (2 * PATCHES)
    raster = middle[:, None] * GRID + middle
    return raster.unflatten(1, (UNITS, MERGED)).unflatten(0, (UNITS, MERGED)).permute(0, 2, 1, 3).flatten()


def shrunk(maps: Tensor) -> Tensor:
    """Maps [B, 144, D] of 12 x 12 patches as averages over the areas of 8 x 8 tokens, [B, 64, D]."""
    fine = maps.unflatten(1, (GRID, GRID)).repeat_interleave(MERGED, 1).repeat_interleave(MERGED, 2)
    side = GRID * MERGED // UNITS
    return fine.unflatten(2, (UNITS, side)).unflatten(1, (UNITS, side)).mean((2, 4)).flatten(1, 2)


def on_axes(sight: Sight) -> Sight:
    """M-RoPE: original positions are a time, a row and a column; the others are the same number on all axes."""
    place = sight.place
    if sight.length < UNITS**2:
        return Sight(sight.tokens, place.expand(3, -1, -1), sight.length)
    return Sight(sight.tokens, torch.stack([torch.zeros_like(place), place // UNITS, place % UNITS]), UNITS)
