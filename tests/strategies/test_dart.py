"""DART against its pivot-by-pivot restatement."""

from __future__ import annotations

import pytest
import slow
import torch
from torch import Tensor

from vtp_plugin import VisualTokens, get_strategy


def restated(
    norms: Tensor, x: Tensor, text_norms: Tensor, text: Tensor, k: int, p: int, t: int, extra: bool
) -> list[int]:
    own = slow.ranked(norms.double().tolist())[:p]
    words = slow.ranked(text_norms.double().tolist())[:t]
    tokens, said = x.double().tolist(), text.double().tolist()
    pivots = [tokens[i] for i in own] + [said[i] for i in words]
    kept = list(own) if extra else own[:k]
    for place, pivot in enumerate(pivots):
        if extra:
            quota = k // len(pivots)
        else:
            quota = max(0, k - len(own)) // len(pivots) + (place < max(0, k - len(own)) % len(pivots))
        left = [i for i in range(len(tokens)) if i not in kept]
        kept += sorted(left, key=lambda i: (slow.cosine(pivot, tokens[i]), i))[:quota]
    return sorted(kept)


def seen_by(kind: str, n: int, texts: int = 7, dtype: torch.dtype = torch.float32) -> VisualTokens:
    signals = {"key_norms": torch.rand(2, n), "text_key_norms": torch.rand(2, texts)}
    signals |= {"normed": slow.tokens(kind, n, dtype=dtype), "text_normed": slow.tokens("random", texts, dtype=dtype)}
    return slow.visual(torch.zeros(2, n, 2), **signals, projected=slow.tokens(kind, n, dtype=dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("extra", [False, True])
@pytest.mark.parametrize(("p", "t"), [(4, 4), (1, 0), (2, 9)])
@pytest.mark.parametrize(("n", "k"), [(1, 1), (2, 1), (40, 3), (40, 17), (40, 32)])
def test_as_described(n: int, k: int, p: int, t: int, extra: bool, dtype: torch.dtype):
    seen = seen_by("random", n, dtype=dtype)
    strategy = get_strategy("dart")(keep_tokens=k, image_pivots=p, text_pivots=t, pivots_extra=extra)
    kept = slow.columns(strategy.decide(seen))
    rows = zip(seen.key_norms, seen.normed, seen.text_key_norms, seen.text_normed, strict=True)
    assert kept == [list(range(n)) if k == n else restated(*row, k, p, t, extra) for row in rows]


@pytest.mark.parametrize(("budget", "kept"), [(192, 196), (128, 132), (64, 68)])
def test_the_code_keeps_four_more(budget: int, kept: int):
    seen = seen_by("random", 576)
    assert get_strategy("dart")(keep_tokens=budget).decide(seen).counts == [budget] * 2
    assert get_strategy("dart")(keep_tokens=budget, pivots_extra=True).decide(seen).counts == [kept] * 2


@pytest.mark.parametrize("kind", ["duplicates", "constant"])
@pytest.mark.parametrize("at", ["llm", "projector"])
@pytest.mark.parametrize("k", [1, 4, 5, 39])
def test_exactly_k(kind: str, at: str, k: int):
    slow.check_exact(get_strategy("dart")(keep_tokens=k, at=at).decide(seen_by(kind, 40)), 40, k)


def test_before_the_language_model_the_projected_tokens_are_judged():
    seen = seen_by("random", 40)
    none, nothing = torch.zeros(0), torch.zeros(0, 6)
    kept = slow.columns(get_strategy("dart")(keep_tokens=15, at="projector").decide(seen))
    assert kept == [restated(z.abs().sum(-1), z, none, nothing, 15, 4, 4, False) for z in seen.projected]


def test_the_place_decides_what_is_needed():
    assert get_strategy("dart")().decoder_layer == 2
    assert get_strategy("dart")(at="projector").decoder_layer is None
    assert tuple(get_strategy("dart")(at="projector").needs) == ("projected",)
