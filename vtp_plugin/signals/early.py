"""The signals of the pixels and vit stages."""

from __future__ import annotations

from torch import Tensor

from vtp_plugin.signals.declaration import Tap, signal
from vtp_plugin.signals.synthetic import fingerprints, raw_patches, whole_numbers
from vtp_plugin.signals.views import EmbeddingView, MergingView, PatchesView
from vtp_plugin.stages import Stage

CONTENT = "[B] numbers: one number per image, the same in any batch, order and precision: for seeded randomness"


@signal("pixels", Stage.PIXELS, "[B, N, 3, p, p] uint8: the raw patches", taps=Tap.PIXELS, sample=raw_patches)
def pixels(at: PatchesView) -> Tensor:
    return at.pixels


@signal("fingerprint", Stage.PIXELS, CONTENT, taps=Tap.CONTENT, sample=fingerprints)
def patches_fingerprint(at: PatchesView) -> tuple[int, ...]:
    return at.fingerprint


@signal("centered", Stage.VIT, "[B, N, D]: embeddings of the patches minus their mean colour")
def centered(at: EmbeddingView) -> Tensor:
    return at.centered


@signal("positioned", Stage.VIT, "[B, N, D]: embeddings with their position embeddings added")
def positioned(at: EmbeddingView) -> Tensor:
    return at.positioned


@signal("fingerprint", Stage.VIT, CONTENT, taps=Tap.CONTENT, sample=fingerprints)
def embedding_fingerprint(at: EmbeddingView) -> tuple[int, ...]:
    return at.fingerprint


@signal("keys", Stage.VIT, "[B, N, d] fp32: keys of this block, mean over heads, bias included")
def block_keys(at: MergingView) -> Tensor:
    return at.projected_keys.unflatten(-1, (-1, at.width)).float().mean(2)[:, at.prefix :]


@signal("sizes", Stage.VIT, "[B, N] fp32: patches that every token stands for", sample=whole_numbers(1, 4))
def sizes(at: MergingView) -> Tensor:
    return at.sizes


@signal("cls", Stage.VIT, "[B, D]: the class token; None where the tower has none")
def class_token(at: MergingView) -> Tensor | None:
    return at.hidden[:, 0] if at.prefix else None


@signal("fingerprint", Stage.VIT, CONTENT, taps=Tap.CONTENT, sample=fingerprints)
def merging_fingerprint(at: MergingView) -> tuple[int, ...]:
    return at.fingerprint
