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
from .scenes import COLORS, GRID, SHAPES, Scene

CLASSES = {"shape": len(SHAPES) + 2, "color": len(COLORS) + 1, "digit": 11, "center": 2}
NOTHING = 0.1  # weight of the class "nothing here", which most patches are


class DenseHeads(nn.Module):
    """One linear head per label, thrown away after training."""

    def __init__(self) -> None:
        super().__init__()
        self.heads = nn.ModuleDict({name: nn.Linear(VISION_WIDTH, classes) for name, classes in CLASSES.items()})
        self.heads["row"], self.heads["column"] = nn.Linear(VISION_WIDTH, GRID), nn.Linear(VISION_WIDTH, GRID)

    def forward(self, features: Tensor) -> dict[str, Tensor]:  # [B, N, D] -> name: [B, N, C]
        return {name: head(features) for name, head in self.heads.items()}


def dense_loss(logits: dict[str, Tensor], labels: Tensor) -> tuple[Tensor, dict[str, float]]:
    """Labels are [B, 4, N]. Also the accuracy of each head where there is something."""
    position = torch.arange(GRID * GRID, device=labels.device).expand(len(labels), -1)
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


def look(clip: CLIPModel, pixels: Tensor) -> View:
    seen = clip.vision_model(pixels, output_hidden_states=True)
    return View(seen.hidden_states[SELECT_LAYER][:, 1:], seen.pooler_output)


def vision_loss(
    clip: CLIPModel, heads: DenseHeads, view: View, labels: Tensor, captions: Captions
) -> tuple[Tensor, dict[str, float]]:
    """Dense labels on the patches that LLaVA reads, contrast on CLS."""
    dense, log = dense_loss(heads(view.patches), labels)
    images = clip.visual_projection(view.pooled)
    read = clip.text_model(captions.ids, attention_mask=captions.mask)
    contrast = contrastive_loss(images, clip.text_projection(read.pooler_output), clip.logit_scale, captions.truth)
    return dense + 0.5 * contrast, {"dense": dense.item(), "contrast": contrast.item(), **log}
