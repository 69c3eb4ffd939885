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
NOTHING_TO_DROP = dict.fromkeys(("evs", "pixelprune", "unpad", "vprune"), 1.001)  # places are kept


@pytest.mark.parametrize("model", dear(peaks.MODELS, ["llava-next-7b"]))
def test_no_peak_is_above_the_unpruned_one(model: str) -> None:
    (name, unpruned), *pruned = peaks.peaks(peaks.shape(model), peaks.FEW, STRATEGIES)
    assert name is None
    assert len(pruned) >= len(STRATEGIES) - 3
    shares = {name: most / unpruned for name, most in pruned}
    assert {name: share for name, share in shares.items() if share > NOTHING_TO_DROP.get(name, 1)} == {}
