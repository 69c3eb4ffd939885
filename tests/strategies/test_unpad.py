"""unpad drops the padding, all of it, and nothing else."""

from __future__ import annotations

import pytest
import slow
import torch
from torch import Tensor

from vtp_plugin import VisualTokens, get_strategy

CLIP = (122, 116, 104)


def patches(image: Tensor, size: int = 4) -> tuple[Tensor, tuple[int, int]]:
    """[3, h, w] -> [N, 3, p, p] and the grid."""
    rows, columns = image.shape[1] // size, image.shape[2] // size
    return image.unflatten(2, (columns, size)).unflatten(1, (rows, size)).permute(1, 3, 0, 2, 4).flatten(0, 1), (
        rows,
        columns,
    )


def padded(height: int, width: int, side: int, color: tuple[int, ...] = CLIP) -> Tensor:
    """A noisy picture in the middle of a square of one colour."""
    square = torch.tensor(color, dtype=torch.uint8).view(3, 1, 1).repeat(1, side, side)
    top, left = (side - height) // 2, (side - width) // 2
    square[:, top : top + height, left : left + width] = torch.randint(0, 100, (3, height, width), dtype=torch.uint8)
    return square


def kept(image: Tensor, **fields: str) -> tuple[set[int], tuple[int, int]]:
    pixels, grid = patches(image)
    n = len(pixels)
    seen = VisualTokens(pixels.flatten(1)[None], grid, torch.arange(n)[None], pixels=pixels[None])
    return set(slow.columns(get_strategy("unpad")(**fields).decide(seen))[0]), grid


def holding(image: Tensor, color: tuple[int, ...] = CLIP) -> set[int]:
    """Patches with a pixel that is not of the colour."""
    pixels, _ = patches(image)
    other = (pixels.int() - torch.tensor(color).view(3, 1, 1)).abs().amax(1) > 1
    return set(other.flatten(1).any(1).nonzero().flatten().tolist())


@pytest.mark.parametrize(("height", "width"), [(32, 24), (24, 32), (30, 32), (32, 17), (32, 32)])
def test_what_holds_nothing_of_the_picture_goes(height: int, width: int):
    image = padded(height, width, 32)
    assert kept(image)[0] == holding(image)


def test_a_blank_patch_inside_the_picture_stays():
    image = padded(24, 32, 32)
    image[:, 12:20, 8:16] = torch.tensor(CLIP, dtype=torch.uint8).view(3, 1, 1)
    inside, (_, columns) = kept(image)
    assert {3 * columns + 2, 4 * columns + 3} <= inside
    assert len(inside) == 6 * columns


def test_rounding_by_one_level_is_forgiven_and_no_more():
    image = padded(24, 32, 32)
    image[:, :4] += 1
    assert len(kept(image)[0]) == 48
    image[0, 1, 1] += 1
    assert len(kept(image)[0]) == 56


def test_the_blurred_edge_of_a_picture_is_forgiven_on_its_side_only():
    """Two rows of pixels beside the picture may be off by 20 levels; nowhere else, and not by 21."""
    image = padded(24, 32, 32)
    image[:, 2:4] += 20
    image[:, 28:30] -= 20
    assert len(kept(image)[0]) == 48
    assert len(kept(image, blur=19)[0]) == len(kept(image, blur=0)[0]) == 64
    image[1, 2, 9] += 1
    assert len(kept(image)[0]) == 56
    away = padded(24, 32, 32)
    away[:, :2] += 20
    assert len(kept(away)[0]) == 56


@pytest.mark.parametrize(("width", "height"), [(640, 480), (480, 640), (500, 375), (375, 500), (500, 333), (300, 300)])
def test_a_photograph_that_llava_pads(width: int, height: int):
    """As many rows of patches as lie wholly in the padding; of 640 x 480 a quarter of the patches."""
    import numpy as np
    from PIL import Image

    from vtp_plugin.hosts.transformers.preparing import prepared

    draw = np.random.default_rng(0)
    noise = Image.fromarray(draw.integers(0, 256, (height // 5, width // 5, 3), dtype=np.uint8)).resize((width, height))
    (seen,) = prepared("llava-1.5")(noise)
    side, short = max(width, height), min(width, height)
    above = (side - short) // 2  # pixels of the padded picture; what is odd goes below
    rows = sum(24 * pixels // side for pixels in (above, side - short - above))
    assert get_strategy("unpad")().decide(seen).counts == [24 * (24 - rows)]
    assert rows == 6 or 640 not in (width, height)


@pytest.mark.parametrize(("name", "color"), [("black", (0, 0, 0)), ("white", (255,) * 3), ("gray", (127,) * 3)])
def test_other_colours(name: str, color: tuple[int, ...]):
    image = padded(24, 32, 32, color)
    assert len(kept(image, color=name)[0]) == 48
    assert len(kept(image)[0]) == 64


def test_a_picture_of_nothing_keeps_a_patch():
    assert kept(padded(0, 0, 32))[0] == {0}


def test_llava_pads_with_this_colour():
    """The processor's mean, as the authors' code rounds it."""
    from transformers import CLIPImageProcessor

    assert tuple(int(value * 255) for value in CLIPImageProcessor().image_mean) == CLIP
