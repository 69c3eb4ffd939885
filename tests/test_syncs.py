"""What a pruned call may ask of a device beyond the unpruned one, and that it leaves nothing there.

One family with every strategy and one of every other kind with every sixth, in turn; two prompts of unequal length
with three pictures. The full matrix: all families with all strategies, and one prompt, too.
"""

from __future__ import annotations

import math
from collections import Counter

import pytest
import syncs
from family_runs import by_kind
from matrix import dear
from pretend_hosts import LAYOUTS, STAGES, host
from syncs import COPIES, ON_HOST, OPEN, WAITS

pytestmark = pytest.mark.long

CONSTANTS = 24  # bytes of an image processor's mean and standard deviation, and 8 per patch of a tile, for its place:
# these stay as long as the strategy

FILMED = (("evs", {"keep_tokens": 9}), ("vidcom2", {"keep_tokens": 5}))
FILMED += (("flashvid", {"keep_tokens": 5, "segments": 1, "scene": -1.0, "join": 0.1}),)

WHOLE = dear(STAGES, ["llava_next"])  # families that are asked for every strategy
APART = 6  # the others: for every sixth
POSSIBLE = {"gemma4": 18}  # strategies: it pools inside the tower, and no cut is possible between its layers


@pytest.mark.parametrize("name", by_kind(STAGES))
def test_waits_copies_and_what_is_left(name: str) -> None:
    if name == "llava":
        pytest.importorskip("llava")
    layouts, turn = dear(LAYOUTS, ["batch"]), list(STAGES).index(name)
    part = slice(None) if name in WHOLE else slice(turn % APART, None, APART)
    found = list(syncs.rows(name, layouts, Counter(), part))
    unpruned = {row["layout"]: row for row in found if row["strategy"] is None}
    pruned = [row for row in found if row["strategy"]]
    assert len(pruned) >= POSSIBLE.get(name, 20) * len(layouts) // (part.step or 1)
    bad, patches = [], host(name).grid
    for row in pruned:
        before, case = unpruned[row["layout"]], (row["strategy"], row["layout"])
        waits, copies = ON_HOST.get(row["strategy"], (0, 0) if row["fixed"] else (OPEN, 0))
        more = {key: row["per_token"][key] - before["per_token"][key] for key in ("syncs", "copies")}
        if row["more"]["syncs"] > WAITS + waits * row["decisions"]:
            bad.append((*case, "waits", row["more"]["syncs"]))
        if row["more"]["copies"] > COPIES + copies * row["decisions"]:
            bad.append((*case, "copies", row["more"]["copies"]))
        if any(value > 0 for value in more.values()):
            bad.append((*case, "per token", more))
        if row["left_bytes"] > CONSTANTS + 8 * math.prod(patches):
            bad.append((*case, "bytes left", row["left_bytes"]))
    assert not bad


@pytest.mark.parametrize("name", ["qwen2_5_vl", "qwen3_vl", "llava_onevision", "llava_next_video"])
def test_methods_for_videos(name: str) -> None:
    """Of three frames: the same bits as on the CPU, and no more waits and copies than others."""
    one = host(name)
    _, unpruned = one.pretended(None, "video")
    for strategy, fields in FILMED:
        chosen = one.strategy(strategy, **fields)
        there, counts = one.pretended(chosen, "video")
        here = one.here(chosen, "video")
        assert there.kept == here.kept, strategy
        assert there.logits.equal(here.logits), strategy
        assert syncs.waits(counts) - syncs.waits(unpruned) <= WAITS, strategy
        assert counts.copies - unpruned.copies <= COPIES, strategy
