"""HiRED's division of a budget among the views of one picture, restated with loops, and what families tell of them."""

from __future__ import annotations

from typing import Any

import pytest
import slow
import torch
from families import FAMILIES
from family_runs import anyres_inputs, batched, model_of
from torch import Tensor, nn

import vtp_plugin as vtp
from vtp_plugin import get_strategy

Places = list[tuple[float, float]]


def regions_of(places: Places, rows: int, columns: int, how: str) -> list[int]:
    if how == "strips":
        return [number * rows * columns // len(places) for number in range(len(places))]
    return [int(down * rows) * columns + int(across * columns) for down, across in places]


def restated(
    view: list[int],
    places: Places,
    first: list[float],
    last: list[float],
    shape: tuple[int, int],
    budget: int,
    alpha: float = 0.5,
    shares: str = "marks",
    regions: str = "spatial",
) -> list[int]:
    """Kept tokens: a part for the whole picture, parts for regions, and the rest to the best of all that are left."""
    whole, (rows, columns) = [i for i, v in enumerate(view) if v == 0], shape
    number = regions_of([places[i] for i in whole], rows, columns, regions)
    early = [first[i] for i in whole]
    marked = slow.best(early, int(len(whole) * (1 - alpha) + 1e-9))
    weights = [0.0] * (rows * columns)
    for i, region in enumerate(number):
        weights[region] += early[i] if shares == "attention" else float(i in marked)
    base = min(int(alpha * budget), len(whole))
    parts = [base]
    for weight in weights:
        parts.append(int(weight * (budget - base) / sum(weights) + 1e-9) if sum(weights) else 0)
    kept: set[int] = set()
    for tile, part in enumerate(parts):
        mine = [i for i, v in enumerate(view) if v == tile]
        kept |= {mine[i] for i in slow.best([last[i] for i in mine], part)}
    rest = [i for i in range(len(view)) if i not in kept]
    kept |= {rest[i] for i in slow.best([last[i] for i in rest], budget - len(kept))}
    return sorted(kept)


def raster(rows: int, columns: int) -> Places:
    return [((i + 0.5) / rows, (j + 0.5) / columns) for i in range(rows) for j in range(columns)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("regions", ["spatial", "strips"])
@pytest.mark.parametrize("shares", ["marks", "attention"])
@pytest.mark.parametrize("shape", [(2, 2), (1, 2), (3, 2)])
@pytest.mark.parametrize(("alpha", "budget"), [(0.5, 30), (0.5, 1), (0.25, 60), (0.0, 20), (1.0, 50)])
def test_as_described(shape: tuple[int, int], alpha: float, budget: int, shares: str, regions: str, dtype: torch.dtype):
    tiles, places = 1 + shape[0] * shape[1], raster(6, 6)
    left = [(tile, place) for tile in range(tiles) for place in range(36) if tile == 0 or place % 4 != tile % 3]
    view, where = [tile for tile, _ in left], [places[place] for _, place in left]
    n = len(view)
    signals = {"cls_attention": slow.attention(2, n), "first_attention": slow.attention(2, n)}
    signals |= {"view": torch.tensor([view] * 2), "place": torch.tensor([where] * 2), "views": shape}
    seen = slow.visual(slow.tokens("random", n, dtype=dtype), **signals)
    strategy = get_strategy("hired")(keep_tokens=budget, alpha=alpha, shares=shares, regions=regions)
    selection = strategy.decide(seen)
    slow.check_exact(selection, n, budget)
    for b, columns in enumerate(slow.columns(selection)):
        rows = seen.first_attention[b].tolist(), seen.cls_attention[b].tolist()
        assert columns == restated(view, where, *rows, shape, budget, alpha, shares, regions)


def test_a_quadrant_that_nothing_marks_gets_no_part_of_its_own():
    places = raster(4, 4)
    view, where = [tile for tile in range(5) for _ in range(16)], places * 5
    first = torch.tensor([[1.0 if down < 0.5 and across > 0.5 else 0.0 for down, across in where]])
    signals = {"cls_attention": slow.attention(1, 80), "first_attention": first, "views": (2, 2)}
    seen = slow.visual(torch.randn(1, 80, 3), view=torch.tensor([view]), place=torch.tensor([where]), **signals)
    (kept,) = slow.columns(get_strategy("hired")(keep_tokens=16, alpha=0.75).decide(seen))
    assert [sum(view[i] == tile for i in kept) for tile in range(5)] == [12, 0, 4, 0, 0]
    (strips,) = slow.columns(get_strategy("hired")(keep_tokens=16, alpha=0.75, regions="strips").decide(seen))
    assert [sum(view[i] == tile for i in strips) for tile in range(5)] == [12, 2, 2, 0, 0]


# -- in models --------------------------------------------------------------------------------------------------------


def attentions(tower: nn.Module, tiles: Tensor, block: int) -> list[float]:
    """What the patches of all tiles receive in a block: from the class token, or, without one, from all of them."""
    maps = tower(tiles, output_attentions=True).attentions[block].mean(1)  # [T, L, L]
    side = tower.config.image_size // tower.config.patch_size
    return (maps[:, 0, 1:] if maps.shape[-1] > side * side else maps.mean(1)).flatten().tolist()


def rows_of(model: nn.Module, tiles: int, size: Tensor, side: int, **kwargs: Any) -> list[int]:
    """The patch (counted over the tiles) that every row of an image is; newlines left out."""
    numbers = torch.arange(tiles * side * side).view(tiles, -1, 1).float()
    packed = model.model.pack_image_features([numbers], size[None], image_newline=torch.tensor([-1.0]), **kwargs)
    return [int(number) for number in packed[0][0].flatten().tolist() if number >= 0]


@pytest.mark.parametrize(("name", "choice"), [("llava_next", "default"), ("llava_onevision", "")])
@pytest.mark.parametrize("regions", ["spatial", "strips"])
@torch.no_grad()
def test_families_of_several_views(name: str, choice: str, regions: str):
    from transformers.models.llava_next.modeling_llava_next import get_anyres_image_grid_shape

    family, model, eager = FAMILIES[name], model_of(name, "sdpa"), model_of(name, "eager")
    tower = eager.model.vision_tower
    side, patches = tower.config.image_size, tower.config.image_size // tower.config.patch_size
    prompt = family.sample(0, 1)
    inputs, shown = batched(family, (prompt,)), []
    strategy = get_strategy("hired")(keep_ratio=0.3, regions=regions)
    object.__setattr__(strategy, "score", lambda seen: shown.append(seen) or type(strategy).score(strategy, seen))
    with vtp.prune(model, strategy) as pruned:
        model(**inputs)
        block = pruned.adapter.tower.projected
    size = inputs["image_sizes"][0]
    shape = get_anyres_image_grid_shape(size, model.config.image_grid_pinpoints, side)
    tiles = 1 + shape[0] * shape[1]
    (values,) = inputs["pixel_values"]
    how = {"vision_feature_select_strategy": choice} if choice else {"vision_aspect_ratio": "anyres_max_9"}
    patch = rows_of(model, tiles, size, patches, **how)
    first, last = (attentions(tower, values[:tiles], number) for number in (0, block))
    view, places = [p // patches**2 for p in patch], raster(patches, patches)
    where = [places[p % patches**2] for p in patch]
    assert shown[0].views == shape
    assert shown[0].view[0].tolist() == view
    torch.testing.assert_close(shown[0].place[0], torch.tensor(where))
    torch.testing.assert_close(shown[0].first_attention[0], torch.tensor([first[p] for p in patch]))
    budget = int(0.3 * len(patch) + 1e-9)
    rows = [first[p] for p in patch], [last[p] for p in patch]
    chosen = restated(view, where, *rows, shape, budget, regions=regions)
    judged = shown[0].index[0].tolist()
    assert pruned.events[0].kept[0].tolist() == [judged[i] for i in chosen]
    assert pruned.events[0].after == [budget]


@torch.no_grad()
def test_the_authors_package_tells_its_views(anyres: nn.Module):
    inputs, shown = anyres_inputs(slice(None)), []
    strategy = get_strategy("hired")(keep_ratio=0.3)
    object.__setattr__(strategy, "score", lambda seen: shown.append(seen) or type(strategy).score(strategy, seen))
    with vtp.prune(anyres, strategy):
        anyres.generate(**inputs, max_new_tokens=1)
    assert [seen.views for seen in shown] == [(2, 2), (2, 1), (2, 1)]
    for seen in list(shown):  # deciding again shows them again
        signals = (seen.first_attention[0].tolist(), seen.cls_attention[0].tolist())
        budget = strategy.wanted(seen)
        chosen = restated(seen.view[0].tolist(), seen.place[0].tolist(), *signals, seen.views, budget)
        assert slow.columns(strategy.decide(seen)) == [chosen]
        assert sorted(set(seen.view[0].tolist())) == list(range(1 + seen.views[0] * seen.views[1]))


def test_one_view_and_shared_budgets_are_a_plain_ranking():
    family, model = FAMILIES["llava_next"], model_of("llava_next", "sdpa")
    inputs = batched(family, (family.sample(0, 2),))
    for budget in ("per_tile", "total"):
        kept = {}
        for name in ("hired", "fastervlm"):
            with vtp.prune(model, name, keep_tokens=9, budget=budget) as pruned, torch.no_grad():
                model(**inputs)
            kept[name] = [k.tolist() for k in pruned.events[0].kept]
        assert kept["hired"] == kept["fastervlm"]


@pytest.mark.parametrize(
    ("field", "value", "rule"),
    [
        ("alpha", 1.5, r"a number in \[0, 1\]"),
        ("shares", "votes", "one of marks, attention"),
        ("regions", "x", "one of"),
    ],
)
def test_bad_values_are_refused(field: str, value: Any, rule: str):
    with pytest.raises(ValueError, match=f"hired: {field} must be {rule}"):
        get_strategy("hired")(**{field: value})
