"""ToMe: one matching against its restatement, its schedule, and where it cannot stand."""

from __future__ import annotations

from itertools import pairwise

import families
import pytest
import reference
import slow
import torch
from models import VISION, N, picture, tiny
from torch import Tensor

import vtp_plugin as vtp
from vtp_plugin import get_strategy
from vtp_plugin.errors import PruningError


def seen_of(kind: str, n: int, dtype: torch.dtype, cls: bool, **facts):
    x, keys = slow.tokens(kind, n, dtype=dtype), slow.tokens(kind, n, d=4)
    signals = {"keys": keys, "sizes": torch.randint(1, 4, (2, n)).float(), "cls": torch.randn(2, 6) if cls else None}
    return slow.visual(x, **signals, **facts)


def restated(seen, b: int, count: int) -> tuple[list[list[float]], list[list[int]]]:
    """New rows and their members of image b, in the order of first patches."""
    cls = seen.cls is not None
    h, keys = seen.tokens[b].double(), seen.keys[b]
    groups = [[i] * int(size) for i, size in enumerate(seen.sizes[b])]  # a token of size 3 counts three times
    if cls:
        h, keys, groups = torch.cat([seen.cls[b, None].double(), h]), torch.cat([keys[:1], keys]), [[-1], *groups]
    new, groups = reference.merge_step(h, keys, groups, count, int(cls))
    pairs = sorted(zip(groups[cls:], new[cls:].tolist(), strict=True), key=lambda pair: min(pair[0]))
    return [row for _, row in pairs], [sorted(set(group)) for group, _ in pairs]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("kind", slow.INPUTS)
@pytest.mark.parametrize("cls", [True, False])
@pytest.mark.parametrize(("n", "k"), [(1, 1), (2, 1), (3, 2), (9, 5), (24, 12), (25, 20), (25, 24)])
def test_one_matching_as_described(n: int, k: int, cls: bool, kind: str, dtype: torch.dtype):
    seen = seen_of(kind, n, dtype, cls)
    selection = get_strategy("tome")(keep_tokens=k).decide(seen)
    if k == n:
        assert selection.keeps_all
        return
    for b in range(2):
        rows, groups = restated(seen, b, k)
        ours = [(selection.owner[b] == new).nonzero().flatten().tolist() for new in range(k)]
        assert selection.sources[b].tolist() == [group[0] for group in ours]
        if kind == "random":  # equal keys differ in their last bit, so that equally good pairs may be others
            assert ours == groups
        assert gain(seen.keys[b], ours, int(cls)) == pytest.approx(gain(seen.keys[b], groups, int(cls)), abs=1e-4)
        for row, group in zip(selection.tokens[b], ours, strict=True):
            size = seen.sizes[b, group].double()
            mean = (seen.tokens[b, group].double() * size[:, None]).sum(0) / size.sum()
            torch.testing.assert_close(row.double(), mean, atol=1e-5, rtol=1e-5)
        if kind == "random":
            torch.testing.assert_close(selection.tokens[b].double(), torch.tensor(rows).double(), atol=1e-5, rtol=1e-5)


def gain(keys: Tensor, groups: list[list[int]], first: int) -> float:
    """The summed similarity of what was merged, into the one member of each group that is in B."""
    rows, total = keys.double().tolist(), 0.0
    for group in (group for group in groups if len(group) > 1):
        (host,) = [i for i in group if (i + first) % 2]
        total += sum(slow.cosine(rows[i], rows[host]) for i in group if i != host)
    return total


def schedule(n: int, steps: int, **fields) -> list[int]:
    strategy, left = get_strategy("tome")(**fields), [n]
    for step in range(steps):
        seen = slow.visual(torch.zeros(1, left[-1], 2), cut=(step, steps), entered=n)
        left.append(strategy.wanted(seen))
    return left


def test_the_papers_constant_schedule():
    assert schedule(576, 24, keep_tokens=192) == list(range(576, 191, -16))


@pytest.mark.parametrize("inflection", [-1.0, -0.5, 0.0, 1.0])
@pytest.mark.parametrize(("n", "k", "steps"), [(576, 128, 23), (576, 64, 23), (576, 1, 23), (36, 10, 2), (9, 9, 3)])
def test_every_schedule_ends_at_the_budget(n: int, k: int, steps: int, inflection: float):
    left = schedule(n, steps, keep_tokens=k, inflection=inflection)
    assert left[-1] == k
    assert all(b >= a - a // 2 and b <= a for a, b in pairwise(left))


def test_inflection_moves_the_merges():
    early, late = ([a - b for a, b in pairwise(schedule(576, 24, keep_tokens=192, inflection=i))] for i in (-1.0, 1.0))
    assert early == sorted(early, reverse=True)
    assert late == sorted(late)
    assert early[0] == late[-1] == 32
    assert early[-1] == late[0] == 0


@pytest.mark.parametrize("proportional", [True, False])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@torch.no_grad()
def test_signals_are_merged_with_their_tokens(attention: str, proportional: bool):
    """CLS attention of the projected block, which merges itself, and what another method makes of it."""
    host, image = tiny("llava_hf", attention), picture(3)
    counts = [N - round((N - 18) * (step + 1) / 3) for step in range(3)]
    blocks, left = reference.merging_tower(host.tower, host.normalise([image])[0], range(N), counts, proportional)
    tome = get_strategy("tome")(keep_tokens=18, proportional=proportional)
    seen = []
    faster = get_strategy("fastervlm")(keep_tokens=6)
    object.__setattr__(faster, "select", lambda visual: seen.append(visual) or type(faster).select(faster, visual))
    with host.prune([tome, faster]):
        host.generate([[1, 5, image, 9]])
    assert seen[0].index[0].tolist() == left
    torch.testing.assert_close(seen[0].tokens[0], blocks[-2].output[1:], atol=1e-5, rtol=1e-4)
    row = blocks[-2].attention[:, 0, 1:].mean(0)  # before the block's own merge
    assert seen[0].cls_attention.shape == (1, 18)
    assert row.shape == (24,)
    assert row.min() - 1e-6 <= seen[0].cls_attention.min()
    assert seen[0].cls_attention.max() <= row.max() + 1e-6


def test_the_record_counts_every_block():
    """Block l attends over what enters it, its MLP runs on what is left behind the merge; both with the class token."""
    from vtp_plugin.reporting.record import samples_of

    host, found = tiny("llava_hf"), []
    with host.prune("tome", keep_tokens=18) as pruned:
        pruned.finished.append(lambda call: found.extend(samples_of(pruned, call)))
        host.generate([[1, 5, picture(3), 9]])
        costs = pruned.adapter.costs
    (sample,) = found
    assert sample["images"] == [{"before": N, "after": 18}]
    d, m, tower = VISION["hidden_size"], VISION["intermediate_size"], N * costs.patch
    for attends, feeds in ((36, 30), (30, 24), (24, 18), (18, 18)):  # four blocks, the last one is not projected
        tower += 4 * (attends + 1) * d * d + 2 * (attends + 1) ** 2 * d + 2 * (feeds + 1) * d * m
    language = sum(layer.macs(18 + 3) for layer in costs.layers) + costs.head
    assert sample["prefill_flops"]["after"] == 2 * (tower + 18 * sum(costs.projectors) + language)


@pytest.mark.parametrize("family", ["llava_next", "qwen2_vl", "internvl", "gemma3"])
def test_towers_that_cannot_merge_are_refused(family: str):
    model = families.FAMILIES[family].build("sdpa")
    with pytest.raises(
        PruningError, match=r"^tome: merging inside the blocks is not possible, .*; possible here: "
    ) as error:
        vtp.prune(model, "tome", processor=families.Processor())
    assert "\n" not in str(error.value)


def test_more_than_the_blocks_can_merge_is_refused():
    host = tiny("llava_hf")
    with (
        host.prune("tome", keep_tokens=2),
        pytest.raises(PruningError, match="tome: 3 blocks cannot merge 36 tokens into 2"),
    ):
        host.generate([[1, 5, picture(3), 9]])


def test_kernels_without_a_mask_are_refused_unless_attention_is_plain(monkeypatch: pytest.MonkeyPatch):
    host = tiny("llava_hf")
    monkeypatch.setattr(host.tower.config, "_attn_implementation", "flash_attention_2")
    with pytest.raises(
        PruningError, match=r"proportional attention needs a tower with eager or sdpa .* proportional=false; possible"
    ):
        host.prune("tome")
    host.prune("tome", proportional=False).detach()
