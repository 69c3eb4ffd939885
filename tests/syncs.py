"""What every strategy asks of a device, counted on the pretend one: `PYTHONPATH=.:tests python tests/syncs.py [FILE]`.

Writes one row per family, strategy and layout, beside the unpruned host's: waits, copies and kernels of one `generate`
(attaching left out), how many of them belong to a decoded token, and the peak of live bytes above what was alive before
the call. `places` sums up which lines wait or copy more often than in the unpruned host.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from paths import ROOT
from pretend import Counts
from pretend_hosts import LAYOUTS, Host, host

from vtp_plugin import PruningStrategy, plugins

FAMILIES = ("llava_hf", "llava", "llava_next", "qwen2_5_vl", "qwen3_vl")
FIELDS = {  # what tiny models can spend
    "visionzip": {"dominant": 3, "contextual": 2},
    "fitprune": {"keep_ratio": 0.6},
    "prumerge_plus": {"keep_ratio": 0.4},
}
NEW = 4
DEFAULT = ROOT / "docs" / "results" / "syncs.json"


def measured(one: Host, strategy: PruningStrategy | None, layout: str) -> tuple[dict[str, Any], Counts]:
    """One row; decoding is what happens between the passes of the last tokens."""
    marks: list[tuple[int, int, int]] = []

    def mark(module: Any, args: Any) -> None:
        if args[0].shape[-1] == 1:
            counts = one.device.counts
            marks.append((counts.syncs, counts.copies, counts.kernels))

    handle = one.there.get_input_embeddings().register_forward_pre_hook(mark)
    try:
        _, counts = one.pretended(strategy, layout, NEW)
    finally:
        handle.remove()
    steps = len(marks) - 1
    per_token = [(last - first) / steps for first, last in zip(marks[0], marks[-1], strict=True)]
    row = {"syncs": counts.syncs, "copies": counts.copies, "kernels": counts.kernels}
    row["per_token"] = dict(zip(row, per_token, strict=True))
    row["peak_bytes"] = counts.peak_bytes - counts.before_bytes
    return row, counts


def rows(name: str, places: Counter[str]) -> Iterator[dict[str, Any]]:
    one = host(name)
    for layout in LAYOUTS:
        unpruned, seen = measured(one, None, layout)
        yield {"family": name, "strategy": None, "layout": layout} | unpruned
        for strategy in chosen(one):
            row, counts = measured(one, strategy, layout)
            places.update(counts.waits + counts.copied - seen.waits - seen.copied)
            more = {n: row[n] - unpruned[n] for n in ("syncs", "copies", "kernels", "peak_bytes")}
            yield {"family": name, "strategy": strategy.name, "layout": layout} | row | {"more": more}


def chosen(one: Host) -> list[PruningStrategy]:
    every = [one.strategy(name, **FIELDS.get(name, {})) for name in plugins.strategies()]
    return [strategy for strategy in every if not one.lacks(strategy)]


def main(target: Path) -> None:
    torch.set_num_threads(1)
    places: Counter[str] = Counter()
    found = []
    for name in FAMILIES:
        found += rows(name, places)
        print(f"{name}: {len(found)} rows", file=sys.stderr)
    versions = {"torch": torch.__version__, "transformers": __import__("transformers").__version__}
    record = {"versions": versions, "new_tokens": NEW, "rows": found, "places": dict(places.most_common(60))}
    target.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else DEFAULT)
