"""Methods that rank, and the controls, against restated scores on inputs that invite mistakes, in fp32 and fp16.

Tokens that repeat, are all equal, zero, or too large for squares in fp16; one token; one of N; all of N. Methods that
select greedily or merge have such inputs in files of their own.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
import reference
import slow
import torch
from torch import Tensor

from vtp_plugin import VisualTokens, get_strategy, list_strategies
from vtp_plugin.conformance import sample

OWN_FILE = {  # restated elsewhere
    "cdpruner",
    "coreprune",
    "dart",
    "divprune",
    "downsample",
    "evs",
    "flashvid",
    "hiprune",
    "holov",
    "mmtok",
    "nuwa",
    "pixelprune",
    "pooling",
    "prumerge",
    "prumerge_plus",
    "prunesid",
    "unpad",
    "vidcom2",
    "vscan",
    "hired",
    "scope",
    "sparsevlm",
    "tome",
    "vispruner",
    "vprune",
    "vtp",
}
KINDS = ("random", "repeated", "equal", "zero", "large")


def _of(name: str) -> Callable[[VisualTokens, int], list[float]]:
    return lambda seen, b: getattr(seen, name)[b].double().tolist()


def _product(seen: VisualTokens, b: int) -> list[float]:
    return (seen.self_attention[b] * seen.cross_attention[b]).tolist()


SCORES: dict[str, Callable[[VisualTokens, int], list[float]]] = {
    "l2": lambda seen, b: reference.l2_scores(seen.tokens[b].float()),
    "atp": lambda seen, b: reference.atp_scores(seen.cls_attention[b], seen.aligned[b], seen.text[b], 0.5),
    "fastv": _of("last_query_attention"),
    "fastervlm": _of("cls_attention"),
    "pyramiddrop": _of("next_query_attention"),
    "fitprune": _product,
}


def test_every_strategy_is_restated_somewhere():
    assert {*SCORES, *OWN_FILE, "stride", "random", "visionzip"} == set(list_strategies())


def seen_by(strategy, n: int, kind: str, dtype: torch.dtype) -> VisualTokens:
    seen = sample(strategy, n, kind=kind)
    return dataclasses.replace(seen, tokens=seen.tokens.to(dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("n", "k"), [(1, 1), (2, 1), (36, 1), (36, 9), (36, 35), (36, 36)])
@pytest.mark.parametrize("name", SCORES)
def test_the_best_scores_stay(name: str, n: int, k: int, kind: str, dtype: torch.dtype):
    strategy = get_strategy(name)(**({"keep_ratio": (1 + k / n) / 2} if name == "fitprune" else {"keep_tokens": k}))
    seen = seen_by(strategy, n, kind, dtype)
    selection = strategy.decide(seen)
    for b, kept in enumerate(slow.columns(selection)):
        scores = SCORES[name](seen, b)
        assert kept == sorted(set(kept))
        assert len(kept) == k
        check_best(scores, kept, k)
    assert selection.keeps_all is (k == n)


def check_best(scores: list[float], kept: list[int], k: int) -> None:
    """The k best; among scores that differ by rounding only, any."""
    limit = sorted(scores, reverse=True)[k - 1]
    close = 1e-5 * max(1e-6, max(map(abs, scores)))
    assert all(scores[i] >= limit - close for i in kept)
    if all(abs(a - b) > close for i, a in enumerate(scores) for b in scores[:i]):
        assert kept == slow.best(scores, k)
    if len(set(scores)) == 1:  # ties go to the lower index
        assert kept == list(range(k))


@pytest.mark.parametrize("n", [1, 2, 7, 36])
@pytest.mark.parametrize("kind", KINDS)
def test_the_controls_do_not_look(kind: str, n: int):
    for k in sorted({1, n // 2 or 1, n}):
        stride, random = get_strategy("stride")(keep_tokens=k), get_strategy("random")(keep_tokens=k)
        assert (
            slow.columns(stride.decide(seen_by(stride, n, kind, torch.float16))) == [[i * n // k for i in range(k)]] * 2
        )
        drawn = random.decide(seen_by(random, n, kind, torch.float16))
        slow.check_exact(drawn, n, k)
        assert slow.columns(drawn) == slow.columns(random.decide(seen_by(random, n, "random", torch.float32)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("n", "dominant", "contextual"), [(3, 1, 1), (9, 3, 2), (36, 8, 4), (36, 12, 0)])
def test_visionzip_merges_as_described(n: int, dominant: int, contextual: int, kind: str, dtype: torch.dtype):
    strategy = get_strategy("visionzip")(dominant=dominant, contextual=contextual)
    seen = seen_by(strategy, n, kind, dtype)
    selection = strategy.decide(seen)
    for b in range(2):
        signals = (seen.tokens[b], seen.cls[b], seen.cls_attention[b], seen.keys[b])
        rows, sources = reference.visionzip(*signals, dominant, contextual)
        assert selection.sources[b].tolist() == sources
        if kind == "random":  # equal keys differ in their last bit: the same tokens may join another target
            close(selection.tokens[b], rows)
        close(selection.tokens[b][:dominant], rows[:dominant])


def close(ours: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(ours.double(), theirs.double(), atol=1e-4, rtol=1e-4)
