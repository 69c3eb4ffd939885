"""EVS against its restatement with lists, and against a host that has it."""

from __future__ import annotations

import pytest
import slow
import torch

from vtp_plugin import VisualTokens, get_strategy

FILMS = [(1, 2, 3), (2, 1, 5), (4, 3, 4), (9, 2, 2)]


def changes(seen: VisualTokens, b: int) -> list[float]:
    """d of every token; 3 stands for infinity."""
    _, rows, columns = seen.film
    places = rows * columns
    known = dict(zip(seen.index[b].tolist(), seen.tokens[b].double().tolist(), strict=True))
    return [
        1 - slow.cosine(row, known[slot - places]) if slot - places in known else 3.0 for slot, row in known.items()
    ]


def moving(film: tuple[int, int, int], dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Frames that repeat the one before but for some places."""
    frames, rows, columns = film
    x = torch.randn(2, 1, rows * columns, 6).repeat(1, frames, 1, 1)
    return (
        (x + torch.randn(2, frames, rows * columns, 6) * (torch.rand(2, frames, rows * columns, 1) < 0.4))
        .flatten(1, 2)
        .to(dtype)
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("keep", [0.01, 0.3, 0.62, 0.99])
@pytest.mark.parametrize("film", FILMS)
def test_as_described(film: tuple[int, int, int], keep: float, dtype: torch.dtype):
    x = torch.randn(2, film[0] * film[1] * film[2], 6).to(dtype)
    seen, places = slow.video(x, film), film[1] * film[2]
    kept = get_strategy("evs")(keep_ratio=keep).decide(seen)
    k = max(places, int(keep * x.shape[1] + 1e-9))
    assert slow.columns(kept) == [slow.best(changes(seen, b), k) for b in range(2)]
    assert all(row[:places] == list(range(places)) for row in slow.columns(kept))


@pytest.mark.parametrize("n", [30, 47])
def test_what_has_no_predecessor_any_more_is_new(n: int):
    film = (4, 3, 4)
    slots = slow.some(film, n)
    seen = slow.video(torch.randn(2, n, 6), film, slots)
    kept = get_strategy("evs")(keep_tokens=25).decide(seen)
    assert slow.columns(kept) == [slow.best(changes(seen, b), 25) for b in range(2)]


def test_a_still_picture_stays_whole():
    seen = slow.video(torch.randn(2, 12, 6), (1, 3, 4))
    assert get_strategy("evs")(keep_ratio=0.1).decide(seen).keeps_all


def test_a_film_of_one_picture_keeps_its_first_frame():
    seen = slow.video(torch.randn(1, 1, 12, 6).repeat(2, 5, 1, 1).flatten(1, 2), (5, 3, 4))
    assert slow.columns(get_strategy("evs")(keep_ratio=0.2).decide(seen)) == [list(range(12))] * 2


def test_what_moves_stays():
    """One object that is somewhere else in every frame: where it came to, and where it left."""
    x = torch.eye(6)[torch.zeros(5 * 6, dtype=torch.long)].view(5, 6, 6).clone()
    for frame in range(5):
        x[frame, frame] = torch.eye(6)[1]
    seen = slow.video(x.flatten(0, 1)[None], (5, 2, 3))
    (kept,) = slow.columns(get_strategy("evs")(keep_tokens=14).decide(seen))
    moved = [6 * frame + place for frame in range(1, 5) for place in (frame - 1, frame)]
    assert kept == [*range(6), *moved]


@pytest.mark.parametrize("film", FILMS[1:])
@pytest.mark.parametrize("keep", [0.25, 0.5, 0.75])
def test_the_same_tokens_as_in_transformers(film: tuple[int, int, int], keep: float):
    """Ratios that are exact in both ways of saying them: the host says what to drop."""
    name = "transformers.models.nemotron_h_omni.modeling_nemotron_h_omni"
    host = getattr(pytest.importorskip(name), "compute_retention_mask", None)
    if host is None:
        pytest.skip("this release has it in another form")
    x = moving(film)
    kept = get_strategy("evs")(keep_ratio=keep).decide(slow.video(x, film))
    for one, columns in zip(x, slow.columns(kept), strict=True):
        assert host(one, film[0], 1 - keep).nonzero().flatten().tolist() == columns


def test_a_budget_over_frames_is_refused():
    with pytest.raises(ValueError, match=r"^evs: budget must be per_image: the method divides it over the frames"):
        get_strategy("evs")(budget="per_tile")
