"""Operations of every strategy at a quarter of the tokens: `python -m vtp_plugin.bench.selector_operations`.

Writes the record and its page.

Counted on signals of real width, batch 1; milliseconds beside them come from the record of `vtp bench --selectors`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from vtp_plugin import config, files, plugins
from vtp_plugin.bench.operations import operations
from vtp_plugin.bench.selectors import TOKENS
from vtp_plugin.reporting.record import versions
from vtp_plugin.reporting.tables import Table
from vtp_plugin.samples import REAL, run, sample

FOLDER = Path("docs/results")
KEEP = 0.25
COMMAND = "python -m vtp_plugin.bench.selector_operations"


def counted(name: str, n: int) -> dict[str, Any]:
    """One strategy on n tokens of one image: what is kept and how many operations that takes."""
    strategy = config.build(name, {"keep_ratio": KEEP} if plugins.get_strategy(name).budgeted else {})
    seen = sample(strategy, n, b=1, widths=REAL, device=torch.device("cpu"))
    kept = sum(run(strategy, seen)[-1].counts)
    return {"strategy": name, "tokens": n, "kept": kept, "operations": operations(lambda: run(strategy, seen))}


def page(record: dict[str, Any], timed: dict[str, Any]) -> str:
    """The table in Markdown, a strategy a row."""
    times = {(row["strategy"], row["tokens"], round(row["kept"])): row for row in timed["timings"]}
    columns = [f"{what}, {n} tokens" for n in TOKENS for what in ("operations", "ms", "of the prefill")]
    table = Table(["strategy", *columns])
    for name in dict.fromkeys(row["strategy"] for row in record["rows"]):
        cells: list[str] = []
        for row in (row for row in record["rows"] if row["strategy"] == name):
            time = times.get((name, row["tokens"], row["kept"]))
            taken = (f"{time['seconds'] * 1e3:.1f}", f"{time['share']:.2%}") if time else ("-", "-")
            cells += [str(row["operations"]), *taken]
        table.add(name, *cells)
    table.caption = (
        f"`{COMMAND}`: operators that are no views, at keep {KEEP}, one image. Milliseconds are those of "
        f"selectors_cpu.json ({timed['device']}, {timed['threads']} threads, {timed['dtype']}); -: not timed there."
    )
    return f"# What a selection asks of a device\n\n{table.markdown()}\n"


def main() -> None:
    rows = [counted(name, n) for name in sorted(plugins.strategies()) for n in TOKENS]
    record = {"command": COMMAND, "keep": KEEP, "versions": versions(), "rows": rows}
    files.write_json(FOLDER / "selector_operations.json", record)
    timed = files.read_json(FOLDER / "selectors_cpu.json")
    files.write(FOLDER / "selector_operations.md", page(record, timed))


if __name__ == "__main__":
    main()
