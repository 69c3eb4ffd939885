"""The formulas of papers, under their names, so that their tables can be compared.

Each counts something else: two or three matrices in the MLP, visual tokens only or the text too, MACs under the name of
FLOPs or FLOPs. The same unpruned LLaVA-1.5-7B is quoted at 2.99, 3.82, 4.49, 7.63 and 8.9 T. None counts the vision
tower, the projector or the selection. Default sizes: the language model of LLaVA-1.5-7B.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Decoder:
    """Sizes that the formulas take: layers T, width d, MLP width m."""

    layers: int = 32
    width: int = 4096
    mlp: int = 11008

    def layer(self, tokens: float, matrices: int) -> float:
        """4 n d^2 + 2 n^2 d + 2 or 3 n d m."""
        d, n = self.width, tokens
        return 4 * n * d**2 + 2 * n**2 * d + matrices * n * d * self.mlp


VICUNA_7B = Decoder()
VICUNA_13B = Decoder(40, 5120, 13824)


def fastv(visual: int, keep_ratio: float, layer: int = 2, text: int = 0, decoder: Decoder = VICUNA_7B) -> float:
    """FastV: the share of FLOPs that is left, [K f(n) + (T - K) f(n - R N)] / [T f(n)], f with two MLP matrices.

    Its README's "57 %" (K = 3, R = 50 %) counts the 36 tokens in front of the image; with `text=0` it is 54 %.
    """
    whole, left = (decoder.layer(text + n, 2) for n in (visual, keep_ratio * visual))
    return (layer * whole + (decoder.layers - layer) * left) / (decoder.layers * whole)


def visionzip(visual: int, text: int = 0, decoder: Decoder = VICUNA_7B) -> float:
    """VisionZip, DivPrune: T (4 n d^2 + 2 n^2 d + 2 n d m), MACs that are printed as FLOPs."""
    return decoder.layers * decoder.layer(text + visual, 2)


def sparsevlm(tokens: Sequence[float], decoder: Decoder = VICUNA_7B) -> float:
    """SparseVLM: the sum over layers of 4 n d^2 + 2 n^2 d + 3 n d m, text in `tokens` (one per layer), MACs."""
    return sum(decoder.layer(n, 3) for n in tokens)


def pyramiddrop(visual: Sequence[float], decoder: Decoder = VICUNA_7B) -> float:
    """PyramidDrop, FitPrune: SparseVLM's sum over visual tokens only, MACs."""
    return sparsevlm(visual, decoder)


def cdpruner(visual: int, decoder: Decoder = VICUNA_7B) -> float:
    """CDPruner: 2 T (4 n d^2 + 2 n^2 d + 3 n d m), visual tokens only: FLOPs."""
    return 2 * decoder.layers * decoder.layer(visual, 3)


def holov(keep_ratio: float) -> float:
    """HoloV: the share removed as if all cost were quadratic, 1 - (1 - R)^2."""
    return 1 - keep_ratio**2


def vprune(before: float, after: float) -> float:
    """V-PRUNE's "FLOPs ratio": the share that is removed, not the one that is left."""
    return 1 - after / before
