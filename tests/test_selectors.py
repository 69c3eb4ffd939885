"""The pieces that several methods share: every greedy pick is the best one that was left."""

from __future__ import annotations

import math
from collections import Counter, OrderedDict
from types import SimpleNamespace
from typing import Any

import pytest
import slow
import torch
from torch import Tensor

from vtp_plugin import replay, selectors

CLOSE = 1e-5


def follows(picks: list[int], gains: list[dict[int, float]]) -> None:
    """Every pick was untaken and as good as any other, up to rounding."""
    assert len(set(picks)) == len(picks)
    for pick, gain in zip(picks, gains, strict=True):
        assert gain[pick] >= max(gain.values()) - CLOSE


def diversity_gains(similarity: slow.Matrix, picks: list[int]) -> list[dict[int, float]]:
    n, gains = len(similarity), []
    for t in range(len(picks)):
        others = [j for j in range(n) if j not in picks[:t]]
        rivals = picks[:t] or range(n)
        distance = {j: [1 - similarity[i][j] for i in rivals if i != j] for j in others}
        gains.append({j: min(d) if d else 0.0 for j, d in distance.items()})
    return gains


def coverage_gains(
    similarity: slow.Matrix, weight: list[float], demand: list[float], picks: list[int]
) -> list[dict[int, float]]:
    n, gains = len(similarity), []
    for t in range(len(picks)):
        covered = [max([similarity[i][s] for s in picks[:t]] + [0.0]) for i in range(n)]
        more = {
            j: sum(demand[i] * max(0.0, similarity[i][j] - covered[i]) for i in range(n))
            for j in range(n)
            if j not in picks[:t]
        }
        gains.append({j: weight[j] * gain for j, gain in more.items()})
    return gains


def determinant(kernel: Tensor, picks: list[int]) -> float:
    return float(torch.linalg.det(kernel[picks][:, picks]))


def determinant_gains(kernel: Tensor, picks: list[int]) -> list[dict[int, float]]:
    """The determinant after each pick, over the determinant before."""
    gains, before = [], 1.0
    for t in range(len(picks)):
        after = {j: determinant(kernel.double(), [*picks[:t], j]) for j in range(len(kernel)) if j not in picks[:t]}
        gains.append({j: value / before for j, value in after.items()})
        before = after[picks[t]]
    return gains


@pytest.mark.parametrize("kind", slow.INPUTS)
@pytest.mark.parametrize(("n", "k"), [(1, 1), (2, 1), (17, 6), (17, 17)])
def test_farthest_points(kind: str, n: int, k: int):
    x = slow.tokens(kind, n)
    picks = selectors.farthest_points(1 - selectors.cosines(x), k)
    for row, chosen in zip(x, picks.tolist(), strict=True):
        follows(chosen, diversity_gains(slow.cosines(row), chosen))


@pytest.mark.parametrize("kind", slow.INPUTS)
def test_distances_and_weighted_farthest_points(kind: str):
    x, weight = slow.tokens(kind, 12), torch.rand(2, 12) + 0.1
    squared = selectors.distances(x)
    assert torch.allclose(squared, (x[:, :, None] - x[:, None]).square().sum(-1), atol=CLOSE)
    for b, row in enumerate(selectors.farthest_points(squared, 7, weight).tolist()):
        gains = []
        for t in range(7):
            left = [j for j in range(12) if j not in row[:t]]
            near = {j: min(squared[b, s, j].item() for s in row[:t] or range(12) if s != j) for j in left}
            gains.append({j: weight[b, j].item() * d for j, d in near.items()})
        follows(row, gains)


@pytest.mark.parametrize("kind", slow.INPUTS)
@pytest.mark.parametrize(("n", "k"), [(2, 2), (17, 6), (17, 17)])
def test_herding(kind: str, n: int, k: int):
    """By the definition: each pick brings the mean of the picks, in the kernel's space, closest to that of all."""
    kernel = selectors.gaussian(slow.tokens(kind, n), 0.5)
    picks = selectors.herding(kernel, torch.zeros(2, 1, dtype=torch.long), k)
    for own, chosen in zip(kernel.double(), picks.tolist(), strict=True):

        def off(kept: list[int], own: torch.Tensor = own) -> float:  # |mean of kept - mean of all|^2
            return float(own[kept][:, kept].mean() - 2 * own[kept].mean())

        assert chosen[0] == 0
        assert len(set(chosen)) == k
        for t in range(1, k):
            left = {j: off([*chosen[:t], j]) for j in range(n) if j not in chosen[:t]}
            assert left[chosen[t]] <= min(left.values()) + 1e-5


def test_gaussian_by_its_definition():
    x = slow.tokens("random", 11)
    found = selectors.gaussian(x, 0.7)
    for row, own in zip(x.double().tolist(), found, strict=True):
        squared = [[sum((a - b) ** 2 for a, b in zip(p, q, strict=True)) for q in row] for p in row]
        middle = sorted(value for line in squared for value in line)[(11 * 11 - 1) // 2]
        wanted = torch.tensor([[math.exp(-value / (0.7 * middle)) for value in line] for line in squared])
        assert (own - wanted).abs().max() <= selectors.STEP / 2 + 1e-6
        assert own.div(selectors.STEP).frac().eq(0).all()
    assert selectors.gaussian(torch.ones(1, 4, 3), 0.5).eq(1).all()  # all are alike


def test_a_pair_that_resembles_only_itself_is_a_tie_whatever_the_rounding():
    """Both gain as much; the lower index is picked also where another device rounds the tokens otherwise."""
    x = torch.rand(1, 160, 3)  # so many pairs of neighbours, and little else that is near
    picks = selectors.coverage(selectors.gaussian(x, 0.02), torch.ones(1, 160), 60)
    for seed in range(10):
        noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(seed))
        elsewhere = selectors.gaussian(x * (1 + 1e-7 * noise), 0.02)
        assert selectors.coverage(elsewhere, torch.ones(1, 160), 60).equal(picks)


def test_outliers_leave_the_likeness_of_the_others():
    """A few patches far from everything, as ViTs have them."""
    x = torch.randn(1, 60, 24)
    among = selectors.gaussian(torch.cat([x, 100 * torch.randn(1, 2, 24)], 1), 0.5)
    assert (among[:, :60, :60] - selectors.gaussian(x, 0.5)).abs().max() < 0.05


@pytest.mark.parametrize("demanded", [False, True])
@pytest.mark.parametrize("kind", slow.INPUTS)
@pytest.mark.parametrize(("n", "k"), [(1, 1), (2, 1), (17, 6), (17, 17)])
def test_coverage(kind: str, n: int, k: int, demanded: bool):
    x, weight, demand = slow.tokens(kind, n), torch.rand(2, n), torch.rand(2, n) if demanded else None
    picks = selectors.coverage(selectors.cosines(x), weight, k, demand)
    for b, chosen in enumerate(picks.tolist()):
        wanted = [1.0] * n if demand is None else demand[b].tolist()
        follows(chosen, coverage_gains(slow.cosines(x[b]), weight[b].tolist(), wanted, chosen))


@pytest.mark.parametrize(("n", "k", "d"), [(1, 1, 6), (2, 1, 6), (17, 5, 6), (12, 12, 20)])
def test_determinantal(n: int, k: int, d: int):
    r = torch.rand(2, n) + 0.2
    kernel = r[:, :, None] * selectors.cosines(slow.tokens("random", n, d)) * r[:, None]
    picks = selectors.determinantal(kernel, k, fallback=r)
    for one, chosen in zip(kernel, picks.tolist(), strict=True):
        follows(chosen, determinant_gains(one, chosen))


def test_determinantal_of_an_identity_takes_the_largest_qualities():
    r = torch.rand(1, 9)
    picks = selectors.determinantal(torch.diag_embed(r**2), 5, fallback=r)
    assert picks[0].tolist() == slow.ranked(r[0].tolist())[:5]


@pytest.mark.parametrize("scale", [1.0, 1e-3])
def test_determinantal_beyond_the_rank_goes_on_by_the_spare_score(scale: float):
    x, fallback = slow.tokens("duplicates", 20, d=8, b=1), torch.rand(1, 20)
    picks = selectors.determinantal(scale * selectors.cosines(x), 20, fallback)[0].tolist()
    assert sorted(picks) == list(range(20))
    assert len({i % 5 for i in picks[:5]}) == 5  # first one of every direction
    left = [fallback[0, i].item() for i in picks[5:]]
    assert left == sorted(left, reverse=True)


def test_a_batch_is_its_images_alone():
    x, w = torch.randn(3, 60, 16), torch.rand(3, 60)
    together, kernel = selectors.cosines(x), None
    assert together.equal(torch.cat([selectors.cosines(one[None]) for one in x]))
    kernel = w[:, :, None] * together * w[:, None]
    for select in (
        lambda s: selectors.farthest_points(1 - together[s], 20),
        lambda s: selectors.gaussian(x[s], 0.5),
        lambda s: selectors.herding(together[s], torch.arange(3)[s, None], 20),
        lambda s: selectors.coverage(together[s], w[s], 20, w[s]),
        lambda s: selectors.determinantal(kernel[s], 20, w[s]),
    ):
        assert select(slice(0, 3)).equal(torch.cat([select(slice(i, i + 1)) for i in range(3)]))


def test_zero_vectors_resemble_nothing():
    assert selectors.cosines(torch.zeros(1, 3, 4)).abs().max() == 0


def test_mean_by_owner_leaves_zero_where_nobody_came():
    means = selectors.mean_by_owner(torch.tensor([[1.0], [3.0], [5.0]]), torch.tensor([2, 2, 0]), 4)
    assert means.tolist() == [[5.0], [0.0], [2.0], [0.0]]


@pytest.mark.parametrize("k", [0, 1, 7, 11])
def test_apportioned_is_exact_and_goes_by_remainders(k: int):
    weights, room = torch.tensor([[0.5, 0.3, 0.15, 0.05], [0.1, 0.1, 0.1, 0.7]]), torch.tensor([6, 3, 2, 1])
    parts = selectors.apportioned(k * weights.double(), room, k)
    for own, weight in zip(parts.tolist(), weights.double().tolist(), strict=True):
        exact = [k * w for w in weight]
        wanted = [min(int(e + 1e-9), r) for e, r in zip(exact, room.tolist(), strict=True)]
        order = sorted(range(4), key=lambda s: (-round(exact[s] - wanted[s], 6), s))
        turn = 0
        while sum(wanted) < k:
            wanted[order[turn % 4]] += wanted[order[turn % 4]] < room[order[turn % 4]]
            turn += 1
        assert own == wanted


def test_apportioned_to_those_who_come_first():
    exact, room = torch.tensor([[1.5, 1.5, 1.0]]), torch.tensor([[4, 4, 4]])
    assert selectors.apportioned(exact, room, 4).tolist() == [[2, 1, 1]]
    assert selectors.apportioned(exact, room, 4, first=torch.tensor([[0.0, 0.0, 1.0]])).tolist() == [[1, 1, 2]]


@pytest.mark.parametrize("neighbours", [1, 3, 20])
@pytest.mark.parametrize("some", [False, True])
def test_density_peaks(neighbours: int, some: bool):
    x, there = torch.randn(14, 3, dtype=torch.double), torch.ones(14, dtype=torch.bool)
    if some:
        there[[0, 4, 13]] = False
    apart, points = torch.cdist(x, x), there.nonzero().flatten().tolist()
    density = {}
    for i in points:
        near = sorted(apart[i, j].item() for j in points)[:neighbours]
        density[i] = math.exp(-sum(d * d for d in near) / len(near))
    largest, found = (
        max(apart[i, j].item() for i in points for j in points),
        selectors.density_peaks(apart, neighbours, there),
    )
    for i in range(14):
        denser = [apart[i, j].item() for j in points if i in density and (density[j], -j) > (density[i], -i)]
        wanted = density[i] * min(denser, default=largest) if i in density else -1.0
        assert found[i].item() == pytest.approx(wanted)


@pytest.mark.parametrize("n", [5, 33, 200])
def test_what_a_gpu_computes_instead(n: int) -> None:
    """The same picks and medians, to the last bit, by other sums."""
    draw = torch.Generator().manual_seed(n)
    alike = selectors.gaussian(torch.randn(3, n, 8, generator=draw), 0.5)
    for weight in (torch.ones(3, n), torch.rand(3, n, generator=draw)):
        expected = selectors.coverage(alike, weight, n // 2)
        assert selectors.coverage_at_once(alike, weight, n // 2).equal(expected)
    apart = selectors.distances(torch.randn(3, n, 8, generator=draw)).flatten(1)
    for k in (0, (apart.shape[1] - 1) // 2, apart.shape[1] - 1):
        assert selectors.smallest(apart, k).equal(apart.sort(1).values[:, k])
    assert selectors.lower_median(apart).equal(apart.median(1).values)


def test_a_selection_is_recorded_when_its_shapes_come_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """From the third call on, once for every shape and number; the oldest graph is given up."""
    made: list[tuple[int, ...]] = []

    class Recorded:
        def __init__(self, function: Any, tensors: dict[str, Any], facts: dict[str, Any]) -> None:
            made.append((*tensors["x"].shape, facts["k"]))
            self.function, self.facts = function, facts

        def __call__(self, tensors: dict[str, Any]) -> Tensor:
            return self.function(**tensors, **self.facts)

    @replay.replayed
    def doubled(x: Tensor, k: int, more: Tensor | None = None) -> Tensor:
        return 2 * x[:k] if more is None else x[:k] + more[:k]

    monkeypatch.setattr(replay, "Recorded", Recorded)
    monkeypatch.setattr(replay, "_recorded", OrderedDict())
    monkeypatch.setattr(replay, "_calls", Counter())
    x = torch.arange(4.0)
    assert [doubled(x, 2).tolist() for _ in range(4)] == [[0.0, 2.0]] * 4
    assert made == []  # not on the host
    monkeypatch.setattr(replay, "_worthwhile", lambda tensors: True)
    monkeypatch.setattr(replay.torch.cuda, "current_stream", lambda: SimpleNamespace(device="cuda:0", cuda_stream=0))
    assert [doubled(x, 2).tolist() for _ in range(4)] == [[0.0, 2.0]] * 4
    assert made == [(4, 2)]
    assert [doubled(x, k=3, more=x).tolist() for _ in range(3)] == [[0.0, 2.0, 4.0]] * 3
    assert made == [(4, 2), (4, 3)]
    for size in range(5, 5 + replay.GRAPHS):
        for _ in range(replay.SEEN + 1):
            doubled(torch.arange(float(size)), 1)
    assert len(replay._recorded) == replay.GRAPHS
    doubled(x, 2)
    assert made[-1] != (4, 2)  # forgotten, and counted anew
