"""Greedy selections and the median as kernels of Triton: what `selectors` finds on a CUDA device, to the same bits.

One program makes all the picks of an image. What it knows of every token is in its registers, and a pick costs it one
row of the map, and `coverage_at_once` the rows of those tokens that the pick is nearer to than all before. This module
is imported where there is such a device, by `fused`; the functions are those of the same names in `selectors`.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

TILE = 2**14  # numbers of a map that are asked for at once, so that a program waits for many at a time
DIGIT = 3  # bits that one reading of all values finds
READINGS = 11  # of 31 bits
CHUNK, LOAD = 2**12, 2**23  # values that a program holds at a time; of so many it takes one time more


def farthest_points(distance: Tensor, k: int, weight: Tensor | None = None) -> Tensor:
    """Max-min diversity, [B, k]; distance [B, N, N], weight [B, N]."""
    images, n = distance.shape[:2]
    distance = distance.contiguous()
    nearest = distance.new_empty(images, n)
    weight = torch.ones_like(nearest) if weight is None else weight.contiguous()
    picks = torch.empty(images, k, dtype=torch.long, device=distance.device)
    _to_others[n, images](distance, nearest, n, **_room(n))
    _farthest[(images,)](distance, nearest, weight, picks, n, k, **_room(n))
    return picks


def herding(kernel: Tensor, picks: Tensor, k: int) -> Tensor:
    """The picks [B, M] and those that bring them to k, [B, k]; kernel [B, N, N]."""
    images, n = kernel.shape[:2]
    kernel = kernel.contiguous()
    total = kernel.sum(-1, dtype=torch.float64)
    found = picks.new_empty(images, k)
    found[:, : picks.shape[1]] = picks
    _herding[(images,)](kernel, total, found, n, picks.shape[1], k, **_room(n), ROWS=_rows(n))
    return found


def coverage_at_once(similarity: Tensor, weight: Tensor, k: int) -> Tensor:
    """Weighted facility location, [B, k]; similarity [B, N, N], symmetric and in whole steps, weight [B, N].

    What token j gains, the sum of max(0, s_ij - c_i), is kept: a pick takes away what it covers.
    """
    images, n = similarity.shape[:2]
    similarity = similarity.contiguous()
    index = torch.empty(images, n, dtype=torch.int32, device=similarity.device)  # of tokens that a pick is nearer to
    covered, whole = similarity.new_empty(images, n), similarity.sum(-1)
    picks = torch.empty(images, k, dtype=torch.long, device=similarity.device)
    given = similarity, whole, weight.contiguous(), index, covered
    _coverage[(images,)](*given, picks, n, k, **_room(n), ROWS=_rows(n))
    return picks


def smallest(values: Tensor, k: int) -> Tensor:
    """The value [B] that k of the values [B, M] of a row come before; fp32, not negative.

    Three bits at a time, the largest number that at most k of them are below.
    """
    rows, size = values.shape
    bits = values.contiguous().view(torch.int32)
    below = torch.zeros(READINGS, rows, 2**DIGIT, dtype=torch.int32, device=values.device)
    found = torch.empty(rows, dtype=torch.int32, device=values.device)
    share = CHUNK * (1 + rows * size // LOAD)
    for reading in range(READINGS):
        _count[triton.cdiv(size, share), rows](bits, below, size, share, k, rows, reading, DIGIT=DIGIT, CHUNK=CHUNK)
    _found[(rows,)](below, found, k, rows, READINGS, DIGIT=DIGIT, num_warps=1)
    return found.view(torch.float32)


def _room(n: int) -> dict[str, Any]:
    """What a program that holds n numbers takes."""
    block = max(64, triton.next_power_of_2(n))
    return {"BLOCK": block, "num_warps": min(16, max(4, block // 128))}


def _rows(n: int) -> int:
    return min(16, TILE // _room(n)["BLOCK"])


@triton.jit
def _best(gain, taken):
    """The untaken one that gains most, the lower index of equals, and one that gains no number before all others."""
    gain = tl.where(gain == gain, gain, float("inf"))
    return tl.argmax(tl.where(taken, float("-inf"), gain), 0)


@triton.jit
def _to_others(distance, nearest, n, BLOCK: tl.constexpr):
    """The distance of one point to the nearest other one."""
    row = tl.program_id(1).to(tl.int64) * n + tl.program_id(0)
    column = tl.arange(0, BLOCK)
    other = (column < n) & (column != tl.program_id(0))
    tl.store(nearest + row, tl.min(tl.load(distance + row * n + column, mask=other, other=float("inf")), 0))


@triton.jit(do_not_specialize=["k"])
def _farthest(distance, nearest, weight, picks, n, k, BLOCK: tl.constexpr):
    image = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    there = column < n
    distance += image * n * n
    state = tl.load(nearest + image * n + column, mask=there, other=0.0)
    weight = tl.load(weight + image * n + column, mask=there, other=0.0)
    taken = column >= n
    for turn in range(k):
        pick = _best(state * weight, taken)
        tl.store(picks + image * k + turn, pick)
        taken = taken | (column == pick)
        row = tl.load(distance + pick * n + column, mask=there, other=0.0)
        state = tl.where(turn == 0, row, tl.minimum(state, row))


@triton.jit(do_not_specialize=["m", "k"])
def _herding(kernel, total, picks, n, m, k, BLOCK: tl.constexpr, ROWS: tl.constexpr):
    image = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    there = column < n
    kernel += image * n * n
    picks += image * k
    near = tl.zeros([BLOCK], tl.float64)
    taken = column >= n
    for first in range(0, m, ROWS):
        turn = first + tl.arange(0, ROWS)
        pick = tl.load(picks + turn, mask=turn < m, other=-1).to(tl.int32)[:, None]
        rows = tl.load(kernel + pick * n + column[None, :], mask=(pick >= 0) & there[None, :], other=0.0)
        near += tl.sum(rows.to(tl.float64), 0)
        taken = taken | (tl.max((pick == column[None, :]).to(tl.int32), 0) > 0)
    total = tl.load(total + image * n + column, mask=there, other=0.0)
    ahead = total * (m + 1) - near * n
    for turn in range(m, k):
        pick = _best(ahead, taken)
        tl.store(picks + turn, pick)
        taken = taken | (column == pick)
        row = tl.load(kernel + pick * n + column, mask=there, other=0.0)
        ahead = ahead + total - row.to(tl.float64) * n


@triton.jit(do_not_specialize=["k"])
def _coverage(similarity, whole, weight, index, covered, picks, n, k, BLOCK: tl.constexpr, ROWS: tl.constexpr):
    image = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    there = column < n
    similarity += image * n * n
    index += image * n
    covered += image * n
    gain = tl.load(whole + image * n + column, mask=there, other=0.0)
    weight = tl.load(weight + image * n + column, mask=there, other=0.0)
    nearest = tl.zeros([BLOCK], tl.float32)
    taken = column >= n
    for turn in range(k):
        pick = _best(weight * gain, taken)
        tl.store(picks + image * k + turn, pick)
        taken = taken | (column == pick)
        own = similarity + pick * n
        near = tl.load(own + column, mask=there, other=0.0)
        nearer = near > nearest
        number = tl.sum(nearer.to(tl.int32), 0)
        tl.store(index + tl.cumsum(nearer.to(tl.int32), 0) - 1, column, mask=nearer)
        tl.store(covered + column, nearest, mask=there)
        tl.debug_barrier()  # what one thread has stored another one loads
        for first in range(0, number, ROWS):
            at = first + tl.arange(0, ROWS)
            token = tl.load(index + at, mask=at < number, other=0)[:, None]
            rows = tl.load(similarity + token * n + column[None, :], mask=there[None, :], other=0.0)
            low = tl.load(covered + token, mask=at[:, None] < number, other=0.0)
            high = tl.load(own + token, mask=at[:, None] < number, other=0.0)
            gain -= tl.sum(tl.minimum(tl.maximum(rows, low), high) - low, 0)
        nearest = tl.maximum(nearest, near)
        tl.debug_barrier()  # before the next pick is stored over this one


@triton.jit
def _lowest(reading, DIGIT: tl.constexpr):
    """The place of the lowest bit that a reading finds; the last one reads some that are found."""
    return tl.maximum(31 - DIGIT * (reading + 1), 0)


@triton.jit
def _known(below, row, k, rows, readings, DIGIT: tl.constexpr):
    """The bits that so many readings have found, of the numbers below which there are at most k."""
    digit = tl.arange(0, 2**DIGIT)
    known = 0
    for reading in range(readings):
        enough = tl.load(below + (reading * rows + row) * 2**DIGIT + digit) <= k
        known += (tl.sum(enough.to(tl.int32), 0) - 1) << _lowest(reading, DIGIT)
    return known


@triton.jit(do_not_specialize=["k", "rows", "reading"])
def _count(bits, below, size, share, k, rows, reading, DIGIT: tl.constexpr, CHUNK: tl.constexpr):
    """How many of the values lie below each number that has one more digit than is known."""
    row = tl.program_id(1)
    known, lowest = _known(below, row, k, rows, reading, DIGIT), _lowest(reading, DIGIT)
    bits += row.to(tl.int64) * size
    digit = tl.arange(0, 2**DIGIT)
    number = tl.zeros([2**DIGIT], tl.int32)
    start = tl.program_id(0) * share
    for first in range(start, tl.minimum(start + share, size), CHUNK):
        at = first + tl.arange(0, CHUNK)
        own = tl.load(bits + at, mask=at < size, other=2**31 - 1)
        for one in tl.static_range(1, 2**DIGIT):
            number += tl.where(digit == one, tl.sum((own < known + (one << lowest)).to(tl.int32), 0), 0)
    tl.atomic_add(below + (reading * rows + row) * 2**DIGIT + digit, number, mask=digit > 0)


@triton.jit(do_not_specialize=["k", "rows", "readings"])
def _found(below, found, k, rows, readings, DIGIT: tl.constexpr):
    row = tl.program_id(0)
    tl.store(found + row, _known(below, row, k, rows, readings, DIGIT))
