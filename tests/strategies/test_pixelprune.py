"""PixelPrune against a raster scan, pixel by pixel."""

from __future__ import annotations

import math

import pytest
import slow
import torch
from torch import Tensor

from vtp_plugin import VisualTokens, get_strategy


def picture(kind: str, rows: int, cols: int, p: int = 2) -> Tensor:
    """Patches [1, N, 3, p, p] of a picture."""
    levels = {"constant": 1, "few": 2, "noise": 256, "close": 4}[kind]
    blocks = torch.randint(0, levels, (1, rows * cols, 3, 1, 1)).expand(-1, -1, -1, p, p)
    return blocks.to(torch.uint8).clone()


def distance(a: list[float], b: list[float], how: str) -> float:
    differences = [abs(x - y) for x, y in zip(a, b, strict=True)]
    if how == "max":
        return max(differences)
    if how == "mae":
        return sum(differences) / len(differences)
    return math.sqrt(sum(d * d for d in differences) / len(differences))


def restated(pixels: Tensor, rows: int, cols: int, tau: float, how: str, block: int) -> list[int]:
    """Kept patches of a full grid whose sides are multiples of the block."""
    value: dict[tuple[int, int], list[float]] = {}
    kept = []
    for u in range(rows // block):
        for v in range(cols // block):
            own = [(u * block + a) * cols + v * block + b for a in range(block) for b in range(block)]
            exact = [x / 255 for i in own for x in pixels[i].flatten().tolist()]
            if (u, v) == (0, 0):
                predictor = None
            elif u == 0:
                predictor = value[u, v - 1]
            elif v == 0:
                predictor = value[u - 1, v]
            else:
                left, above, corner = value[u, v - 1], value[u - 1, v], value[u - 1, v - 1]
                edge = distance(corner, left, how) <= tau and not distance(corner, above, how) <= tau
                predictor = above if edge else left
            if predictor is not None and distance(exact, predictor, how) <= tau:
                value[u, v] = predictor
            else:
                value[u, v] = exact
                kept.extend(own)
    return sorted(kept)


@pytest.mark.parametrize("how", ["max", "mae", "rmse"])
@pytest.mark.parametrize("tau", [0.0, 0.0061])
@pytest.mark.parametrize(("rows", "cols", "block"), [(1, 1, 1), (1, 6, 1), (6, 1, 1), (6, 8, 1), (8, 6, 2)])
@pytest.mark.parametrize("kind", ["constant", "few", "close", "noise"])
def test_as_described(kind: str, rows: int, cols: int, block: int, tau: float, how: str):
    pixels = picture(kind, rows, cols)
    seen = slow.visual(pixels.flatten(2).float(), grid=(rows, cols), pixels=pixels)
    kept = get_strategy("pixelprune")(threshold=tau, distance=how, block=block).decide(seen)
    assert slow.columns(kept)[0] == restated(pixels[0], rows, cols, tau, how, block)


def test_errors_do_not_add_up():
    ramp = torch.arange(8, dtype=torch.uint8)[None, :, None, None, None].expand(1, 8, 3, 2, 2)
    seen = slow.visual(ramp.flatten(2).float(), grid=(1, 8), pixels=ramp)
    assert slow.columns(get_strategy("pixelprune")(threshold=2.1 / 255).decide(seen)) == [[0, 3, 6]]


def test_a_constant_picture_keeps_its_corner_and_noise_keeps_all():
    for kind, kept in (("constant", [0]), ("noise", list(range(48)))):
        pixels = picture(kind, 6, 8)
        seen = slow.visual(pixels.flatten(2).float(), grid=(6, 8), pixels=pixels)
        assert slow.columns(get_strategy("pixelprune")().decide(seen)) == [kept]


def test_a_dropped_neighbour_predicts_nothing():
    pixels = picture("constant", 2, 3)[:, [0, 2, 3, 4, 5]]
    seen = VisualTokens(pixels.flatten(2).float(), (2, 3), torch.tensor([[0, 2, 3, 4, 5]]), pixels=pixels)
    assert slow.columns(get_strategy("pixelprune")().decide(seen)) == [[0, 1]]
