"""No pruned call holds more bytes at once than the unpruned one, whatever its selector compares."""

from __future__ import annotations

import peaks
import pytest
from matrix import dear

pytestmark = pytest.mark.long

NOTHING_TO_DROP = dict.fromkeys(("evs", "pixelprune", "unpad", "vprune"), 1.001)  # places are kept


@pytest.mark.parametrize("model", dear(peaks.MODELS, ["llava-next-7b"]))
def test_no_peak_is_above_the_unpruned_one(model: str) -> None:
    (name, unpruned), *pruned = peaks.peaks(peaks.shape(model), peaks.FEW)
    assert name is None
    assert len(pruned) >= 29
    shares = {name: most / unpruned for name, most in pruned}
    assert {name: share for name, share in shares.items() if share > NOTHING_TO_DROP.get(name, 1)} == {}
