"""VisPruner against its list-by-list restatement."""

from __future__ import annotations

import pytest
import slow
import torch
from torch import Tensor

from vtp_plugin import get_strategy


def restated(x: Tensor, attention: list[float], k: int, rho: float) -> list[int]:
    similarity, order = slow.cosines(x), slow.ranked(attention)
    number = int(k * rho)
    important, rest = order[:number], order[number:]
    while len(rest) > k - number:
        a = [rest[i] for i in range(0, len(rest), 2)]
        b = [rest[i] for i in range(1, len(rest), 2)]
        leaving = min(8, len(rest) - (k - number), len(a))
        closest = [max([similarity[i][j] for j in b], default=0.0) for i in a]
        falling = slow.ranked(closest)
        rest = [a[i] for i in falling[leaving:]] + b
    return sorted(important + rest)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("rho", [0.0, 0.5, 0.75, 1.0])
@pytest.mark.parametrize(("n", "k"), [(1, 1), (2, 1), (30, 7), (30, 29), (31, 8), (47, 20)])
def test_as_described(n: int, k: int, rho: float, dtype: torch.dtype):
    seen = slow.visual(slow.tokens("random", n, dtype=dtype), cls_attention=slow.attention(2, n))
    kept = slow.columns(get_strategy("vispruner")(keep_tokens=k, important=rho).decide(seen))
    rows = zip(seen.tokens, seen.cls_attention, strict=True)
    assert kept == [restated(x, a.tolist(), k, rho) for x, a in rows]


@pytest.mark.parametrize("kind", slow.INPUTS)
@pytest.mark.parametrize("rho", [0.5, 0.9])
@pytest.mark.parametrize(("n", "k"), [(64, 8), (65, 32), (64, 63), (33, 1)])  # the released code raises for some
def test_exactly_k_for_every_k(kind: str, n: int, k: int, rho: float):
    seen = slow.visual(slow.tokens(kind, n), cls_attention=slow.attention(2, n))
    slow.check_exact(get_strategy("vispruner")(keep_tokens=k, important=rho).decide(seen), n, k)


def test_attention_alone_is_fastervlm():
    seen = slow.visual(torch.randn(2, 40, 5), cls_attention=slow.attention(2, 40))
    one = get_strategy("vispruner")(keep_tokens=9, important=1.0).decide(seen)
    assert one.keep.equal(get_strategy("fastervlm")(keep_tokens=9).decide(seen).keep)
