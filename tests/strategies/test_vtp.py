"""The package's own strategy: coverage, then proportion, as restated with lists and loops."""

from __future__ import annotations

import math

import pytest
import slow
import torch

from vtp_plugin import VisualTokens, get_strategy
from vtp_plugin.errors import PruningError

SIGNALS = {"projector": ("projected", "cls_attention"), "llm": ("normed", "last_query_attention")}


def seen_by(kind: str, n: int, at: str = "projector", dtype: torch.dtype = torch.float32) -> VisualTokens:
    features, importance = SIGNALS[at]
    x = slow.tokens(kind, n, d=24, dtype=dtype)
    return slow.visual(torch.zeros(2, n, 3), **{features: x, importance: slow.attention(2, n)})


def restated(x: torch.Tensor, u: list[float], k: int, herded: int) -> list[int]:
    """x [N, D] in double precision; u to the power of focus; the last `herded` picks bring the proportions back."""
    rows, n = x.tolist(), len(x)
    scale = max(0.25, n / (18 * k))
    apart = [[sum((a - b) ** 2 for a, b in zip(p, q, strict=True)) for q in rows] for p in rows]
    middle = sorted(value for line in apart for value in line)[(n * n - 1) // 2] or 1e-30
    alike = [[round(math.exp(-value / (scale * middle)) * 4096) / 4096 for value in line] for line in apart]

    def covered(picks: list[int]) -> float:
        return sum(max((alike[i][s] for s in picks), default=0.0) for i in range(n))

    picks: list[int] = []
    while len(picks) < k:
        left = [j for j in range(n) if j not in picks]
        if len(picks) < max(1, k - herded):
            before = covered(picks)
            picks.append(slow.argmax(left, lambda j: u[j] * (covered([*picks, j]) - before)))  # noqa: B023
        else:
            size = len(picks) + 1
            picks.append(slow.argmax(left, lambda j: size * sum(alike[j]) / n - sum(alike[j][s] for s in picks)))  # noqa: B023
    return sorted(picks)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("at", ["projector", "llm"])
@pytest.mark.parametrize(("proportion", "focus"), [(None, 0.0), (0.0, 1.0), (0.5, 0.5), (1.0, 2.0)])
@pytest.mark.parametrize(("n", "k"), [(2, 1), (20, 3), (20, 6), (20, 15)])
def test_as_described(n: int, k: int, proportion: float | None, focus: float, at: str, dtype: torch.dtype):
    seen = seen_by("random", n, at, dtype)
    kept = get_strategy("vtp")(keep_tokens=k, at=at, proportion=proportion, focus=focus).decide(seen)
    features, importance = (getattr(seen, name) for name in SIGNALS[at])
    for b in range(2):
        u = [(v + 0.1) ** focus for v in slow.minmax(importance[b].double().tolist())]
        share = k * (k / n if proportion is None else proportion)
        herded = round(share) if share >= 1 else 0
        assert slow.columns(kept)[b] == restated(features[b].double(), u, k, herded)


@pytest.mark.parametrize("kind", ["duplicates", "constant"])
@pytest.mark.parametrize("focus", [0.0, 1.0])
@pytest.mark.parametrize("k", [1, 6, 39])
def test_exactly_k(kind: str, focus: float, k: int):
    slow.check_exact(get_strategy("vtp")(keep_tokens=k, focus=focus).decide(seen_by(kind, 40)), 40, k)


def test_what_is_rare_stays_and_what_is_frequent_stays_frequent():
    """36 alike, 3 of another kind, 1 of a third; a tenth of noise."""
    kinds = torch.tensor([0] * 36 + [1] * 3 + [2])
    x = torch.randn(3, 24)[kinds] + 0.1 * torch.randn(40, 24)
    seen = slow.visual(torch.zeros(1, 40, 3), projected=x[None])
    (kept,) = get_strategy("vtp")(keep_tokens=20).decide(seen).sources
    assert torch.bincount(kinds[kept], minlength=3)[1:].tolist() in ([1, 1], [2, 1])
    (spread,) = get_strategy("vtp")(keep_tokens=8, proportion=0.0).decide(seen).sources
    assert set(kinds[spread].tolist()) == {0, 1, 2}


def test_a_share_below_one_token_restores_nothing():
    """4 of 20: 4 x 4 / 20 is 0.8 of a token; 5 of 20 is more than one."""
    make, seen = get_strategy("vtp"), seen_by("random", 20)
    assert [make().covering(k, 20) for k in (1, 3, 4, 5, 10, 20)] == [1, 3, 4, 4, 5, 1]
    covering = make(keep_tokens=4, proportion=0.0).decide(seen)
    assert slow.columns(make(keep_tokens=4).decide(seen)) == slow.columns(covering)


def test_the_fewer_stay_the_wider_they_reach():
    """A quarter of a median while two ninths of the tokens stay, 144 / (18 K) below; what is said is what counts."""
    make, seen = get_strategy("vtp"), seen_by("random", 40)
    found = [make().width(k, 144) for k in (144, 36, 32, 16, 10, 1)]
    assert found == pytest.approx([0.25, 0.25, 0.25, 0.5, 0.8, 8])
    assert make(scale=0.3).width(1, 144) == 0.3
    kept = slow.columns(make(keep_tokens=2).decide(seen))
    assert kept == [restated(x.double(), [1.0] * 40, 2, 0) for x in seen.projected]
    assert kept != slow.columns(make(keep_tokens=2, scale=0.05).decide(seen))


def test_importance_is_read_only_where_it_counts():
    make = get_strategy("vtp")
    assert tuple(make().needs) == ("projected",)
    assert tuple(make(focus=0.5).needs) == ("projected", "cls_attention")
    assert tuple(make(at="llm", focus=0.5).needs) == ("normed", "last_query_attention")


def test_a_share_above_one_is_refused():
    with pytest.raises(PruningError, match=r"vtp: proportion must be a number in \[0, 1\], got 2"):
        get_strategy("vtp")(proportion=2)


@pytest.mark.parametrize("scale", [0, -1, "wide", 1e9])
def test_a_scale_that_means_nothing_is_refused(scale: object):
    with pytest.raises(PruningError, match="vtp: scale must be a number"):
        get_strategy("vtp")(scale=scale)
