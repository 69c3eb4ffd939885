"""What all calls of a pruned model came to: tokens, FLOPs and cache, with and without pruning."""

from __future__ import annotations

from collections import Counter
from typing import Any

from vtp_plugin.metrics import counting
from vtp_plugin.surgery.call import Call
from vtp_plugin.surgery.session import Session


class Totals:
    """Listens to finished calls and keeps sums only."""

    def __init__(self, pruned: Session) -> None:
        self.pruned = pruned
        self.sums: Counter[str] = Counter()
        self.selector = 0.0  # seconds

    def foresee(self, call: Call) -> None:
        """Work out while the device is busy what a call cost, unless that needs numbers of the device."""
        if all(seen.ends is None for seen in call.seen):
            for row in _rows(call):
                counting.accounts(self.pruned, call, row)  # which the call remembers

    def add(self, call: Call) -> None:
        """One call that ended well."""
        for row in _rows(call):
            self._sample(call, row)
        self.selector += call.seconds.get("selector", 0.0)

    def _sample(self, call: Call, row: int) -> None:
        numbers = [n for n in counting.images_of(call, row) if call.images[n].counted]
        counts = [(call.images[n].total, counting.kept(call, n)) for n in numbers]
        before, after = counting.accounts(self.pruned, call, row)
        self.sums.update(
            samples=1,
            with_images=int(bool(numbers)),
            pruned=int(any(left < total for total, left in counts)),
            images=len(numbers),
            tokens_before=sum(total for total, _ in counts),
            tokens_after=sum(left for _, left in counts),
            flops_before=before.first_token,
            flops_after=after.first_token,
            cache_before=before.cache_bytes,
            cache_after=after.cache_bytes,
        )

    def entry(self) -> dict[str, Any]:
        """The sums in the words of a run's record (docs/record.md)."""
        s, images = self.sums, max(1, self.sums["images"])
        return {
            "visual_tokens": {
                "mean_before": s["tokens_before"] / images,
                "mean_after": s["tokens_after"] / images,
            },
            "samples": {"total": s["samples"], "with_images": s["with_images"], "pruned": s["pruned"]},
            "seconds": {"selector": self.selector},
            "prefill_flops": {"before": 2 * s["flops_before"], "after": 2 * s["flops_after"]},
            "kv_cache_bytes": {"before": s["cache_before"], "after": s["cache_after"]},
        }


def _rows(call: Call) -> range:
    """The samples of a call."""
    rows = max([call.rows, *(image.sample + 1 for image in call.images)])
    return range(rows if call.valid is None else len(call.valid))
