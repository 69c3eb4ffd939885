"""FlashVID against its restatement with lists and loops."""

from __future__ import annotations

import pytest
import slow
import torch
from restated_flashvid import Restated

from vtp_plugin import VisualTokens, get_strategy

FILMS = [(1, 3, 4), (3, 2, 4), (4, 3, 4), (10, 2, 3)]


def film_of(
    film: tuple[int, int, int], noise: float, dtype: torch.dtype = torch.float32, n: int | None = None
) -> VisualTokens:
    """Frames that repeat the first but for noise; n of the tokens."""
    frames, rows, columns = film
    x = torch.randn(2, 1, rows * columns, 6) + noise * torch.randn(2, frames, rows * columns, 6)
    x = x.flatten(1, 2).to(dtype)
    slots = None if n is None else slow.some(film, n)
    x = x if n is None else torch.stack([own[where] for own, where in zip(x, slots, strict=True)])
    return slow.video(x, film, slots, cls_attention=slow.attention(*x.shape[:2]))


def check(seen: VisualTokens, k: int, **fields: float) -> None:
    answer = get_strategy("flashvid")(keep_tokens=k, **fields).decide(seen)
    for b, columns in enumerate(slow.columns(answer)):
        wanted, values = Restated(seen, b, k, fields).answer()
        assert columns == wanted
        expected = torch.tensor([values[column] for column in wanted], dtype=torch.double)
        torch.testing.assert_close(answer.tokens[b].double(), expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("noise", [0.05, 0.4, 3.0])
@pytest.mark.parametrize("keep", [0.1, 0.25, 0.7])
@pytest.mark.parametrize("film", FILMS)
def test_as_described(film: tuple[int, int, int], keep: float, noise: float, dtype: torch.dtype):
    seen = film_of(film, noise, dtype)
    check(seen, max(1, int(keep * seen.tokens.shape[1])), segments=1)
    check(seen, max(1, int(keep * seen.tokens.shape[1])))


@pytest.mark.parametrize("fields", [{"share": 0.0}, {"share": 1.0}, {"scene": -1.0}, {"join": 0.2}, {"neighbours": 2}])
@pytest.mark.parametrize("k", [1, 6, 23])
def test_every_switch(fields: dict[str, float], k: int):
    check(film_of((6, 2, 4), 0.4), k, segments=2, **fields)


@pytest.mark.parametrize("k", [4, 15, 29])
def test_frames_that_lost_tokens_before(k: int):
    check(film_of((6, 2, 4), 0.3, n=30), k, segments=1)


@pytest.mark.parametrize("kind", slow.INPUTS)
@pytest.mark.parametrize("k", [1, 5, 39])
def test_exactly_k_and_nothing_twice(kind: str, k: int):
    seen = slow.video(slow.tokens(kind, 40), (5, 2, 4), cls_attention=slow.attention(2, 40))
    kept = get_strategy("flashvid")(keep_tokens=k, segments=1).decide(seen)
    slow.check_exact(kept, 40, k)
    assert all(rows.isfinite().all() for rows in kept.tokens)


def test_trees_follow_what_moves():
    """A token that is somewhere else in every frame is one tree, in the place where it began, with its mean value."""
    x = torch.eye(8)[:5].repeat(6, 1, 1)  # six frames of five tokens
    for frame in range(6):
        x[frame] = x[frame].roll(frame, 0)
    x = x * torch.arange(1, 7).view(6, 1, 1)
    seen = slow.video(x.flatten(0, 1)[None], (6, 1, 5), cls_attention=torch.ones(1, 30))
    kept = get_strategy("flashvid")(keep_tokens=5, share=0.0, segments=1, scene=-1.0).decide(seen)
    assert slow.columns(kept) == [list(range(5))]
    assert torch.allclose(kept.tokens[0], torch.eye(8)[:5] * 3.5)


def test_a_scene_that_changes_ends_the_trees():
    x = torch.cat([torch.eye(8)[:4].repeat(3, 1), torch.eye(8)[4:].repeat(3, 1)])
    seen = slow.video(x[None], (6, 2, 2), cls_attention=torch.ones(1, 24))
    kept = get_strategy("flashvid")(keep_tokens=8, share=0.0, segments=1).decide(seen)
    assert slow.columns(kept) == [[0, 1, 2, 3, 12, 13, 14, 15]]
    assert torch.allclose(kept.tokens[0], torch.eye(8))


def test_what_went_where_is_told():
    seen = film_of((6, 2, 4), 0.1)
    kept = get_strategy("flashvid")(keep_tokens=20, segments=1).decide(seen)
    for into, columns in zip(kept.into, slow.columns(kept), strict=True):
        assert {*into.tolist()} - {-1} <= {*columns}
        assert [c for c in columns if into[c] == -1] == [c for c in range(48) if into[c] == -1]
