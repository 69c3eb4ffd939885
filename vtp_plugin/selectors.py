"""What several methods share: similarities, normalised scores, greedy selection, merging. All fp32, all deterministic.

Greedy selections return the picks of every image in the order in which they were made, [B, K], never one twice; ties
go to the lower index. Similarities are computed image by image, so that a batch gives the bits of its images alone.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import normalize, one_hot

from vtp_plugin.fused import TOKENS, fused
from vtp_plugin.replay import replayed
from vtp_plugin.tokens import best

MINMAX_EPS = 1e-6
BLOCK = 512  # rows of a map at a time, so that what is made on the way is smaller than the map
STEP = 2.0**-12  # of likenesses: sums over 4096 tokens are exact in fp32
DEPENDENT = 1e-5  # a candidate with less than this share of its own quality left is spanned by the picks


def minmax(values: Tensor) -> Tensor:
    """Scaled to [0, 1] per image, [B, N]; 0 where all values are equal."""
    values = values.float()
    low, high = values.amin(-1, keepdim=True), values.amax(-1, keepdim=True)
    return (values - low) / (high - low + MINMAX_EPS)


def cosines(tokens: Tensor) -> Tensor:
    """Cosine of every pair, [B, N, D] -> [B, N, N]; 0 for a zero vector."""
    unit = normalize(tokens.float(), dim=-1)
    return products(unit)


@torch.no_grad()
def products(tokens: Tensor) -> Tensor:
    """Inner product of every pair, [B, N, D] -> [B, N, N], symmetric to the last bit, so that ties are ties."""
    n = tokens.shape[1]
    found = tokens.new_empty(len(tokens), n, n)
    for one, own in zip(tokens, found, strict=True):
        torch.mm(one, one.T, out=own)
    for start in range(0, n, BLOCK):
        rows, columns = found[:, start : start + BLOCK, start:], found[:, start:, start : start + BLOCK]
        both = (rows + columns.mT).div_(2)
        rows.copy_(both)
        columns.copy_(both.mT)
    return found


def mask(picks: Tensor, n: int) -> Tensor:
    """Picks [B, K] as a mask [B, n]."""
    return torch.zeros(len(picks), n, dtype=torch.bool, device=picks.device).scatter_(1, picks, True)


def greedy(gain: Callable[[], Tensor], pick: Callable[[Tensor], None], taken: Tensor, k: int) -> Tensor:
    """k times the untaken candidate of the largest gain() [B, N]; pick(its index [B]) tells the method. -> [B, k]

    `taken` [B, N] bool is what nobody may pick; it is updated in place.
    """
    picks = []
    for _ in range(k):
        best = gain().masked_fill(taken, float("-inf")).argmax(-1)
        taken.scatter_(1, best[:, None], True)
        pick(best)
        picks.append(best)
    return torch.stack(picks, dim=1)


def centred(tokens: Tensor) -> Tensor:
    """Tokens [B, N, D] minus the mean of their image, fp32."""
    return torch.stack([one - one.mean(0) for one in tokens.float()])


def distances(tokens: Tensor) -> Tensor:
    """Squared Euclidean distance of every pair, [B, N, D] -> [B, N, N]."""
    inner = products(tokens.float())
    sizes = inner.diagonal(dim1=1, dim2=2)
    return (sizes[:, :, None] + sizes[:, None]).sub_(inner, alpha=2).clamp_(min=0)


@fused(TOKENS)
@replayed
def farthest_points(distance: Tensor, k: int, weight: Tensor | None = None) -> Tensor:
    """Max-min diversity: repeatedly the largest weight_j min over picks d_sj; distance [B, N, N], weight [B, N].

    The first pick has the farthest nearest neighbour; no weight counts every token alike.
    """
    nearest = _to_others(distance)
    weight = torch.ones_like(nearest) if weight is None else weight
    first = (nearest * weight).argmax(-1)
    taken, rows = mask(first[:, None], nearest.shape[1]), torch.arange(len(first), device=first.device)
    state = distance[rows, first]  # [B, N]: to the nearest pick

    def pick(best: Tensor) -> None:
        torch.minimum(state, distance[rows, best], out=state)

    rest = greedy(lambda: state * weight, pick, taken, k - 1) if k > 1 else first[:, None][:, :0]
    return torch.cat([first[:, None], rest], dim=1)


def _to_others(distance: Tensor) -> Tensor:
    """The distance [B, N, N] of every point to the nearest other one, [B, N]; inf for a point alone."""
    itself = distance.diagonal(dim1=1, dim2=2)  # set aside for as long as it takes: no second map
    own = itself.clone()
    itself.fill_(float("inf"))
    nearest = distance.amin(-1)
    itself.copy_(own)
    return nearest


@fused(TOKENS)
@replayed
def herding(kernel: Tensor, picks: Tensor, k: int) -> Tensor:
    """Add to the picks [B, M] until there are k [B, k], each time argmax_j (M + 1) mean_i k_ij - sum over picks k_sj.

    Kernel herding (arXiv 1203.3472, equation 8) with kernel [B, N, N]: what is picked is distributed as all are.
    """
    if picks.shape[1] == k:
        return picks
    n, rows = kernel.shape[1], torch.arange(len(picks), device=picks.device)
    total = kernel.sum(-1, dtype=torch.float64)  # [B, N]: n times the mean, exact where the kernel has steps
    near = torch.stack([one[own].sum(0, dtype=torch.float64) for one, own in zip(kernel, picks, strict=True)])
    ahead = total * (1 + picks.shape[1]) - n * near

    def pick(best: Tensor) -> None:
        ahead.add_(total).sub_(kernel[rows, best], alpha=n)

    return torch.cat([picks, greedy(lambda: ahead, pick, mask(picks, n), k - picks.shape[1])], dim=1)


def gaussian(tokens: Tensor, scale: float) -> Tensor:
    """exp(-d^2 / (scale x median d^2)) of every pair, [B, N, D] -> [B, N, N]; the median over all pairs of an image.

    What lies far from everything, such as the few patches of a ViT with huge norms, moves no median. In steps of 2^-12:
    two tokens that resemble only each other gain `coverage` equally much, and sums that are exact keep this a tie.
    """
    apart = distances(centred(tokens))
    typical = lower_median(apart.flatten(1))[:, None, None]
    alike = apart.div_(-scale * typical.clamp(min=torch.finfo(apart.dtype).tiny)).exp_()
    return alike.div_(STEP).round_().mul_(STEP)


def lower_median(values: Tensor) -> Tensor:
    """The median [B] of values [B, M] that are not negative, the smaller one of two."""
    if not values.is_cuda:
        return values.median(1).values
    return smallest(values, (values.shape[1] - 1) // 2)  # torch searches a row with one of a hundred multiprocessors


@fused(2**30)
@replayed
def smallest(values: Tensor, k: int) -> Tensor:
    """The value [B] that k of the values [B, M] of a row come before; fp32, not negative.

    Bit by bit, the largest number that at most k of them are below: bits of such numbers are ordered as they are.
    """
    bits = values.view(torch.int32)
    found = torch.zeros(len(values), 1, dtype=torch.int32, device=values.device)
    for bit in range(30, -1, -1):
        more = found | 1 << bit
        found = torch.where((bits < more).sum(1, keepdim=True) <= k, more, found)
    return found.view(torch.float32)[:, 0]


def stepped_coverage(similarity: Tensor, weight: Tensor, k: int) -> Tensor:
    """`coverage` of likenesses [B, N, N] in whole steps, whose sums are exact in any order."""
    return (coverage_at_once if similarity.is_cuda else coverage)(similarity, weight, k)


@fused(TOKENS)
@replayed
def coverage_at_once(similarity: Tensor, weight: Tensor, k: int) -> Tensor:
    """The same, reading the likenesses once a pick: what a GPU waits for is memory.

    sum_i max(0, s_ij - c_i) is half of sum_i s_ij - sum_i c_i + sum_i |s_ij - c_i|.
    """
    whole, half = similarity.sum(-1), weight / 2

    def gain(covered: Tensor) -> Tensor:
        apart = torch.cdist(similarity, covered[:, None], p=1)[..., 0]  # [B, N]
        return half * (whole - covered.sum(-1, keepdim=True) + apart)

    return _covering(similarity, gain, k)


def _covering(similarity: Tensor, gain: Callable[[Tensor], Tensor], k: int) -> Tensor:
    """k greedy picks [B, k] by gain(covered) [B, N]; covered [B, N] is the likeness to the nearest pick, 0 at first."""
    covered = torch.zeros_like(similarity[..., 0])
    rows = torch.arange(len(covered), device=covered.device)

    def pick(best: Tensor) -> None:
        torch.maximum(covered, similarity[rows, best], out=covered)

    return greedy(lambda: gain(covered), pick, torch.zeros_like(covered, dtype=torch.bool), k)


@replayed
def coverage(
    similarity: Tensor, weight: Tensor, k: int, demand: Tensor | None = None, bonus: Tensor | None = None
) -> Tensor:
    """Weighted facility location: gain_j = bonus_j + weight_j sum_i demand_i max(0, sim_ij - covered_i), from 0 on.

    similarity [B, N, N], weight, demand and bonus [B, N]; no demand counts every token once, no bonus is 0.
    """
    more = torch.empty_like(similarity)

    def gain(covered: Tensor) -> Tensor:
        torch.sub(similarity, covered[:, None], out=more).clamp_(min=0)  # [B, j, i]
        total = more.sum(-1) if demand is None else torch.stack([m @ d for m, d in zip(more, demand, strict=True)])
        return weight * total if bonus is None else bonus + weight * total

    return _covering(similarity, gain, k)


@replayed
def determinantal(kernel: Tensor, k: int, fallback: Tensor) -> Tensor:
    """Greedy MAP of a determinantal point process with kernel [B, N, N], by the Cholesky recursion.

    Once no candidate is independent of the picks (k > rank), the rest is picked by the highest `fallback` [B, N].
    """
    quality = kernel.diagonal(dim1=1, dim2=2)
    left = quality.clone()  # [B, N]: what the picks do not span yet
    factor = kernel.new_zeros(len(kernel), k, kernel.shape[1])
    rows, step = torch.arange(len(kernel), device=kernel.device), iter(range(k))
    taken = torch.zeros_like(left, dtype=torch.bool)
    last = fallback - fallback.amax(-1, keepdim=True) - 1  # below every real gain
    floor = (DEPENDENT * quality).clamp(min=0)  # of what is independent of the picks

    def pick(best: Tensor) -> None:
        t, (own, least) = next(step), torch.stack([left, floor])[:, rows, best, None].unbind()  # [B, 1] each
        row = kernel[rows, best]
        if t:
            row = row - (factor[rows, None, :t, best] @ factor[:, :t])[:, 0]
        row = row * (own > least) / own.clamp(min=1e-30).sqrt_()
        factor[:, t] = row
        left.sub_(row.square_())

    return greedy(lambda: torch.where(left > floor, left, last), pick, taken, k)


def mean_by_owner(tokens: Tensor, owner: Tensor, number: int) -> Tensor:
    """Mean of the tokens [..., N, D] of each of M = `number` owners [..., N], zero for one with none: [..., M, D]."""
    member = one_hot(owner, number).to(tokens.dtype)  # [..., N, M]; a product: index_add_ is random on CUDA
    return member.mT @ tokens / member.sum(-2).clamp(min=1)[..., None]


def apportioned(exact: Tensor, room: Tensor, k: int, first: Tensor | None = None) -> Tensor:
    """k in whole parts like `exact` [B, S] (together at most k), none above its `room` [S] or [B, S]; [B, S] long.

    What rounding down leaves over goes round: one to each with room, the largest `first` first, which are the
    remainders by default (alike to six digits: the earlier), until nothing is left.
    """
    given = (exact + 1e-9).long().minimum(room)
    first = ((exact - given) * 1e6).round() if first is None else first
    rounds = torch.arange(k + 1, device=exact.device)[:, None]
    after = (given[:, None] + rounds).minimum(room[..., None, :])  # [B, rounds, S]
    done = ((after.sum(2) <= k).sum(1) - 1).clamp(min=0)
    given = after[torch.arange(len(exact), device=exact.device), done]
    order = best(first, exact.shape[1])
    open_ = (given < room).gather(1, order)
    more = open_ & (open_.cumsum(1) <= k - given.sum(1, keepdim=True))
    return given.scatter_add(1, order, more.long())


def density_peaks(distance: Tensor, neighbours: int, there: Tensor | None = None) -> Tensor:
    """How much every point is a centre (DPC-kNN), [N]; distance [N, N], -1 for those that are not `there` [N] bool.

    Density = exp(-mean of d^2 to the nearest points, itself included); separation = distance to the nearest denser one
    (the largest distance for the densest); of two equally dense points the earlier counts as denser. Their product.
    """
    order = torch.arange(len(distance), device=distance.device)
    there = torch.ones_like(order, dtype=torch.bool) if there is None else there
    away = distance.masked_fill(~there, float("inf"))
    near = away.topk(min(neighbours, len(order)), largest=False).values
    found = near.isfinite()
    density = (-near.square().masked_fill(~found, 0).sum(-1) / found.sum(-1).clamp(min=1)).exp()
    earlier = (density[None] == density[:, None]) & (order[None] < order[:, None])
    denser = ((density[None] > density[:, None]) | earlier) & there  # [i, j]: j is denser than i
    separation = distance.masked_fill(~denser, float("inf")).amin(-1)
    largest = distance.masked_fill(~(there & there[:, None]), 0).max()
    separation = torch.where(denser.any(-1), separation, largest)
    return (density * separation).masked_fill(~there, -1)


def strip_counts(grid: tuple[int, int], k: int) -> list[int]:
    """k cells in strips over a grid, so that a cell is about as wide as high: cells per strip, differing by one."""
    strips = min(k, max(1, round((k * grid[0] / grid[1]) ** 0.5)))
    return [(strip + 1) * k // strips - strip * k // strips for strip in range(strips)]
