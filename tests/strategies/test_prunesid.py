"""PruneSID against its restatement: components by eigenvectors, lists for the rest."""

from __future__ import annotations

from fractions import Fraction

import pytest
import slow
import torch

from vtp_plugin import VisualTokens, get_strategy


def groups(x: torch.Tensor, number: int) -> list[int]:
    """The principal component of sigmoid(x) that each token loads on most."""
    squashed = x.double().sigmoid()
    centred = squashed - squashed.mean(0)
    values, vectors = torch.linalg.eigh(centred.T @ centred)
    leading = [c for c in reversed(range(len(values))) if values[c] > 1e-14 * max(1e-300, values[-1])][:number] or [-1]
    loadings = (centred @ vectors[:, leading]).abs().tolist()
    return [max(range(len(row)), key=lambda c: (row[c], -c)) for row in loadings]


def divided(weights: list[int], room: list[int], k: int) -> list[int]:
    """In proportion, as far as there is room, over and over; what is less than one each goes to the largest shares."""
    parts = [0] * len(weights)
    while sum(parts) < k:
        free, missing = [g for g in range(len(weights)) if parts[g] < room[g]], k - sum(parts)
        shares = {g: Fraction(missing * weights[g], sum(weights[h] for h in free)) for g in free}
        grown = {g: min(int(share), room[g] - parts[g]) for g, share in shares.items()}
        if sum(grown.values()) == 0:
            grown = dict.fromkeys(sorted(free, key=lambda g: (-shares[g], g))[:missing], 1)
        for g, more in grown.items():
            parts[g] += more
    return parts


def restated(seen: VisualTokens, b: int, k: int, threshold: float) -> list[int]:
    x, attention = seen.tokens[b].float(), seen.cls_attention[b].double().tolist()
    own, similarity = groups(x, max(1, k // 4)), slow.cosines(x)
    mean = sum(map(sum, similarity)) / len(x) ** 2
    ranked, stayed = [], []
    for group in sorted(set(own)):
        members = [i for i in slow.ranked(attention) if own[i] == group]
        first: list[int] = []
        for i in members:
            if all(similarity[i][j] <= threshold * k / 32 * mean for j in first):
                first.append(i)
        ranked.append(first + [i for i in members if i not in first])
        stayed.append(len(first))
    wanted = k if seen.cls is None else k - 1
    quotas = divided(stayed, [len(members) for members in ranked], wanted)
    return [i for members, quota in zip(ranked, quotas, strict=True) for i in members[:quota]]


def seen_by(kind: str, n: int, cls: bool = True, dtype: torch.dtype = torch.float32) -> VisualTokens:
    x = (slow.tokens(kind, n) + 0.7).to(dtype)  # tokens of real towers resemble each other
    return slow.visual(x, cls_attention=slow.attention(2, n), cls=torch.randn(2, 6) if cls else None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("threshold", [0.5, 1.0, 4.0])
@pytest.mark.parametrize("cls", [True, False])
@pytest.mark.parametrize(("n", "k"), [(2, 1), (40, 5), (40, 16), (40, 39)])
def test_as_described(n: int, k: int, cls: bool, threshold: float, dtype: torch.dtype):
    seen = seen_by("random", n, cls, dtype)
    selection = get_strategy("prunesid")(keep_tokens=k, threshold=threshold).decide(seen)
    for b, columns in enumerate(slow.columns(selection)):
        assert columns == [-1] * cls + restated(seen, b, k, threshold)
        assert selection.tokens[b][int(cls) :].equal(seen.tokens[b, columns[int(cls) :]].float())
        if cls:
            assert selection.tokens[b][0].equal(seen.cls[b])


@pytest.mark.parametrize("kind", slow.INPUTS)
@pytest.mark.parametrize("k", [1, 7, 39])
def test_exactly_k(kind: str, k: int):
    selection = get_strategy("prunesid")(keep_tokens=k, order="raster").decide(seen_by(kind, 40, cls=False))
    slow.check_exact(selection, 40, k)


def test_raster_order_is_a_switch():
    seen = seen_by("random", 40)
    one, other = (get_strategy("prunesid")(keep_tokens=16, order=order).decide(seen) for order in ("group", "raster"))
    for by_group, by_place in zip(slow.columns(one), slow.columns(other), strict=True):
        assert by_place == [-1, *sorted(by_group[1:])]
