"""How far off a plan is: beside records of `vtp bench`, ratio by ratio."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vtp_plugin import config, files, plugins
from vtp_plugin.errors import PruningError
from vtp_plugin.hosts.transformers.architectures import QUESTION_TOKENS
from vtp_plugin.hosts.transformers.shapes import SHAPES
from vtp_plugin.plan.cards import CARDS, Card, known_as
from vtp_plugin.plan.pages import planned
from vtp_plugin.plan.roofline import Roof
from vtp_plugin.plan.work import Model, pruned, unpruned
from vtp_plugin.reporting.tables import Table

ANY = CARDS["a100"]  # for a processor that is in no table: ratios of arithmetic depend on no rate


@dataclass(frozen=True)
class Compared:
    """One row of a record beside the plan: seconds of the unpruned model, and pruned over unpruned."""

    shape: str
    strategy: str
    keep: float | None
    batch: int
    measured: float
    planned: float
    measured_seconds: float
    planned_seconds: float | None  # None: the device is not known

    @property
    def off(self) -> float:
        """The plan's ratio over the measured one, less one."""
        return self.planned / self.measured - 1


def compared(record: Path, card: Card | None = None) -> list[Compared]:
    """Every row of a record that the plan can foretell, on the card that made it or one that was probed."""
    read = _read(record)
    rows, shape, dtype = read["timings"], read["shape"], read["dtype"]
    if shape not in SHAPES or not SHAPES[shape].decodes:
        raise PruningError(f"{record} is of '{shape}', which is no shape of a model that answers")
    try:
        model, known = planned(shape, read["layers"]), card or known_as(read["device"])
        return [_row(model, row, known, dtype) for row in rows if row["strategy"] in plugins.strategies()]
    except (LookupError, TypeError, AttributeError, ZeroDivisionError) as error:
        said = f"{type(error).__name__}: {error}"
        raise PruningError(f"{record} is a record of vtp bench that cannot be read ({said})") from None


def dtype_of(record: Path) -> str:
    """What the model of a record computed in, which a device has to be probed in."""
    return str(_read(record)["dtype"])


def _read(record: Path) -> dict[str, Any]:
    """A record of `vtp bench`; PruningError for any other file."""
    if not record.exists():
        raise PruningError(f"file not found: {record}")
    read = files.read_json(record)
    kinds = {"timings": list, "shape": str, "dtype": str, "layers": int, "device": str}
    if all(isinstance(read.get(name), kind) for name, kind in kinds.items()):
        return read
    raise PruningError(f"{record} is not a record of vtp bench")


def _row(model: Model, row: dict[str, Any], card: Card | None, dtype: str) -> Compared:
    fields = row.get("config") or ({} if row["keep"] is None else {"keep_ratio": row["keep"]})
    chosen = [config.build(row["strategy"], dict(fields))]
    share = row["tokens_after"] / row["tokens_before"]
    roofs = [
        Roof(model, work, card or ANY, dtype, 1)
        for work in (
            unpruned(model, 1, QUESTION_TOKENS),
            pruned(model, chosen, 1, QUESTION_TOKENS, share),
        )
    ]
    whole, cut = (roof.ttft(row["batch"]) for roof in roofs)
    took = sorted(row["seconds"]["unpruned"])[len(row["seconds"]["unpruned"]) // 2]
    return Compared(
        shape=model.name,
        strategy=row["strategy"],
        keep=row["keep"],
        batch=row["batch"],
        measured=row["ttft_ratio"],
        planned=cut / whole,
        measured_seconds=took,
        planned_seconds=whole if card else None,
    )


def error_table(rows: Sequence[Compared]) -> Table:
    """Planned beside measured; the caption says the worst."""
    worst = max((abs(row.off) for row in rows), default=0.0)
    columns = ("shape", "strategy", "keep", "batch", "TTFT planned", "measured", "off", "unpruned planned", "measured")
    table = Table(columns, caption=f"The plan's TTFT ratio is at most {worst:.0%} off the measured one.")
    for row in rows:
        keep = f"{row.keep:g}" if row.keep else "-"
        seconds = "-" if row.planned_seconds is None else f"{row.planned_seconds * 1e3:.0f} ms"
        ratios = (f"{row.planned:.2f}x", f"{row.measured:.2f}x", f"{row.off:+.0%}")
        table.add(row.shape, row.strategy, keep, row.batch, *ratios, seconds, f"{row.measured_seconds * 1e3:.0f} ms")
    return table
