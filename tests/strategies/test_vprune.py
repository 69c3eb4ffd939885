"""V-PRUNE: against loops over pairs of patches, and what the article states about extreme images."""

from __future__ import annotations

import pytest
import reference
import torch
from models import picture
from torch import Tensor

from vtp_plugin import VisualTokens, get_strategy

SWITCHES = [
    {"chi2_threshold": 20.0},
    {"chi2_threshold": 60.0, "cosine_threshold": 0.75},
    {"cosine_threshold": 0.999},
    {"bins": 3},
    {"bins": 256, "chi2_threshold": 30.0},
    {"combine": "or"},
    {"combine": "chi2"},
    {"combine": "cosine"},
    {"chi2_form": "asymmetric", "combine": "chi2", "chi2_threshold": 20.0},
    {"vector": "mean"},
    {"vector": "centered", "combine": "cosine", "cosine_threshold": 0.1},
    {"survivor": "variance", "combine": "chi2", "chi2_threshold": 25.0},
    {"survivor": "all", "combine": "chi2", "chi2_threshold": 25.0},
    {"color_space": "hsv"},
    {"color_space": "hsv", "combine": "chi2", "chi2_threshold": 25.0},
    {"group": 3},
    {"group": 4, "combine": "chi2", "chi2_threshold": 25.0},
]
PAIRS = [
    ({"chi2_threshold": 20.0}, {}),
    ({"cosine_threshold": 0.9999}, {}),
    ({"bins": 3}, {}),
    ({"group": 3}, {}),
    ({"color_space": "hsv"}, {}),
    ({"survivor": "all"}, {}),
    ({"survivor": "variance", "chi2_threshold": 30.0}, {"chi2_threshold": 30.0}),
    ({"vector": "mean"}, {}),
    ({"vector": "centered", "combine": "cosine"}, {"combine": "cosine"}),
    ({"combine": "or"}, {}),
    ({"combine": "chi2"}, {}),
    ({"combine": "cosine"}, {}),
    ({"combine": "chi2", "chi2_form": "asymmetric"}, {"combine": "chi2"}),
]


def kept(image: Tensor, grid: tuple[int, int], columns: list[int] | None = None, **switches: object) -> list[int]:
    """Raster positions that the strategy keeps of one image."""
    pixels = reference.patches(image)
    index = torch.arange(len(pixels)) if columns is None else torch.tensor(columns)
    seen = {"pixels": pixels[index][None], "tokens": pixels[index].flatten(1)[None].float(), "index": index[None]}
    selection = get_strategy("vprune")(**switches).decide(VisualTokens(grid=grid, **seen))
    return index[selection.sources[0]].tolist()


def busy(seed: int, rows: int = 6, columns: int = 6) -> Tensor:
    """Patches that resemble their neighbours: flat, more or less noisy, black, shuffled."""
    draw = torch.Generator().manual_seed(seed)
    noise = torch.randint(0, 256, (3, rows * 8, columns * 8), generator=draw).float()
    base = torch.randint(0, 256, (3, -(-rows // 2), -(-columns // 2)), generator=draw).float()
    base = base.repeat_interleave(16, 1).repeat_interleave(16, 2)[:, : rows * 8, : columns * 8]
    strength = torch.rand(1, rows, columns, generator=draw) ** 2 * 0.5
    strength *= torch.rand(1, rows, columns, generator=draw) > 0.3
    strength = strength.repeat_interleave(8, 1).repeat_interleave(8, 2)
    image = base * (1 - strength) + noise * strength
    image[:, :16, 16:32] = 0
    for c in range(0, columns * 8, 8):  # a row of patches with the same pixels in another order
        image[:, -8:, c : c + 8] = image[:, -8:, :8].flatten(1)[:, torch.randperm(64, generator=draw)].view(3, 8, 8)
    return image.round().clamp(0, 255).to(torch.uint8)


@pytest.mark.parametrize("switches", [{}, *SWITCHES], ids=str)
@pytest.mark.parametrize("seed", [0, 1])
def test_the_same_patches_survive_as_in_the_restatement(switches: dict, seed: int):
    image = busy(seed)
    assert kept(image, (6, 6), **switches) == reference.VPrune(**switches).kept(reference.patches(image), (6, 6))


@pytest.mark.parametrize(("one", "other"), PAIRS, ids=str)
def test_every_switch_changes_something(one: dict, other: dict):
    assert any(kept(busy(s), (6, 6), **one) != kept(busy(s), (6, 6), **other) for s in range(8))


@pytest.mark.parametrize(("rows", "columns"), [(5, 5), (6, 3), (1, 4), (1, 1), (7, 2)])
@pytest.mark.parametrize("switches", [{}, {"group": 3}, {"survivor": "all"}, {"survivor": "variance"}], ids=str)
def test_grids_that_the_groups_do_not_tile(rows: int, columns: int, switches: dict):
    image = busy(3, rows, columns)
    expected = reference.VPrune(**switches).kept(reference.patches(image), (rows, columns))
    assert kept(image, (rows, columns), **switches) == expected


def test_patches_that_are_gone_already_do_not_count():
    image, present = busy(4), [0, 2, 3, 7, 8, 9, 13, 20, 21, 26, 27, 35]
    expected = reference.VPrune().kept(reference.patches(image), (6, 6), present)
    assert kept(image, (6, 6), present) == expected


@pytest.mark.parametrize("colour", [(0, 0, 0), (255, 255, 255), (17, 130, 4)])
@pytest.mark.parametrize("switches", [{}, *({k: v for k, v in s.items() if k != "group"} for s in SWITCHES)], ids=str)
def test_a_constant_image_keeps_one_patch_per_group(colour: tuple[int, int, int], switches: dict):
    image = torch.tensor(colour, dtype=torch.uint8).view(3, 1, 1).expand(3, 48, 48)
    corners = [r * 6 + c for r in (0, 2, 4) for c in (0, 2, 4)]
    assert kept(image, (6, 6), **switches) == corners


@pytest.mark.parametrize("chi2", [0.0, 5.0, 20.0, 1000.0])
def test_white_noise_is_kept(chi2: float):
    noise = torch.randint(0, 256, (3, 14 * 8, 14 * 8), dtype=torch.uint8)
    for threshold in (0.85, 0.95):
        assert len(kept(noise, (14, 14), chi2_threshold=chi2, cosine_threshold=threshold)) == 14 * 14


def test_white_noise_of_clip_sized_patches_is_kept_from_a_cosine_of_0_8():
    noise = torch.randint(0, 256, (1, 64, 3, 14, 14), dtype=torch.uint8)
    seen = VisualTokens(tokens=noise.flatten(2).float(), grid=(8, 8), index=torch.arange(64)[None], pixels=noise)
    assert get_strategy("vprune")(chi2_threshold=1e6, cosine_threshold=0.8).decide(seen).counts == [64]


def test_a_larger_threshold_removes_more():
    counts = [len(kept(busy(0), (6, 6), combine="chi2", chi2_threshold=t)) for t in (0.0, 5.0, 20.0, 80.0, 1e4)]
    assert counts == sorted(counts, reverse=True)
    assert counts[0] > counts[-1] == 9


def test_images_of_one_call_may_keep_different_numbers():
    images = torch.stack([reference.patches(picture(s, flat)) for s, flat in ((0, 0.0), (1, 1.0))])
    index = torch.arange(36).expand(2, 36)
    seen = VisualTokens(tokens=images.flatten(2).float(), grid=(6, 6), index=index, pixels=images)
    assert get_strategy("vprune")().decide(seen).counts == [36, 9]


def test_the_asymmetric_distance_divides_by_the_earlier_patch():
    image = torch.zeros(3, 16, 16, dtype=torch.uint8)
    image[:, :8, 8:] = torch.arange(64).view(8, 8).to(torch.uint8) * 4  # spread over all bins
    switches = {"combine": "chi2", "chi2_form": "asymmetric", "chi2_threshold": 160.0}  # 147 and 1176
    assert kept(image, (2, 2), **switches) == [0]


@pytest.mark.parametrize("keep", [{"keep_ratio": 0.5}, {"keep_tokens": 10}])
def test_a_budget_is_refused(keep: dict):
    with pytest.raises(ValueError, match=r"vprune: keep_\w+ does not apply, its thresholds decide. Fields: .+chi2"):
        get_strategy("vprune")(**keep)
