"""The declarations as the table in docs/add-a-strategy.md."""

from __future__ import annotations

from vtp_plugin.signals.declaration import everything

BEGIN, END = (
    "<!-- signals: made by `python -m vtp_plugin.signals.table docs/add-a-strategy.md` -->",
    "<!-- /signals -->",
)
PLACES = {"MergingView": "vit, inside the blocks"}


def table() -> str:
    """One row per signal and place, in the order in which one image passes them."""
    rows = ["| signal | stage | shape and meaning |", "| --- | --- | --- |"]
    for one in everything():
        place = PLACES.get(one.view.__name__, one.view.stage.value)
        rows.append(f"| `{one.name}` | {place} | {one.meaning} |")
    return "\n".join(rows)


def written(page: str) -> str:
    """The page with the table between its marks."""
    before, _, rest = page.partition(BEGIN)
    return f"{before}{BEGIN}\n\n{table()}\n\n{END}{rest.partition(END)[2]}"


if __name__ == "__main__":
    import sys
    from pathlib import Path

    for page in map(Path, sys.argv[1:]):
        page.write_text(written(page.read_text()))
