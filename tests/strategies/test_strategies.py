"""Every strategy against a slow restatement of its mathematics, and the properties that all of them share."""

from __future__ import annotations

import math
from collections import Counter

import pytest
import reference
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from vtp_plugin import VisualTokens, get_strategy, list_strategies
from vtp_plugin.tokens import top_k

SCORED = {"l2": "tokens", "atp": "cls_attention", "fastv": "last_query_attention"}
ROUNDED = {"l2": math.floor, "stride": math.floor, "random": math.floor, "atp": round, "fastv": round}
ALL = [*ROUNDED, "visionzip"]


def visual(tokens: Tensor, grid: tuple[int, int] | None = None, **signals: object) -> VisualTokens:
    b, n, _ = tokens.shape
    index = torch.arange(n).expand(b, n)
    return VisualTokens(tokens=tokens, grid=grid or (1, n), index=index, **signals)


def scored(name: str, scores: Tensor) -> VisualTokens:
    """Tokens [B, N, 1] whose score is `scores` >= 0 [B, N] in the eyes of l2, fastv, and atp with alpha 0."""
    return visual(scores[..., None], **({} if name == "l2" else {SCORED[name]: scores.float()}))


def make(name: str, **hyper: object):
    return get_strategy(name)(**({"alpha": 0.0} if name == "atp" and "alpha" not in hyper else {}), **hyper)


def any_visual(n: int, b: int = 2, dtype: torch.dtype = torch.float32) -> VisualTokens:
    """Tokens with every signal."""
    draw = {"tokens": (b, n, 6), "keys": (b, n, 4), "aligned": (b, n, 5), "text": (b, 5), "cls": (b, 6)}
    signals = {name: torch.randn(shape) for name, shape in draw.items()}
    signals = {k: v.to(dtype) if k in ("tokens", "cls") else v for k, v in signals.items()}
    rows = {name: torch.rand(b, n).softmax(-1) for name in ("cls_attention", "last_query_attention")}
    return visual(**signals, **rows, fingerprint=tuple(range(b)))


def columns(selection) -> list[list[int]]:
    return [row.tolist() for row in selection.sources]


# -- all of them ------------------------------------------------------------------------------------------------------


def test_the_catalogue_is_what_the_tests_cover():
    assert set(ALL) | {"vprune"} <= set(list_strategies())


@settings(max_examples=60, deadline=None)
@given(n=st.integers(1, 200), ratio=st.floats(0.001, 1), name=st.sampled_from(ALL))
def test_the_budget_holds_for_any_number_of_tokens_and_any_ratio(n: int, ratio: float, name: str):
    selection = make(name, keep_ratio=ratio).decide(any_visual(n, b=1))
    exact, (kept,) = ratio * n, selection.counts
    if name in ROUNDED and ROUNDED[name] is round:
        assert kept == 1 if exact < 0.5 else abs(kept - exact) <= 0.5 + 1e-6
    else:
        assert kept == max(1, math.floor(exact + 1e-6))


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("n", [1, 2, 7, 36, 100])
def test_one_token_all_tokens_and_more_than_all(name: str, n: int):
    seen = any_visual(n)
    assert make(name, keep_tokens=1).decide(seen).counts == [1, 1]
    for everything in (make(name, keep_tokens=n), make(name, keep_tokens=n + 5), make(name, keep_ratio=1.0)):
        selection = everything.decide(seen)
        assert selection.keeps_all
        assert columns(selection) == [list(range(n))] * 2
        assert all(kept.equal(row) for kept, row in zip(selection.apply(seen.tokens), seen.tokens, strict=True))


@pytest.mark.parametrize("name", ROUNDED)
def test_kept_tokens_are_ascending_and_untouched(name: str):
    seen = any_visual(37, dtype=torch.float16)
    selection = make(name, keep_ratio=0.4).decide(seen)
    for row, kept, rows in zip(columns(selection), selection.apply(seen.tokens), seen.tokens, strict=True):
        assert row == sorted(set(row))
        assert kept.equal(rows[row])


@pytest.mark.parametrize("name", ALL)
def test_the_images_of_a_batch_do_not_influence_each_other(name: str):
    seen = any_visual(23, b=3)
    strategy = make(name, keep_ratio=0.5, **({"alpha": 0.5} if name == "atp" else {}))
    together = strategy.decide(seen)
    fields = [f for f in vars(seen) if isinstance(getattr(seen, f), Tensor)]
    for b in range(3):
        alone = {f: getattr(seen, f)[b : b + 1] for f in fields}
        alone = strategy.decide(VisualTokens(**alone, grid=seen.grid, fingerprint=seen.fingerprint[b : b + 1]))
        assert columns(alone) == columns(together)[b : b + 1]


@pytest.mark.parametrize("ratio", [0.29, 0.57, 0.07, 0.7])
def test_a_ratio_that_is_exact_on_paper_is_not_rounded_down_by_the_machine(ratio: float):
    assert make("l2", keep_ratio=ratio).count(100) == round(100 * ratio)


def test_the_numbers_that_the_sources_name():
    assert make("atp").count(256) == 154
    assert make("atp").count(576) == 346
    assert make("l2").count(577) == 288
    assert make("fastv").count(576) == 288
    assert [make("fastv", keep_ratio=r).count(576) for r in (0.125, 0.25, 0.75)] == [72, 144, 432]


# -- strategies that rank ---------------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(scores=st.lists(st.integers(0, 4), min_size=2, max_size=40), name=st.sampled_from(list(SCORED)), data=st.data())
def test_ties_go_to_the_lower_index(scores: list[int], name: str, data):
    k = data.draw(st.integers(1, len(scores)))
    kept = make(name, keep_tokens=k).decide(scored(name, torch.tensor([scores]).float()))
    assert columns(kept) == [reference.best(scores, k)]


@pytest.mark.parametrize("name", [*SCORED, "atp+text"])
def test_a_permutation_of_the_tokens_permutes_the_choice(name: str):
    strategy = make("atp", alpha=0.5, keep_tokens=9) if name == "atp+text" else make(name, keep_tokens=9)
    seen, order = any_visual(25, b=1), torch.randperm(25)
    per_token = ("tokens", "cls_attention", "aligned", "last_query_attention", "index")
    moved = {f: getattr(seen, f)[:, order] if f in per_token else getattr(seen, f) for f in vars(seen)}
    there = {int(order[i]) for i in columns(strategy.decide(VisualTokens(**moved)))[0]}
    assert there == set(columns(strategy.decide(seen))[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("n", [1, 5, 36, 61])
def test_l2_keeps_the_largest_norms(n: int, dtype: torch.dtype):
    e = torch.randn(2, n, 7).to(dtype) * torch.linspace(1, 3, n)[None, :, None].to(dtype)
    strategy = make("l2", keep_ratio=0.5)
    kept = strategy.decide(visual(e))
    assert columns(kept) == [reference.best(reference.l2_scores(row), reference.floor(n * 0.5)) for row in e]


def test_l2_scores_in_single_precision():
    e = torch.full((1, 4, 3), 250.0, dtype=torch.float16)  # the squares overflow in half precision
    e[0, 2] = 251
    assert columns(make("l2", keep_tokens=1).decide(visual(e))) == [[2]]


def test_l2_switches_read_another_embedding():
    plain, centered, positioned = (
        torch.eye(4)[None] * torch.tensor(v) for v in ([4, 1, 1, 1], [1, 4, 1, 1], [1, 1, 4, 1])
    )
    seen = visual(plain, centered=centered, positioned=positioned)
    switches = [{}, {"center": True}, {"positioned": True}]
    assert [columns(make("l2", keep_tokens=1, **s).decide(seen)) for s in switches] == [[[0]], [[1]], [[2]]]


def test_fastv_ranks_the_last_query_row():
    seen = any_visual(36)
    expected = [reference.best(row.tolist(), 18) for row in seen.last_query_attention]
    assert columns(make("fastv").decide(seen)) == expected


# -- ATP --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("how", ["minmax", "zscore"])
@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.5, 1.0])
@pytest.mark.parametrize("n", [1, 30])
def test_atp_is_the_weighted_sum_of_both_scores(alpha: float, how: str, sign: int, n: int):
    seen = any_visual(n)
    strategy = make("atp", alpha=alpha, normalization=how, relevance_sign=sign)
    scores = strategy.score(seen)
    for b in range(2):
        row = reference.atp_scores(seen.cls_attention[b], seen.aligned[b], seen.text[b], alpha, sign, how)
        assert scores[b].tolist() == pytest.approx(row, abs=2e-5)
        assert columns(strategy.decide(seen))[b] == reference.best(row, reference.nearest(0.6 * n))


def test_atp_without_text_is_top_k_of_cls_attention_and_needs_no_text():
    strategy, attention = make("atp", alpha=0.0, keep_tokens=11), torch.rand(2, 40).softmax(-1)
    kept = strategy.decide(visual(torch.randn(2, 40, 3), cls_attention=attention))
    assert columns(kept) == [sorted(row.topk(11).indices.tolist()) for row in attention]
    assert tuple(strategy.needs) == ("cls_attention",)
    assert "cls_attention" not in make("atp", alpha=1.0).needs


def test_atp_with_text_alone_reverses_with_the_sign():
    seen = any_visual(20, b=1)
    up, down = (make("atp", alpha=1.0, relevance_sign=s, keep_tokens=10).decide(seen) for s in (1, -1))
    assert set(columns(up)[0]).isdisjoint(columns(down)[0])


def test_the_row_sum_that_the_atp_paper_prints_cannot_rank():
    attention = torch.randn(4, 17, 17).softmax(-1)
    assert torch.allclose(attention.mean(0).sum(-1), torch.ones(17))
    constant = visual(torch.randn(1, 17, 3), cls_attention=torch.ones(1, 17))
    assert columns(make("atp", keep_tokens=5).decide(constant)) == [list(range(5))]


def test_atp_normalizations_differ_where_an_outlier_dominates():
    seen = any_visual(300, b=1)
    seen.cls_attention[0, 3] = 0.1
    low, high = (
        columns(make("atp", keep_tokens=150, alpha=0.5, normalization=n).decide(seen)) for n in ("minmax", "zscore")
    )
    assert low != high


# -- VisionZip --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(
    ("n", "dominant", "contextual"),
    [(36, 8, 4), (36, 1, 5), (36, 8, 0), (36, 34, 1), (36, 1, 34), (36, 30, 5), (61, 13, 7), (2, 1, 0), (3, 1, 1)],
)
def test_visionzip_merges_as_described(n: int, dominant: int, contextual: int, dtype: torch.dtype):
    seen = any_visual(n, dtype=dtype)
    selection = make("visionzip", dominant=dominant, contextual=contextual).decide(seen)
    for b in range(2):
        one = (seen.tokens[b], seen.cls[b], seen.cls_attention[b], seen.keys[b])
        rows, sources = reference.visionzip(*one, dominant, contextual)
        assert selection.sources[b].tolist() == sources
        assert torch.allclose(selection.tokens[b].double(), rows, atol=1e-5)
        assert selection.keep[b].nonzero().flatten().tolist() == sorted(set(sources) - {-1})


def test_visionzip_54_and_10_make_64_of_576():
    seen = any_visual(576)
    selection = make("visionzip").decide(seen)
    assert selection.counts == [64, 64]
    for b, sources in enumerate(columns(selection)):
        assert sources[0] == -1
        assert sources[1:54] == reference.best(seen.cls_attention[b].tolist(), 53)
        rest = [i for i in range(576) if i not in sources[1:54]]
        assert [rest.index(target) for target in sources[54:]] == list(range(0, 469, 52))


@pytest.mark.parametrize(
    ("tokens", "split"), [(64, (54, 10)), (128, (108, 20)), (192, (162, 30)), (1, (1, 0)), (2, (1, 1))]
)
def test_a_budget_is_split_like_the_papers_settings(tokens: int, split: tuple[int, int]):
    assert make("visionzip", keep_tokens=tokens).split(576) == split


def test_a_contextual_token_that_nobody_joins_equals_its_target():
    seen = any_visual(12, b=1)
    seen.cls_attention[0] = torch.arange(12, 0, -1)
    seen.keys[0] = torch.tensor([0.0, 1, 0, 0])
    seen.keys[0, 8] = torch.tensor([1.0, 0, 0, 0])  # the second target: 4, 8 of the rest 4 ... 11
    selection = make("visionzip", dominant=5, contextual=2).decide(seen)
    assert columns(selection)[0][-2:] == [4, 8]
    assert selection.tokens[0][-1].equal(seen.tokens[0, 8])
    joined = seen.tokens[0, [5, 6, 7, 9, 10, 11]].mean(0)
    assert torch.allclose(selection.tokens[0][-2], seen.tokens[0, 4] + joined, atol=1e-6)


def test_visionzip_with_duplicate_keys_joins_the_first_target():
    seen = any_visual(12, b=1)
    seen.keys[0] = 1.0
    selection = make("visionzip", dominant=3, contextual=3).decide(seen)
    one = (seen.tokens[0], seen.cls[0], seen.cls_attention[0], seen.keys[0])
    assert torch.allclose(selection.tokens[0].double(), reference.visionzip(*one, 3, 3)[0], atol=1e-5)


# -- controls ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "k"), [(10, 3), (576, 64), (7, 5), (36, 1), (5, 4)])
def test_stride_is_evenly_spaced(n: int, k: int):
    assert columns(make("stride", keep_tokens=k).decide(visual(torch.randn(1, n, 2)))) == [
        [i * n // k for i in range(k)]
    ]


def draws(fingerprints: tuple[int, ...], seed: int = 0, n: int = 36, k: int = 9) -> list[list[int]]:
    seen = visual(torch.randn(len(fingerprints), n, 2), fingerprint=fingerprints)
    return columns(make("random", seed=seed, keep_tokens=k).decide(seen))


def test_random_depends_on_the_image_and_on_nothing_else():
    a, b, c = draws((11, 22, 33))
    assert a != b != c != a
    assert draws((33, 11)) == [c, a]


@pytest.mark.parametrize("seed", [1, 2, 12345])
def test_another_seed_draws_other_tokens(seed: int):
    assert draws((11, 22, 33), seed) != draws((11, 22, 33))
    assert draws((11, 22, 33), seed) == draws((11, 22, 33), seed)


def test_random_is_uniform():
    counts = Counter(i for row in draws(tuple(range(3000)), n=12, k=3) for i in row)
    assert all(abs(counts[i] - 750) < 5 * math.sqrt(3000 * 0.25 * 0.75) for i in range(12))  # five sigma


# -- the top-k that they share ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_top_k_of_equal_scores_is_the_beginning(dtype: torch.dtype):
    assert top_k(torch.ones(2, 300, dtype=dtype), 7).nonzero()[:, 1].tolist() == [*range(7)] * 2


@pytest.mark.parametrize("name", SCORED)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_score_that_is_not_finite_is_refused(name: str, bad: float):
    scores = torch.rand(1, 8)
    scores[0, 3] = bad
    with pytest.raises(ValueError, match=f"{name}: a score is not finite"):
        make(name).decide(scored(name, scores))
