"""Stage A: the CLIP learns what is under each patch (dense labels) and which captions are true (contrast)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import CLIPModel, CLIPTokenizer

from .modeling import SELECT_LAYER, VISION_WIDTH
from .questions import Caption, caption_part, caption_scene, facts
from .scenes import COLORS, GRID, PATCH, SHAPES, Scene

CLASSES = {"shape": len(SHAPES) + 2, "color": len(COLORS) + 1, "digit": 11, "center": 2}
FEWEST_SEEN = 0.25  # share of the patches that a tower which sees some of them sees at least
SMALLEST_GRID, LARGEST_GRID = 4, 16  # patches on a side of pictures of other sizes
NOTHING = 0.1  # weight of the class "nothing here", which most patches are


class DenseHeads(nn.Module):
    """One linear head per label, thrown away after training."""

    def __init__(self) -> None:
        super().__init__()
        self.heads = nn.ModuleDict({name: nn.Linear(VISION_WIDTH, classes) for name, classes in CLASSES.items()})
        self.heads["row"], self.heads["column"] = nn.Linear(VISION_WIDTH, GRID), nn.Linear(VISION_WIDTH, GRID)

    def forward(self, features: Tensor) -> dict[str, Tensor]:  # [B, N, D] -> name: [B, N, C]
        return {name: head(features) for name, head in self.heads.items()}


def dense_loss(logits: dict[str, Tensor], labels: Tensor, position: Tensor) -> tuple[Tensor, dict[str, float]]:
    """Labels are [B, 4, N], raster positions [B, N]. Also the accuracy of each head where there is something."""
    losses, accuracy = [], {}
    for target, (name, classes) in zip(labels.unbind(1), CLASSES.items(), strict=True):
        weight = torch.ones(classes, device=labels.device)
        weight[0] = NOTHING
        losses.append(F.cross_entropy(logits[name].transpose(1, 2), target, weight))
        hits = logits[name].argmax(-1) == target
        accuracy[f"patch {name}"] = hits[target > 0].float().mean().item()
    for name, target in (("row", position // GRID), ("column", position % GRID)):
        losses.append(0.2 * F.cross_entropy(logits[name].transpose(1, 2), target))
    return torch.stack(losses).sum(), accuracy


@dataclass(frozen=True)
class Captions:
    """Texts of a batch and the truth of every text about every image."""

    ids: Tensor  # [T, L]
    mask: Tensor  # [T, L]
    truth: Tensor  # bool [B, T]

    def to(self, device: str) -> Captions:
        return Captions(self.ids.to(device), self.mask.to(device), self.truth.to(device))


def write_captions(scenes: list[Scene], tokenizer: CLIPTokenizer, rng: np.random.Generator, parts: int = 3) -> Captions:
    """One full caption and some partial ones per scene, checked against all scenes of the batch."""
    captions: list[Caption] = [caption_scene(scene, rng) for scene in scenes]
    captions += [caption_part(scene, rng) for scene in scenes for _ in range(parts)]
    known = [facts(scene) for scene in scenes]
    truth = torch.tensor([[set(caption.claims) <= true for caption in captions] for true in known])
    encoded = tokenizer([caption.text for caption in captions], padding=True, truncation=True, return_tensors="pt")
    return Captions(encoded.input_ids, encoded.attention_mask, truth)


def contrastive_loss(images: Tensor, texts: Tensor, scale: Tensor, truth: Tensor) -> Tensor:
    """CLIP's loss with every true pair as a positive; texts that are true of all images teach nothing."""
    logits = scale.exp().clamp(max=100) * F.normalize(images, dim=-1) @ F.normalize(texts, dim=-1).T  # [B, T]
    target = truth.float()
    informative = ~truth.all(0)
    by_text = soft_cross_entropy(logits.T, target.T)[informative].mean()
    return (by_text + soft_cross_entropy(logits, target * informative).mean()) / 2


def soft_cross_entropy(logits: Tensor, target: Tensor) -> Tensor:  # [A, C], [A, C] -> [A]
    share = target / target.sum(-1, keepdim=True).clamp(min=1)
    return -(share * logits.log_softmax(-1)).sum(-1)


@dataclass(frozen=True)
class View:
    """What the vision tower makes of a batch."""

    patches: Tensor  # [B, N, D] what LLaVA reads
    pooled: Tensor  # [B, D] CLS after the last layer
    attention: Tensor  # [B, N] what CLS attends to in the layer that LLaVA reads, mean of the heads


@dataclass(frozen=True)
class Showing:
    """Pictures as the tower is shown them: of some size, with all patches or some."""

    pixels: Tensor  # [B, 3, H, W]
    seen: Tensor | None  # [B, K] of the H W / 14 / 14 patches, or all
    place: Tensor  # [B, K] where in the grid of 12 x 12 they are


def show(pixels: Tensor, rng: np.random.Generator, blind: float, resized: float) -> Showing:
    """As they are; or in a share of the steps with some patches only, or at another size and aspect ratio."""
    drawn, count = rng.random(), GRID * GRID
    if drawn < blind:
        left = int(count * rng.uniform(FEWEST_SEEN, 1))
        order = rng.random((len(pixels), count)).argsort(1)[:, :left]
        seen = torch.from_numpy(np.sort(order, 1)).to(pixels.device)
        return Showing(pixels, seen, seen)
    rows = columns = GRID
    if drawn < blind + resized:
        rows = int(rng.integers(SMALLEST_GRID, LARGEST_GRID + 1))
        columns = int(np.clip(rows + rng.integers(-3, 4), SMALLEST_GRID, LARGEST_GRID))
        size = (rows * PATCH, columns * PATCH)
        pixels = F.interpolate(pixels, size, mode="bicubic", antialias=True)
    nearest = [((torch.arange(parts) * 2 + 1) * GRID // (2 * parts)) for parts in (rows, columns)]
    place = (nearest[0][:, None] * GRID + nearest[1]).flatten().to(pixels.device)
    return Showing(pixels, None, place.expand(len(pixels), -1))


def look(clip: CLIPModel, pixels: Tensor, seen: Tensor | None = None) -> View:
    """The tower on pictures [B, 3, H, W] of any size; of the patches only those `seen` [B, K], if it is given."""
    tower = clip.vision_model
    hidden = embed(tower.embeddings, pixels)
    if seen is not None:
        columns = torch.cat([seen.new_zeros(len(seen), 1), 1 + seen], 1)
        hidden = hidden.gather(1, columns[..., None].expand(-1, -1, hidden.shape[-1]))
    states = [tower.pre_layrnorm(hidden)]
    for layer in tower.encoder.layers:
        states.append(layer(states[-1], attention_mask=None))
    attention = cls_attention(tower.encoder.layers[SELECT_LAYER], states[SELECT_LAYER - 1])
    return View(states[SELECT_LAYER][:, 1:], tower.post_layernorm(states[-1][:, 0]), attention)


def embed(embeddings: nn.Module, pixels: Tensor) -> Tensor:  # -> [B, 1 + N, D]
    """Class token and patches; at another size, position embeddings are those of the middle of every patch."""
    patches = embeddings.patch_embedding(pixels)  # [B, D, rows, columns]
    first, *rest = embeddings.position_embedding.weight.split([1, GRID * GRID])
    position = rest[0].T.unflatten(1, (GRID, GRID))[None]
    if patches.shape[2:] != position.shape[2:]:
        position = F.interpolate(position, patches.shape[2:], mode="bilinear", align_corners=False)
    start = (embeddings.class_embedding + first).expand(len(pixels), 1, -1)
    return torch.cat([start, (patches + position).flatten(2).transpose(1, 2)], 1)


@torch.no_grad()
def cls_attention(layer: nn.Module, hidden: Tensor) -> Tensor:  # [B, 1 + N, D] before the layer -> [B, N]
    attend, normed = layer.self_attn, layer.layer_norm1(hidden)
    heads = (len(hidden), -1, attend.num_heads, attend.head_dim)
    queries = attend.q_proj(normed[:, :1]).view(heads).transpose(1, 2)
    keys = attend.k_proj(normed).view(heads).transpose(1, 2)
    return (queries @ keys.transpose(2, 3) * attend.scale).softmax(-1).mean(1)[:, 0, 1:]


def vision_loss(
    clip: CLIPModel, heads: DenseHeads, view: View, labels: Tensor, position: Tensor, captions: Captions
) -> tuple[Tensor, dict[str, float]]:
    """Dense labels on the patches that LLaVA reads, contrast on CLS."""
    dense, log = dense_loss(heads(view.patches), labels, position)
    images = clip.visual_projection(view.pooled)
    read = clip.text_model(captions.ids, attention_mask=captions.mask)
    contrast = contrastive_loss(images, clip.text_projection(read.pooler_output), clip.logit_scale, captions.truth)
    return dense + 0.5 * contrast, {"dense": dense.item(), "contrast": contrast.item(), **log}
