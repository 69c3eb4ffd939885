"""PruMerge and PruMerge+ against their restatement with explicit sums."""

from __future__ import annotations

import math

import pytest
import slow
import torch

from vtp_plugin import VisualTokens, get_strategy


def seen_by(kind: str, n: int, dtype: torch.dtype = torch.float32, peaked: float = 1.0) -> VisualTokens:
    query, own, keys = torch.randn(2, 8) * peaked, torch.randn(2, 8), slow.tokens(kind, n, 8)
    return slow.visual(slow.tokens(kind, n, dtype=dtype), class_query=query, class_key=own, raw_keys=keys)


def softmax(query: list[float], keys: slow.Matrix) -> list[float]:
    logits = [sum(q * k for q, k in zip(query, key, strict=True)) / math.sqrt(len(query)) for key in keys]
    powers = [math.exp(v - max(logits)) for v in logits]
    return [p / sum(powers) for p in powers]


def quantile(values: list[float], q: float) -> float:
    ordered, place = sorted(values), q * (len(values) - 1)
    low = math.floor(place)
    high = min(low + 1, len(values) - 1)
    return ordered[low] + (place - low) * (ordered[high] - ordered[low])


def share(attention: list[float]) -> float:
    q1, q3 = quantile(attention, 0.25), quantile(attention, 0.75)
    return sum(a > q3 + 1.5 * (q3 - q1) for a in attention) / len(attention)


def chosen(attention: list[float], plus: bool, k: int | None) -> list[int]:
    n, order = len(attention), slow.ranked(attention)
    if k is not None and not plus:
        return order[: k - 1]
    if k is not None:
        first = order[: round((k - 1) / 4)]
        rest = [i for i in range(n) if i not in first]
        number = k - 1 - len(first)
        return first + [rest[i * len(rest) // number] for i in range(number)]
    found = share(attention)
    if found == 0:
        return []
    first = order[: int(found * n + 1e-9)]
    if not plus:
        return first
    step = max(1, int(int(1 / found) / 3))
    return first + [i for i in range(0, n - 1, step) if i not in first]


def restated(
    seen: VisualTokens, b: int, plus: bool, k: int | None, neighbours: int
) -> tuple[list[list[float]], list[int]]:
    keys, x = seen.raw_keys[b].double().tolist(), seen.tokens[b].double().tolist()
    everyone = [seen.class_key[b].double().tolist(), *keys]  # the class token looks at itself, too
    attention = softmax(seen.class_query[b].double().tolist(), everyone)[1:]
    n, d = len(x), len(x[0])
    kept, rows = chosen(attention, plus, k), []
    for i in kept:
        near = sorted((j for j in range(n) if j != i), key=lambda j: (-slow.cosine(keys[i], keys[j]), j))[:neighbours]
        rows.append([x[i][c] + sum(attention[j] * x[j][c] for j in near) for c in range(d)])
    rows.append([sum(attention[j] * x[j][c] for j in range(n) if j not in kept) for c in range(d)])
    return rows, [*kept, -1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("neighbours", [0, 3, 32])
@pytest.mark.parametrize("k", [None, 1, 2, 9, 29])
@pytest.mark.parametrize("name", ["prumerge", "prumerge_plus"])
def test_as_described(name: str, k: int | None, neighbours: int, dtype: torch.dtype):
    seen = seen_by("random", 30, dtype, peaked=3.0)
    selection = get_strategy(name)(keep_tokens=k, neighbours=neighbours).decide(seen)
    for b in range(2):
        rows, sources = restated(seen, b, name == "prumerge_plus", k, neighbours)
        assert selection.sources[b].tolist() == sources
        assert torch.allclose(selection.tokens[b].double(), torch.tensor(rows).double(), atol=1e-4)


@pytest.mark.parametrize("kind", slow.INPUTS)
@pytest.mark.parametrize(("n", "k"), [(1, 1), (2, 1), (40, 1), (40, 12), (40, 39), (576, 144)])
@pytest.mark.parametrize("name", ["prumerge", "prumerge_plus"])
def test_a_budget_is_met_without_repetition(name: str, n: int, k: int, kind: str):
    selection = get_strategy(name)(keep_tokens=k).decide(seen_by(kind, n))
    assert selection.counts == [k, k]
    assert all(len(set(row)) == k for row in slow.columns(selection))


@pytest.mark.parametrize("n", [1, 7])
@pytest.mark.parametrize("name", ["prumerge", "prumerge_plus"])
def test_without_outliers_one_merged_token_is_left(name: str, n: int):
    seen = seen_by("constant", n)
    selection = get_strategy(name)().decide(seen)
    assert slow.columns(selection) == [[-1], [-1]]
    everyone = [seen.class_key[0].double().tolist(), *seen.raw_keys[0].double().tolist()]
    itself = softmax(seen.class_query[0].double().tolist(), everyone)[0]
    assert 0.01 < itself < 0.99
    assert torch.allclose(selection.tokens[0], (1 - itself) * seen.tokens[0].mean(0, keepdim=True), atol=1e-5)


def test_the_number_follows_from_every_image_alone():
    seen = seen_by("random", 200, peaked=4.0)
    seen.class_query[1] *= 0.05
    both = get_strategy("prumerge")().decide(seen)
    assert len(set(both.counts)) == 2
    own = {name: getattr(seen, name)[1:] for name in ("class_query", "class_key", "raw_keys")}
    alone = VisualTokens(seen.tokens[1:], seen.grid, seen.index[1:], **own)
    assert slow.columns(get_strategy("prumerge")().decide(alone))[0] == slow.columns(both)[1]


def test_raster_order_is_a_switch():
    seen = seen_by("random", 30)
    by_score, by_place = (get_strategy("prumerge")(keep_tokens=9, order=o).decide(seen) for o in ("score", "raster"))
    for one, other in zip(slow.columns(by_score), slow.columns(by_place), strict=True):
        assert other == [*sorted(one[:-1]), -1]


def test_a_budget_is_optional():
    assert not get_strategy("prumerge")().budgeted
    assert get_strategy("prumerge")(keep_ratio=0.5).budgeted
    assert "keep_ratio" in get_strategy("prumerge").fields()


def test_a_tower_without_a_class_token_is_refused():
    seen = slow.visual(torch.randn(1, 9, 4), raw_keys=torch.randn(1, 9, 4))
    with pytest.raises(ValueError, match="prumerge: needs a vision tower with a class token"):
        get_strategy("prumerge")().decide(seen)


def test_the_merged_token_is_one_of_as_many_as_came():
    """Two outliers of ten, the last patch one of them: step 1 chooses all ten, and the merged token makes eleven."""
    attention = torch.tensor([2.0, 0, 0, 0, 0, 0, 0, 0, 0, 2.0])
    keys = attention[None, :, None] * torch.ones(1, 10, 8)
    query, own = torch.ones(1, 8), torch.zeros(1, 8)
    seen = slow.visual(torch.randn(1, 10, 4), class_query=query, class_key=own, raw_keys=keys)
    selection = get_strategy("prumerge_plus")().decide(seen)
    assert selection.counts == [10]
    assert selection.sources[0].tolist() == [0, 9, *range(1, 8), -1]
    assert len(selection.tokens[0]) == 10
    assert not selection.keep[0, 8]
