"""MMTok against coverage summed row by row."""

from __future__ import annotations

import math

import pytest
import slow
import torch

from vtp_plugin import VisualTokens, get_strategy


def softmax(logits: list[float]) -> list[float]:
    powers = [math.exp(v - max(logits)) for v in logits]
    return [p / sum(powers) for p in powers]


def restated(seen: VisualTokens, b: int, k: int, alpha: float, text: float = 0.02, image: float = 0.2) -> list[int]:
    x, z = seen.tokens[b].double().tolist(), seen.projected[b].double().tolist()
    words = [word for word in seen.words[b].double().tolist() if any(word)]
    n = len(x)
    rows = [[p / len(words) for p in softmax([slow.cosine(word, v) / text for v in z])] for word in words]
    rows += [[alpha * q / n for q in softmax([slow.cosine(x[i], v) / image for v in x])] for i in range(n)]
    picks: list[int] = []
    covered = [0.0] * len(rows)
    while len(picks) < k:
        others = [j for j in range(n) if j not in picks]
        picks.append(
            slow.argmax(others, lambda j: sum(max(0.0, r[j] - c) for r, c in zip(rows, covered, strict=True)))  # noqa: B023
        )
        covered = [max(c, row[picks[-1]]) for row, c in zip(rows, covered, strict=True)]
    return sorted(picks)


def seen_by(kind: str, n: int, words: int = 5, dtype: torch.dtype = torch.float32) -> VisualTokens:
    said = torch.randn(2, words, 7)
    said[1, 3:] = 0  # the second question is shorter
    return slow.visual(slow.tokens(kind, n, dtype=dtype), projected=slow.tokens(kind, n, 7, dtype=dtype), words=said)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("alpha", [0.0, 0.5, 2.0])
@pytest.mark.parametrize(("n", "k"), [(1, 1), (2, 1), (25, 4), (25, 12)])
def test_as_described(n: int, k: int, alpha: float, dtype: torch.dtype):
    seen = seen_by("random", n, dtype=dtype)
    if alpha == 0:
        k = min(k, 3)  # then every word is covered, and rounding decides
    kept = get_strategy("mmtok")(keep_tokens=k, alpha=alpha).decide(seen)
    assert slow.columns(kept) == [restated(seen, b, k, alpha) for b in range(2)]


@pytest.mark.parametrize("field", ["text_temperature", "image_temperature"])
def test_temperatures(field: str):
    seen = seen_by("random", 25)
    kept = get_strategy("mmtok")(keep_tokens=8, **{field: 0.1}).decide(seen)
    told = {"text": 0.1} if field == "text_temperature" else {"image": 0.1}
    assert slow.columns(kept) == [restated(seen, b, 8, 0.5, **told) for b in range(2)]


@pytest.mark.parametrize("kind", ["duplicates", "constant"])
@pytest.mark.parametrize("k", [1, 5, 20, 39])
def test_exactly_k_when_everything_is_covered(kind: str, k: int):
    slow.check_exact(get_strategy("mmtok")(keep_tokens=k).decide(seen_by(kind, 40)), 40, k)


def test_words_that_are_not_there_do_not_count():
    seen = seen_by("random", 30)
    longer = slow.visual(seen.tokens, projected=seen.projected, words=torch.nn.functional.pad(seen.words, (0, 0, 0, 4)))
    one, other = (get_strategy("mmtok")(keep_tokens=9).decide(v) for v in (seen, longer))
    assert one.keep.equal(other.keep)
