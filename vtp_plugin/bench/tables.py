"""What a bench prints, from the rows of its record. A ratio is bold where no round was on the other side of 1."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

from vtp_plugin.reporting.tables import Table

Row = Mapping[str, Any]
BOLD = "A bold ratio was on one side of 1 in every round."


def timings(rows: Sequence[Row], title: str) -> Table:
    """Models that answer."""
    columns = ("strategy", "keep", "batch", "tokens", "FLOPs", "TTFT", "prefill", "realised", "of ideal", "selector")
    columns += ("break-even", "KV bytes", "peak bytes", "decode", "attach", "first call")
    table = Table(columns, title=title, caption=BOLD, keys=3)
    for row in rows:
        table.add(
            *_first(row),
            ratio(row, "ttft_ratio"),
            ratio(row, "prefill_ratio"),
            _share(row["realised"]),
            ratio(row, "over_ideal", digits=3),
            _milliseconds(row["selector"]),
            f"{row['break_even']:.0f}" if row["break_even"] is not None else "-",
            _left(row["kv_bytes"], "after", "before"),
            _left(row["peak_bytes"], "pruned", "unpruned"),
            ratio(row, "decode_ratio"),
            _milliseconds(row["attaching"]),
            f"{median(row['first']) / median(row['seconds']['pruned']):.2f}x" if row.get("first") else "all",
        )
    return table


def encoders(rows: Sequence[Row], title: str) -> Table:
    """Vision towers by themselves."""
    columns = ("strategy", "keep", "batch", "tokens", "FLOPs", "images/s", "unpruned", "speed", "realised", "of ideal")
    table = Table(columns, title=title, caption=BOLD, keys=3)
    for row in rows:
        rates = (f"{row['images_per_second'][side]:.1f}" for side in ("pruned", "unpruned"))
        speed = _bold(f"{1 / row['ttft_ratio']:.2f}x", row["spread"]["ttft_ratio"])
        table.add(*_first(row), *rates, speed, _share(row["realised"]), ratio(row, "over_ideal", digits=3))
    return table


def selectors(rows: Sequence[Row], title: str) -> Table:
    """Strategies by themselves."""
    columns = ("strategy", "stage", "tokens", "batch", "kept", "operations", "seconds", "of the prefill")
    table = Table(columns, title=title, keys=4)
    for row in rows:
        asked = str(row.get("operations", "-"))  # records from before it was counted have none
        cells = (f"{row['kept']:.0f}", asked, f"{row['seconds']:.4f}", f"{row['share']:.2%}")
        table.add(row["strategy"], row["stage"], row["tokens"], row["batch"], *cells)
    return table


def ratio(row: Row, name: str, digits: int = 2) -> str:
    """A ratio of the row; bold if its spread leaves 1 out."""
    if row[name] is None:
        return "-"
    return _bold(f"{row[name]:.{digits}f}x", row["spread"][name])


def _bold(text: str, spread: Sequence[float]) -> str:
    low, high = spread
    return text if low <= 1 <= high else f"**{text}**"


def _first(row: Row) -> tuple[Any, ...]:
    tokens = f"{row['tokens_after']:.0f}/{row['tokens_before']}"
    return (
        row["strategy"],
        f"{row['keep']:g}" if row["keep"] else "-",
        row["batch"],
        tokens,
        f"{row['flops_ratio']:.2f}x",
    )


def _left(sides: Mapping[str, float] | None, side: str, other: str) -> str:
    return f"{sides[side] / sides[other]:.2f}x" if sides else "-"


def _share(value: float | None) -> str:
    return f"{value:.0%}" if value is not None else "-"


def _milliseconds(seconds: Sequence[float]) -> str:
    return f"{median(seconds) * 1e3:.1f} ms"
