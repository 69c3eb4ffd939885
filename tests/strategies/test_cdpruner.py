"""CDPruner: its greedy picks against determinants of the conditional kernel."""

from __future__ import annotations

import models
import pytest
import slow
import torch
from transformers import AutoTokenizer, CLIPModel

from vtp_plugin import Selection, VisualTokens, get_strategy


def restated(seen: VisualTokens, b: int, k: int, sign: int) -> list[int]:
    """The greedy MAP by determinants: no Cholesky, no recursion."""
    text = seen.text[b].double().tolist()
    relevance = [sign * slow.cosine(row, text) for row in seen.aligned[b].double().tolist()]
    low, high = min(relevance), max(relevance)
    r = [(v - low + 1e-6) / (high - low) if high > low else 1.0 for v in relevance]
    similarity = slow.cosines(seen.projected[b])
    n = len(r)
    kernel = torch.tensor([[r[i] * similarity[i][j] * r[j] for j in range(n)] for i in range(n)], dtype=torch.float64)
    picks: list[int] = []
    while len(picks) < k:
        others = [j for j in range(n) if j not in picks]
        picks.append(slow.argmax(others, lambda j: float(torch.linalg.det(kernel[[*picks, j]][:, [*picks, j]]))))
    return sorted(picks)


def seen_by(kind: str, n: int, d: int, dtype: torch.dtype = torch.float32) -> VisualTokens:
    aligned, text = torch.randn(2, n, 5), torch.randn(2, 5)
    return slow.visual(torch.zeros(2, n, 3), projected=slow.tokens(kind, n, d, dtype=dtype), aligned=aligned, text=text)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("sign", [-1, 1])
@pytest.mark.parametrize(("n", "k"), [(1, 1), (2, 1), (24, 6), (24, 12)])
def test_as_described(n: int, k: int, sign: int, dtype: torch.dtype):
    seen = seen_by("random", n, 24, dtype)
    kept = get_strategy("cdpruner")(keep_tokens=k, relevance_sign=sign).decide(seen)
    assert slow.columns(kept) == [restated(seen, b, k, sign) for b in range(2)]


@pytest.mark.parametrize("kind", ["duplicates", "constant"])
@pytest.mark.parametrize("k", [1, 5, 6, 39])
def test_more_tokens_than_directions_go_on_by_relevance(kind: str, k: int):
    seen = seen_by(kind, 40, 6)
    kept = get_strategy("cdpruner")(keep_tokens=k).decide(seen)
    slow.check_exact(kept, 40, k)
    if kind == "constant" and k > 1:
        text = seen.text[:, None]
        relevance = -torch.nn.functional.cosine_similarity(seen.aligned, text, dim=-1)
        assert slow.columns(kept) == [slow.best(row.tolist(), k) for row in relevance]


def test_equal_relevance_is_pure_diversity():
    seen = seen_by("random", 20, 30)
    seen.aligned[:] = 1.0
    kept = get_strategy("cdpruner")(keep_tokens=5).decide(seen)
    slow.check_exact(kept, 20, 5)


def test_the_kernel_of_orthogonal_tokens_keeps_the_most_relevant():
    seen = seen_by("random", 12, 12)
    seen.projected[:] = torch.eye(12)
    relevance = -torch.nn.functional.cosine_similarity(seen.aligned, seen.text[:, None], dim=-1)
    kept = get_strategy("cdpruner")(keep_tokens=5).decide(seen)
    assert slow.columns(kept) == [slow.best(row.tolist(), 5) for row in relevance]


# -- questions above the text tower's length --------------------------------------------------------------------------


@torch.no_grad()
def pieces(question: str) -> torch.Tensor:
    """Text embeddings of 77 tokens each, every piece encoded by itself and unpadded; pooled where transformers does."""
    clip, tokenizer = (cls.from_pretrained(models.clip_folder()) for cls in (CLIPModel, AutoTokenizer))
    ids, rows = tokenizer(question, verbose=False)["input_ids"], []
    for start in range(0, len(ids), 77):
        piece = ids[start : start + 77]
        hidden = clip.text_model(torch.tensor([piece])).last_hidden_state[0]
        rows.append(clip.text_projection(hidden[piece.index(513) if 513 in piece else 0]))
    return torch.stack(rows)


@pytest.mark.parametrize("words", [8, 30, 60])
@torch.no_grad()
def test_a_long_question_is_judged_in_segments(words: int):
    host, shown = models.tiny("llava_hf", "sdpa"), []
    strategy = get_strategy("cdpruner")(keep_tokens=9, clip=str(host.clip))
    select = strategy.select
    object.__setattr__(strategy, "select", lambda visual: _noted(shown, visual, select(visual)))
    row = [1, models.picture(0), *range(10, 10 + words)]
    with host.prune(strategy) as pruned:
        host.forward([row])
    texts = pieces(models.words([1, *range(10, 10 + words)])).double()
    assert len(texts) == {8: 1, 30: 2, 60: 3}[words]
    (seen, selection) = shown[0]
    patches = seen.aligned[0].double().tolist()
    relevance = [-sum(slow.cosine(patch, text) for text in texts.tolist()) / len(texts) for patch in patches]
    unit = VisualTokens(**{**vars(seen), "text": torch.nn.functional.normalize(texts, dim=-1).mean(0)[None].float()})
    assert slow.columns(selection) == [restated(unit, 0, 9, -1)]
    length = float(unit.text.norm())
    torch.testing.assert_close(
        selection.scores[0].double() * length, torch.tensor(relevance).double(), atol=1e-5, rtol=1e-5
    )
    assert pruned.events[0].after == [9]


@torch.no_grad()
def test_truncation_is_the_switch_and_a_short_question_does_not_notice():
    host, kept = models.tiny("llava_hf", "sdpa"), {}
    for words in (8, 60):
        for segments in (True, False):
            strategy = get_strategy("cdpruner")(keep_tokens=9, clip=str(host.clip), segments=segments)
            with host.prune(strategy) as pruned:
                host.forward([[1, models.picture(0), *range(10, 10 + words)]])
            kept[words, segments] = pruned.events[0].kept[0].tolist()
    assert kept[8, True] == kept[8, False]
    assert kept[60, True] != kept[60, False]
    with pytest.raises(ValueError, match="cdpruner: segments must be one of True, False"):
        get_strategy("cdpruner")(segments="yes")


def _noted(shown: list, visual: VisualTokens, selection: Selection) -> Selection:
    shown.append((visual, selection))
    return selection
