"""CoRePrune's second stage against attention outputs that are computed anew for every set."""

from __future__ import annotations

import pytest
import slow
import torch
from torch import Tensor

from vtp_plugin import VisualTokens, get_strategy


def outputs_without(attention: Tensor, values: Tensor, gone: list[int]) -> Tensor:
    """Attention [H, T, L] over all columns, values [H, L, d], renormalised without some columns: [H, T, d]."""
    left = attention.clone()
    left[..., gone] = 0
    return (left / left.sum(-1, keepdim=True)) @ values


def movement(attention: Tensor, values: Tensor, gone: list[int]) -> float:
    """The mean distance over heads and receivers between outputs with and without some columns."""
    moved = outputs_without(attention, values, gone) - outputs_without(attention, values, [])
    return moved.norm(dim=-1).mean().item()


def restated(attention: Tensor, values: Tensor, n: int, k: int, step: int) -> list[int]:
    """The image's tokens are the first n columns."""
    kept: list[int] = []
    while len(kept) < k:
        gone = [i for i in range(n) if i not in kept]
        after = {i: movement(attention, values, [j for j in gone if j != i]) for i in gone}
        kept += sorted(gone, key=lambda i: (after[i], i))[: min(step, k - len(kept))]
    return sorted(kept)


def seen_by(n: int, others: int = 4) -> tuple[VisualTokens, Tensor, Tensor]:
    """What the strategy sees of whole attention rows over n visual tokens and some others, and these rows."""
    attention = (2 * torch.randn(2, 3, 5, n + others)).softmax(-1)
    values = torch.randn(2, 3, n + others, 6)
    signals = {"head_attention": attention[..., :n], "values": values[:, :, :n], "outputs": attention @ values}
    return slow.visual(torch.zeros(2, n, 3), **signals), attention.double(), values.double()


@pytest.mark.parametrize("step", [1, 4, 50])
@pytest.mark.parametrize(("n", "k"), [(2, 1), (12, 1), (12, 6), (12, 11)])
def test_as_described(n: int, k: int, step: int):
    seen, attention, values = seen_by(n)
    kept = get_strategy("coreprune")(keep_tokens=k, step=step).decide(seen)
    assert slow.columns(kept) == [restated(attention[b], values[b], n, k, step) for b in range(2)]


def test_what_carries_the_answer_is_rescued_first():
    """One token holds all of the attention, with a value that nobody else has."""
    attention = torch.full((1, 1, 1, 9), 0.01)
    attention[..., 5] = 0.92
    values = torch.zeros(1, 1, 9, 4)
    values[0, 0, 5] = 1
    signals = {"head_attention": attention[..., :8], "values": values[:, :, :8], "outputs": attention @ values}
    kept = get_strategy("coreprune")(keep_tokens=1).decide(slow.visual(torch.zeros(1, 8, 3), **signals))
    assert slow.columns(kept) == [[5]]


def test_receivers_that_see_nothing_else_are_finite():
    attention = torch.randn(1, 2, 3, 8).softmax(-1)
    values = torch.randn(1, 2, 8, 4)
    seen = slow.visual(torch.zeros(1, 8, 3), head_attention=attention, values=values, outputs=attention @ values)
    slow.check_exact(get_strategy("coreprune")(keep_tokens=5, step=2).decide(seen), 8, 5)


@pytest.mark.parametrize(("depth", "layer"), [(32, 8), (28, 7), (8, 2), (3, 1)])
def test_it_cuts_at_a_quarter_of_any_depth_unless_told_where(depth: int, layer: int):
    assert get_strategy("coreprune")().cut_layers(depth) == (layer,)
    assert get_strategy("coreprune")(layer=2).cut_layers(depth) == (2,)
