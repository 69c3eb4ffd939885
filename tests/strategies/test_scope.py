"""SCOPE against its restatement, token by token."""

from __future__ import annotations

import pytest
import slow
import torch
from families import FAMILIES, Processor
from torch import Tensor

from vtp_plugin import get_strategy, prune


def restated(x: Tensor, attention: list[float], k: int, alpha: float, additive: bool = False) -> list[int]:
    similarity = slow.cosines(x)
    n = len(similarity)
    covered, picks = [0.0] * n, []
    while len(picks) < k:
        new = [sum(max(0.0, similarity[i][j] - covered[i]) for i in range(n)) for j in range(n)]
        gain = [w**alpha + c if additive else w**alpha * c for w, c in zip(attention, new, strict=True)]
        picks.append(slow.argmax([j for j in range(n) if j not in picks], lambda j: gain[j]))  # noqa: B023
        covered = [max(c, similarity[i][picks[-1]]) for i, c in enumerate(covered)]
    return sorted(picks)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("alpha", [0.5, 1.0, 2.0])
@pytest.mark.parametrize(("n", "k"), [(1, 1), (3, 1), (25, 6), (25, 12)])
def test_as_described(n: int, k: int, alpha: float, dtype: torch.dtype):
    seen = slow.visual(slow.tokens("random", n, dtype=dtype), cls_attention=slow.attention(2, n))
    kept = slow.columns(get_strategy("scope")(keep_tokens=k, alpha=alpha).decide(seen))
    rows = zip(seen.tokens, seen.cls_attention.double(), strict=True)
    assert kept == [restated(x, a.tolist(), k, alpha) for x, a in rows]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("alpha", [0.5, 2.0])
@pytest.mark.parametrize(("n", "k"), [(1, 1), (3, 1), (25, 12)])
def test_the_additive_form(n: int, k: int, alpha: float, dtype: torch.dtype):
    heads = 5 * torch.randn(2, 12, n + 1).softmax(-1)[..., 1:].double()  # [B, H, N]
    seen = slow.visual(slow.tokens("random", n, dtype=dtype), cls_attention=heads.mean(1).float(), heads=12)
    kept = slow.columns(get_strategy("scope")(keep_tokens=k, alpha=alpha, gain="additive").decide(seen))
    rows = zip(seen.tokens, heads.sum(1), strict=True)  # as in the code, which adds the heads up
    assert kept == [restated(x, a.tolist(), k, alpha, additive=True) for x, a in rows]


def test_the_additive_form_is_not_blind_to_the_number_of_heads():
    x, a = torch.randn(1, 60, 6), slow.attention(1, 60)
    one, other = (slow.visual(x, cls_attention=a, heads=heads) for heads in (1, 10**6))
    strategy = get_strategy("scope")(keep_tokens=12, gain="additive")
    assert not strategy.decide(one).keep.equal(strategy.decide(other).keep)
    assert slow.columns(strategy.decide(other)) == [slow.best(a[0].tolist(), 12)]


@pytest.mark.parametrize("kind", ["duplicates", "constant"])
@pytest.mark.parametrize("k", [1, 5, 20, 39])
def test_exactly_k_when_everything_is_covered(kind: str, k: int):
    seen = slow.visual(slow.tokens(kind, 40), cls_attention=slow.attention(2, 40))
    slow.check_exact(get_strategy("scope")(keep_tokens=k).decide(seen), 40, k)


def test_the_product_does_not_see_the_number_of_heads():
    x, a = torch.randn(1, 30, 6), slow.attention(1, 30)
    one, other = (get_strategy("scope")(keep_tokens=8).decide(slow.visual(x, cls_attention=s * a)) for s in (1, 16))
    assert one.keep.equal(other.keep)


@pytest.mark.parametrize("name", FAMILIES)
def test_every_tower_says_how_many_heads_it_has(name: str, monkeypatch: pytest.MonkeyPatch):
    family, seen = FAMILIES[name], []
    strategy = get_strategy("scope")(gain="additive", keep_ratio=0.5)
    select = strategy.select
    monkeypatch.setattr(strategy, "select", lambda visual: seen.append(visual) or select(visual))
    with torch.no_grad(), prune(model := family.build("sdpa"), strategy, processor=Processor()):
        model(**family.batch([family.sample(1, 1)]))
    config = model.config.vision_config.to_dict()
    assert {visual.heads for visual in seen} == {config.get("num_attention_heads", config.get("num_heads"))}
