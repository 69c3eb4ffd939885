"""What every strategy asks of a device, counted on the pretend one: `PYTHONPATH=.:tests python tests/syncs.py [FILE]`.

Writes one row per family, strategy and layout, beside the unpruned host's: waits, copies and kernels of one `generate`
(attaching left out), how many of them belong to a decoded token, the peak of live bytes above what was alive before
the call, and what is left of it. `places` sums up which lines wait or copy more often than in the unpruned host.
`wide` has the peaks of models that are wide enough for a picture to matter less than a layer: see `peaks`.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from paths import ROOT
from peaks import MODELS, peaks, shape
from pretend import Counts
from pretend_hosts import LAYOUTS, STAGES, Host, host

from vtp_plugin import PruningStrategy, Stage, plugins
from vtp_plugin.reporting.tables import Table

FIELDS = {  # what tiny models can spend
    "visionzip": {"dominant": 3, "contextual": 2},
    "fitprune": {"keep_ratio": 0.6},
    "prumerge_plus": {"keep_ratio": 0.4},
    "hiprune": {"shallow": 1},
    "vscan": {"shallow": 1},
}
WAITS, COPIES = 4, 6  # more than the unpruned host, per call
OPEN = 2  # waits more for every cut of a picture whose number of tokens only the device knows
ON_HOST = {  # what works on the host, picture by picture: waits and copies more for each
    "prunesid": (1, 1),  # walks through its groups token by token
    "random": (0, 1),  # draws there, so that a seed keeps the same tokens on every device
}
NEW = 4
HOSTS_OWN = "transformers.masking_utils"  # asks about padding where a prompt is shorter than a window, pruned or not
DEFAULT = ROOT / "docs" / "results" / "syncs.json"


def measured(one: Host, strategy: PruningStrategy | None, layout: str) -> tuple[dict[str, Any], Counts]:
    """One row; decoding is what happens between the passes of the last tokens."""
    marks: list[tuple[int, int, int]] = []

    def numbers(counts: Counts) -> tuple[int, int, int]:
        return waits(counts), counts.copies, counts.kernels

    def mark(module: Any, args: Any) -> None:
        if args[0].shape[-1] == 1:
            marks.append(numbers(one.device.counts))

    handle = one.there.get_input_embeddings().register_forward_pre_hook(mark)
    try:
        answer, counts = one.pretended(strategy, layout, NEW)
    finally:
        handle.remove()
    steps = len(marks) - 1
    row: dict[str, Any] = dict(zip(("syncs", "copies", "kernels"), numbers(counts), strict=True))
    per_token = [(last - first) / steps for first, last in zip(marks[0], marks[-1], strict=True)]
    row["per_token"] = dict(zip(("syncs", "copies", "kernels"), per_token, strict=True))
    row["peak_bytes"] = counts.peak_bytes - counts.before_bytes
    row["left_bytes"], row["decisions"] = counts.left_bytes, len(answer.kept)
    return row, counts


def waits(counts: Counts) -> int:
    """Waits of the host for the device, without those of its own masks."""
    return sum(number for place, number in counts.waits.items() if HOSTS_OWN not in place)


def rows(
    name: str, layouts: Sequence[str], places: Counter[str], part: slice = slice(None)
) -> Iterator[dict[str, Any]]:
    """The unpruned host and a part of the strategies that the family can run."""
    one = host(name)
    for layout in layouts:
        unpruned, seen = measured(one, None, layout)
        yield {"family": name, "strategy": None, "layout": layout} | unpruned
        for strategy in chosen(one, part):
            row, counts = measured(one, strategy, layout)
            places.update(counts.waits + counts.copied - seen.waits - seen.copied)
            more = {n: row[n] - unpruned[n] for n in ("syncs", "copies", "kernels", "peak_bytes")}
            facts = {"family": name, "strategy": strategy.name, "layout": layout, "fixed": strategy.budgeted}
            yield facts | row | {"more": more}


def chosen(one: Host, part: slice) -> list[PruningStrategy]:
    """Of a part of the strategies those that the family can run, Qwen3-VL's cuts behind the layers that take visual
    features up."""
    every, first = [], max(2, one.first_cut)
    for name, cls in plugins.strategies().items():
        late = cls.stage is Stage.LLM and "layer" in cls.fields()
        every.append(one.strategy(name, **FIELDS.get(name, {}) | ({"layer": first} if late else {})))
    return [strategy for strategy in every[part] if not one.lacks(strategy)]


def page(record: dict[str, Any]) -> str:
    """The most that any family asks for, a strategy a row, in Markdown."""
    columns = ("strategy", "waits", "copies", "kernels", "waits per token")
    table = Table([*columns, *(f"peak, {name}" for name in MODELS.values())])
    found = [row for row in record["rows"] if row["strategy"]]
    for name in sorted({row["strategy"] for row in found}):
        rows = [row for row in found if row["strategy"] == name]
        most = [max(row["more"][key] for row in rows) for key in ("syncs", "copies", "kernels")]
        token = max(_per_token(row, record["rows"]) for row in rows)
        shares = [_share(record["wide"], model, name) for model in MODELS]
        table.add(name, *(f"{number:+d}" for number in most), f"{token:+g}", *shares)
    sizes = ", ".join(f"{shape(model).tokens}" for model in MODELS)
    table.caption = (
        "More than the unpruned host in one call, the most of all families, with one prompt of one picture and with "
        "two of three; kernels are those of tiny models, selectors included. Waits of the host's own masks are left "
        "out on both sides. Peak: of live bytes over the unpruned one's, at a quarter of the width and half of the "
        f"depth of the 7B models, whose pictures are as large as they are ({sizes} tokens)."
    )
    return f"# What a pruned call asks of a device\n\n{table.markdown()}\n"


def _per_token(row: dict[str, Any], rows: list[dict[str, Any]]) -> float:
    """Waits per decoded token more than the unpruned host's."""
    same = [one for one in rows if not one["strategy"] and all(one[key] == row[key] for key in ("family", "layout"))]
    return row["per_token"]["syncs"] - same[0]["per_token"]["syncs"]


def _share(wide: list[dict[str, Any]], model: str, strategy: str) -> str:
    found = {row["strategy"]: row["peak_bytes"] for row in wide if row["model"] == model}
    return f"{found[strategy] / found[None]:.2f}x" if strategy in found else "-"


def main(target: Path) -> None:
    torch.set_num_threads(1)
    places: Counter[str] = Counter()
    found = []
    for name in STAGES:
        found += rows(name, LAYOUTS, places)
        print(f"{name}: {len(found)} rows", file=sys.stderr)
    wide = [
        {"model": model, "strategy": strategy, "peak_bytes": most}
        for model in MODELS
        for strategy, most in peaks(shape(model))
    ]
    versions = {"torch": torch.__version__, "transformers": __import__("transformers").__version__}
    record = {"versions": versions, "new_tokens": NEW, "rows": found, "wide": wide}
    target.write_text(json.dumps(record | {"places": dict(places.most_common(60))}, indent=1) + "\n")
    target.with_suffix(".md").write_text(page(record))


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else DEFAULT)
