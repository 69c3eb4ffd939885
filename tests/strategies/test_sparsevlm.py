"""SparseVLM: raters, scores, tables and recycling, restated with loops."""

from __future__ import annotations

import math

import pytest
import slow
import torch
from torch import Tensor

from vtp_plugin import VisualTokens, get_strategy


def seen_by(kind: str, n: int, texts: int = 6, dtype: torch.dtype = torch.float32, stage: int = 0) -> VisualTokens:
    signals = {"entry": torch.randn(1, n, 5), "text_entry": torch.randn(1, texts, 5)}
    weights = torch.randn(1, texts, n).softmax(-1)
    return slow.visual(
        slow.tokens(kind, n, b=1, dtype=dtype), **signals, text_attention=weights, cut=(stage, 3), entered=n
    )


def raters(entry: Tensor, text: Tensor) -> list[int]:
    visual, words = entry.double().tolist(), text.double().tolist()
    total = [0.0] * len(words)
    for v in visual:
        logits = [sum(a * b for a, b in zip(v, w, strict=True)) for w in words]
        powers = [math.exp(x - max(logits)) for x in logits]
        total = [t + p / sum(powers) / len(visual) for t, p in zip(total, powers, strict=True)]
    mean = sum(total) / len(total)
    return [t for t, m in enumerate(total) if m > mean + 1e-12] or list(range(len(words)))


def recycle(x: slow.Matrix, pruned: list[int], score: list[float]) -> dict[int, list[float]]:
    """Centre -> mean of its cluster."""
    number = min(len(pruned), int(0.3 * len(pruned)) + 1)
    chosen = sorted(sorted(pruned, key=lambda i: (-score[i], i))[:number])
    wanted, d = number // 10 + 1, len(x[0])
    distance = [[math.dist(x[i], x[j]) / math.sqrt(d) for j in chosen] for i in chosen]
    density = []
    for row in distance:
        near = sorted(row)[:wanted]
        density.append(math.exp(-sum(v * v for v in near) / len(near)))
    separation = []
    for i in range(number):
        denser = [distance[i][j] for j in range(number) if (-density[j], j) < (-density[i], i)]
        separation.append(min(denser) if denser else max(max(row) for row in distance))
    centres = slow.ranked([a * b for a, b in zip(density, separation, strict=True)])[:wanted]
    members: dict[int, list[int]] = {c: [] for c in centres}
    for i in range(number):
        members[i if i in members else min(centres, key=lambda c: (distance[i][c], centres.index(c)))].append(i)
    return {chosen[c]: [sum(x[chosen[i]][t] for i in own) / len(own) for t in range(d)] for c, own in members.items()}


def restated(seen: VisualTokens, k: int) -> tuple[list[int], slow.Matrix]:
    """Kept columns, merged ones in their place, and the tokens."""
    x, n = seen.tokens[0].double().tolist(), seen.tokens.shape[1]
    chosen = raters(seen.entry[0], seen.text_entry[0])
    weights = seen.text_attention[0].double().tolist()
    score = [sum(weights[t][i] for t in chosen) / len(chosen) for i in range(n)]
    kept = slow.best(score, k)
    means = recycle(x, [i for i in range(n) if i not in kept], score)
    columns = sorted([*kept, *means])
    return columns, [means.get(i, x[i]) for i in columns]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("ratio", [64 / 576, 96 / 576, 192 / 576, 0.6])
@pytest.mark.parametrize(("n", "texts"), [(24, 6), (60, 1), (130, 9)])
def test_as_described(n: int, texts: int, ratio: float, dtype: torch.dtype):
    seen = seen_by("random", n, texts, dtype)
    strategy = get_strategy("sparsevlm")(keep_ratio=ratio)
    selection = strategy.decide(seen)
    columns, values = restated(seen, strategy.wanted(seen))
    assert slow.columns(selection) == [columns]
    assert torch.allclose(selection.tokens[0].double(), torch.tensor(values).double(), atol=1e-5)


@pytest.mark.parametrize(
    ("label", "table", "counts"),
    [
        (192, (300, 200, 110), (309, 204, 113)),
        (128, (303, 110, 36), None),
        (96, (238, 48, 26), None),
        (64, (66, 30, 17), None),
    ],
)
def test_the_tables(label: int, table: tuple, counts: tuple | None):
    strategy, n, left = get_strategy("sparsevlm")(keep_ratio=label / 576), 576, []
    assert get_strategy("sparsevlm")(keep_tokens=label).wanted(seen_by("random", 576)) == table[0]
    for stage, wanted in enumerate(table):
        seen = seen_by("random", n, stage=stage)
        seen = VisualTokens(**{**vars(seen), "entered": 576})
        assert strategy.wanted(seen) == wanted
        n = strategy.decide(seen).counts[0]
        left.append(n)
    assert counts is None or tuple(left) == counts
    if label == 192:
        assert (3 * 576 + 4 * left[0] + 9 * left[1] + 16 * left[2]) / 32 == pytest.approx(206.5)


@pytest.mark.parametrize("kind", ["duplicates", "constant"])
@pytest.mark.parametrize("n", [1, 2, 40])
def test_repeated_tokens(kind: str, n: int):
    seen, strategy = seen_by(kind, n), get_strategy("sparsevlm")(keep_ratio=0.1)
    selection = strategy.decide(seen)
    row = slow.columns(selection)[0]
    assert row == sorted(set(row))
    pruned = n - strategy.wanted(seen)
    assert len(row) == n - pruned + (int((int(0.3 * pruned) + 1) / 10) + 1 if pruned else 0)


def test_without_recycling_the_table_is_exact():
    seen = seen_by("random", 576)
    assert get_strategy("sparsevlm")(recycle=False).decide(seen).counts == [300]


def test_layers_scale_with_the_depth():
    assert [get_strategy("sparsevlm")().cut_layers(depth) for depth in (2, 4, 32)] == [(1,), (1, 2, 3), (3, 7, 16)]
    assert get_strategy("sparsevlm")(layers="2 4 6").cut_layers(32) == (2, 4, 6)
    with pytest.raises(ValueError, match="sparsevlm: layers must be three layers"):
        get_strategy("sparsevlm")(layers="2 4")


# -- version 2 --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("heads", [1, 14, 20])
@pytest.mark.parametrize(("n", "texts"), [(24, 6), (60, 1)])
def test_version_2_as_described(n: int, texts: int, heads: int, dtype: torch.dtype):
    seen = seen_by("random", n, texts, dtype)
    attention, bias = torch.randn(1, heads, texts, n).softmax(-1), torch.randn(1, texts, n)
    seen = VisualTokens(**{**vars(seen), "head_attention": attention, "rotary_bias": bias})
    chosen = raters(seen.entry[0], seen.text_entry[0])
    free = attention[0].double() / bias[0].double()
    total = [sum(float(free[h, t, i]) for t in chosen for i in range(n)) for h in range(heads)]
    best = slow.ranked(total)[:14]
    score = [sum(float(free[h, t, i]) for h in best for t in chosen) for i in range(n)]
    strategy = get_strategy("sparsevlm")(version=2, keep_ratio=128 / 576)
    selection = strategy.decide(seen)
    assert strategy.wanted(seen) == round(238 * n / 576)
    assert selection.tokens is None
    assert slow.columns(selection) == [slow.best(score, strategy.wanted(seen))]


@pytest.mark.parametrize(
    ("label", "table", "mean"),
    [(192, (300, 200, 118), 206.8), (128, (238, 108, 60), 144.1), (96, (246, 54, 28), None), (64, (66, 34, 20), 81.8)],
)
def test_the_tables_of_version_2(label: int, table: tuple, mean: float | None):
    strategy = get_strategy("sparsevlm")(version=2, keep_tokens=label)
    for stage, wanted in enumerate(table):
        seen = seen_by("random", 576, stage=stage)
        assert strategy.wanted(VisualTokens(**{**vars(seen), "entered": 576})) == wanted
    average = (3 * 576 + 4 * table[0] + 9 * table[1] + 16 * table[2]) / 32
    assert mean is None or average == pytest.approx(mean, abs=0.06)


def test_versions_differ_in_positions_and_needs():
    first, second = (get_strategy("sparsevlm")(version=version) for version in (1, 2))
    assert (first.default_positions, second.default_positions) == ("compact", "original")
    assert {"head_attention", "rotary_bias"} == set(second.needs) - set(first.needs)
    with pytest.raises(ValueError, match="sparsevlm: version must be one of 1, 2"):
        get_strategy("sparsevlm")(version=3)
