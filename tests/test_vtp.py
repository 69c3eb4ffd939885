"""The package's own strategy: importance as ATP, coverage and determinants as restated."""

from __future__ import annotations

import pytest
import slow
import torch

from vtp_plugin import VisualTokens, get_strategy


def seen_by(kind: str, n: int, dtype: torch.dtype = torch.float32) -> VisualTokens:
    signals = {"cls_attention": slow.attention(2, n), "aligned": torch.randn(2, n, 5), "text": torch.randn(2, 5)}
    return slow.visual(slow.tokens(kind, n, d=24, dtype=dtype), **signals)


def importance(seen: VisualTokens, b: int, alpha: float, sign: int, focus: float, floor: float) -> list[float]:
    text = seen.text[b].double().tolist()
    intra = slow.minmax(seen.cls_attention[b].double().tolist())
    inter = slow.minmax([sign * slow.cosine(row, text) for row in seen.aligned[b].double().tolist()])
    return [((1 - alpha) * a + alpha * r + floor) ** focus for a, r in zip(intra, inter, strict=True)]


def restated(seen: VisualTokens, b: int, k: int, control: str, u: list[float]) -> list[int]:
    similarity, n, picks = slow.cosines(seen.tokens[b]), len(u), []
    if control == "none":
        return slow.best(u, k)
    kernel = torch.tensor([[u[i] * similarity[i][j] * u[j] for j in range(n)] for i in range(n)], dtype=torch.float64)
    while len(picks) < k:
        covered = [max([similarity[i][s] for s in picks] + [0.0]) for i in range(n)]

        def gain(j: int) -> float:
            if control == "determinantal":
                return float(torch.linalg.det(kernel[[*picks, j]][:, [*picks, j]]))
            return u[j] * sum(u[i] * max(0.0, similarity[i][j] - covered[i]) for i in range(n))  # noqa: B023

        picks.append(slow.argmax([j for j in range(n) if j not in picks], gain))
    return sorted(picks)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("control", ["coverage", "determinantal", "none"])
@pytest.mark.parametrize(
    ("alpha", "sign", "focus", "floor"), [(0.5, -1, 1.0, 0.1), (0.0, 1, 2.0, 0.0), (1.0, 1, 0.5, 0.3)]
)
@pytest.mark.parametrize(("n", "k"), [(1, 1), (2, 1), (20, 6)])
def test_as_described(n, k, alpha, sign, focus, floor, control, dtype):
    seen = seen_by("random", n, dtype)
    hyper = {"alpha": alpha, "relevance_sign": sign, "focus": focus, "floor": floor, "control": control}
    kept = get_strategy("vtp")(keep_tokens=k, **hyper).decide(seen)
    for b in range(2):
        u = importance(seen, b, alpha, sign, focus, floor)
        assert slow.columns(kept)[b] == restated(seen, b, k, control, u)


@pytest.mark.parametrize("kind", ["duplicates", "constant"])
@pytest.mark.parametrize("control", ["coverage", "determinantal", "none"])
@pytest.mark.parametrize("k", [1, 6, 39])
def test_exactly_k(kind: str, control: str, k: int):
    slow.check_exact(get_strategy("vtp")(keep_tokens=k, control=control).decide(seen_by(kind, 40)), 40, k)


def test_without_text_no_text_is_needed():
    strategy = get_strategy("vtp")(alpha=0.0, keep_tokens=5)
    assert tuple(strategy.needs) == ("cls_attention",)
    seen = seen_by("random", 20)
    slow.check_exact(strategy.decide(slow.visual(seen.tokens, cls_attention=seen.cls_attention)), 20, 5)


def test_without_control_it_is_atp_of_the_projected_block():
    seen = seen_by("random", 30)
    ours = get_strategy("vtp")(keep_tokens=9, control="none", relevance_sign=1).decide(seen)
    assert ours.keep.equal(get_strategy("atp")(keep_tokens=9).decide(seen).keep)
