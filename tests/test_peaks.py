"""No strategy needs more memory than the unpruned host: peaks of live bytes in a model of usual proportions."""

from __future__ import annotations

import syncs

PEAKS = {  # of bytes over the unpruned host's
    **dict.fromkeys(("pixelprune", "unpad", "vprune"), 1.001),  # random pictures: nothing is dropped, places are kept
    "coreprune": 1.13,  # compares the values of all heads in fp64
}


def test_no_peak_is_above_the_unpruned_one() -> None:
    unpruned, *pruned = syncs.wide("llava")
    assert unpruned["strategy"] is None
    assert len(pruned) >= 30
    share = {row["strategy"]: row["peak_bytes"] / unpruned["peak_bytes"] for row in pruned}
    assert {name: most for name, most in share.items() if most > PEAKS.get(name, 1.0)} == {}
