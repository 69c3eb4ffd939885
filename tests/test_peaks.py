"""No pruned call holds more bytes at once than the unpruned one, whatever its selector compares.

Of methods that compare the same things one stands for the others; the full matrix has all, on three models.
"""

from __future__ import annotations

import peaks
import pytest
from matrix import dear

from vtp_plugin import plugins

pytestmark = pytest.mark.long

TELLING = ["atp", "cdpruner", "coreprune", "evs", "fastv", "fitprune", "l2", "mmtok", "prumerge", "scope", "tome"]
TELLING += ["visionzip", "vprune", "vtp"]
STRATEGIES = dear(plugins.strategies(), TELLING)
VIDEOS_ONLY, CLASS_TOKEN_OF_AN_IMAGE = {"evs", "flashvid", "vidcom2"}, {"prumerge", "prumerge_plus"}
REFUSED = {  # "tome" where the tower's tokens are arranged by their places
    "llava-1.5-7b": VIDEOS_ONLY,
    "llava-next-7b": VIDEOS_ONLY | CLASS_TOKEN_OF_AN_IMAGE | {"tome"},
    "qwen2.5-vl-7b": CLASS_TOKEN_OF_AN_IMAGE | {"tome"},
}
NOTHING_TO_DROP = dict.fromkeys(("evs", "pixelprune", "unpad", "vprune"), 1.001)  # places are kept


@pytest.mark.parametrize("model", dear(peaks.MODELS, ["llava-next-7b"]))
def test_no_peak_is_above_the_unpruned_one(model: str) -> None:
    (name, unpruned), *pruned = peaks.peaks(peaks.shape(model), peaks.FEW, STRATEGIES)
    assert name is None
    assert {name for name, _ in pruned} == {*STRATEGIES} - REFUSED[model]
    shares = {name: most / unpruned for name, most in pruned}
    assert {name: share for name, share in shares.items() if share > NOTHING_TO_DROP.get(name, 1)} == {}
