"""Downsample: a picture of blocks resizes to its blocks, positions are interpolated, every budget is met."""

from __future__ import annotations

import math

import models
import pytest
import slow
import torch
from families import FAMILIES, Processor
from family_runs import batched, model_of, prompts_of
from torch import Tensor

from vtp_plugin import VisualTokens, get_strategy, prune
from vtp_plugin.errors import PruningError
from vtp_plugin.surgery.whole import interpolated

P = 4


def seen_by(picture: Tensor) -> VisualTokens:
    """Patches of pictures [B, 3, H, W]."""
    tiles = picture.unfold(2, P, P).unfold(3, P, P)
    pixels = tiles.permute(0, 2, 3, 1, 4, 5).flatten(1, 2)
    return slow.visual(pixels.flatten(2).float(), grid=tiles.shape[2:4], pixels=pixels)


def noise(rows: int, cols: int, b: int = 2) -> Tensor:
    return torch.randint(0, 256, (b, 3, rows * P, cols * P), dtype=torch.uint8)


def test_half_the_resolution_is_the_resized_picture():
    from PIL import Image

    picture = noise(6, 6, b=1)
    (patches,) = get_strategy("downsample")(keep_tokens=9).decide(seen_by(picture)).tokens
    small = Image.fromarray(picture[0].permute(1, 2, 0).numpy()).resize((12, 12), Image.Resampling.BICUBIC)
    expected = torch.tensor(list(small.tobytes())).view(12, 12, 3).permute(2, 0, 1)
    for i in range(9):
        u, v = i // 3 * P, i % 3 * P
        assert (patches[i].view(3, P, P) - expected[:, u : u + P, v : v + P]).abs().max() <= 2  # PIL rounds twice


@pytest.mark.parametrize("filter", ["bicubic", "bilinear"])
def test_a_flat_picture_stays_flat(filter: str):
    picture = torch.full((1, 3, 6 * P, 6 * P), 77, dtype=torch.uint8)
    for k in (1, 5, 9, 35):
        (patches,) = get_strategy("downsample")(keep_tokens=k, filter=filter).decide(seen_by(picture)).tokens
        assert patches.shape == (k, 3 * P * P)
        assert (patches == 77).all()


@pytest.mark.parametrize(("rows", "cols"), [(1, 1), (6, 6), (4, 8), (1, 7)])
def test_every_budget_is_met_at_distinct_places(rows: int, cols: int):
    seen = seen_by(noise(rows, cols))
    for k in range(1, rows * cols + 1):
        selection = get_strategy("downsample")(keep_tokens=k).decide(seen)
        assert selection.counts == [k, k]
        if k < rows * cols:
            slow.check_exact(selection, rows * cols, k)
            assert selection.places[0][:, 0].mean() == pytest.approx((rows - 1) / 2, abs=0.51)


def test_the_order_of_the_patches_does_not_matter():
    seen, order = seen_by(noise(4, 4, b=1)), torch.randperm(16)
    moved = VisualTokens(seen.tokens[:, order], seen.grid, seen.index[:, order], pixels=seen.pixels[:, order])
    one, other = (get_strategy("downsample")(keep_tokens=5).decide(v) for v in (seen, moved))
    assert one.tokens[0].equal(other.tokens[0])
    assert order[other.source[0]].equal(one.source[0])


def test_half_a_picture_cannot_be_resized():
    seen = seen_by(noise(4, 4, b=1))
    part = VisualTokens(seen.tokens[:, :9], seen.grid, seen.index[:, :9], pixels=seen.pixels[:, :9])
    with pytest.raises(ValueError, match="downsample: it resizes the whole picture"):
        get_strategy("downsample")(keep_tokens=5).decide(part)


def test_positions_are_interpolated():
    table = torch.randn(12, 5)
    places = torch.tensor([[0.0, 0.0], [2.0, 3.0], [0.5, 1.5], [1.25, 2.75], [-0.4, 3.4]])
    for (u, v), found in zip(places.tolist(), interpolated(table, (3, 4), places), strict=True):
        u, v = min(max(u, 0), 2), min(max(v, 0), 3)
        expected = torch.zeros(5)
        for a in range(3):
            for b in range(4):
                weight = max(0.0, 1 - math.fabs(a - u)) * max(0.0, 1 - math.fabs(b - v))
                expected += weight * table[a * 4 + b]
        assert torch.allclose(found, expected, atol=1e-5)


@torch.no_grad()
def test_the_tower_sees_the_small_picture():
    host, rows = models.tiny("llava_hf", "eager"), models.prompts("single")
    seen: list[Tensor] = []
    handle = host.tower.vision_model if hasattr(host.tower, "vision_model") else host.tower
    with host.prune(get_strategy("downsample")(keep_tokens=9)):
        hook = handle.encoder.layers[0].register_forward_pre_hook(
            lambda m, a, k: seen.append((a[0] if a else k["hidden_states"]).clone()), with_kwargs=True
        )
        host.forward(rows)
        hook.remove()
    picture = next(part for part in rows[0] if isinstance(part, Tensor))
    small = torch.nn.functional.interpolate(picture[None].float(), (24, 24), mode="bicubic", antialias=True)
    values = host.normalise([small[0].round().clamp(0, 255).to(torch.uint8)])
    embeddings = handle.embeddings
    patches = embeddings.patch_embedding(values).flatten(2).transpose(1, 2)
    table = embeddings.position_embedding.weight
    grid = table[1:].T.reshape(1, -1, 6, 6)
    places = torch.nn.functional.interpolate(grid, (3, 3), mode="bilinear").flatten(2).transpose(1, 2)
    cls = (embeddings.class_embedding + table[0])[None, None]
    expected = torch.cat([cls, patches + places], 1)
    norm = getattr(handle, "pre_layrnorm", None) or torch.nn.Identity()
    assert torch.allclose(seen[0], norm(expected), atol=1e-4)


@pytest.mark.parametrize("name", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
def test_patches_of_several_frames_are_refused(name: str):
    family, model = FAMILIES[name], model_of(name, "sdpa")
    with prune(model, "downsample", processor=Processor()), pytest.raises(PruningError, match="patches of this video"):
        model(**batched(family, prompts_of(name, "video")))
