"""Whether the times of a run can be compared: what its records say of the machine that they were made on."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby, pairwise
from typing import Any

from vtp_plugin.reporting.runs import Cell, Run

BUSY = 1.25  # load average per core from which a process does not have the machine for itself
LOOSE = 0.25  # spread of the times to first token from which single runs say little
ODD = 1.1  # less work that takes this much longer was not timed on a calm machine


def load(record: Mapping[str, Any]) -> float | None:
    """Load average of the last minute of a run; None where it was not recorded."""
    return (record.get("machine", {}).get("load") or [None])[0]


def spread(record: Mapping[str, Any]) -> float | None:
    """Spread of a run's times to first token (docs/record.md); None where it was not recorded."""
    return record.get("latency", {}).get("ttft_spread")


def notes(run: Run, lines: Sequence[Mapping[str, Any]]) -> list[str]:
    """A sentence with all reasons not to compare times; `lines`: the rows of `comparison.summary`, unpruned first."""
    timed = [cell for cell in run if "seconds" in cell.record]
    found = [*_unknown(timed), *_busy(timed), *_machines(timed), *_loose(timed), *_shared(run), *_inverted(lines)]
    return [f"Times may not be comparable: {'; '.join(found)}."] if timed and found else []


def facts(run: Run) -> str:
    """What is known of the machine over all runs."""
    records = [cell.record for cell in run]
    loads = [value for record in records if (value := load(record)) is not None]
    spreads = [value for record in records if (value := spread(record)) is not None]
    machine = next((record["machine"] for record in records if "machine" in record), None)
    said = [f"{machine['cores']} cores, {machine['threads']} threads"] if machine else []
    said += [f"load average {min(loads):.1f} to {max(loads):.1f}"] if loads else ["load average not recorded"]
    said += [f"spread of TTFT {100 * min(spreads):.0f} to {100 * max(spreads):.0f} %"] if spreads else []
    return ", ".join(said)


def _unknown(cells: Sequence[Cell]) -> Iterator[str]:
    missing = [cell for cell in cells if load(cell.record) is None]
    if missing:
        yield f"the load of the machine was not recorded with {len(missing)} of {len(cells)} runs"


def _busy(cells: Sequence[Cell]) -> Iterator[str]:
    loads = {cell.id: load(cell.record) for cell in cells if load(cell.record) is not None}
    busy = {cell.id: loads[cell.id] for cell in cells if loads.get(cell.id, 0) > BUSY * _cores(cell)}
    if busy:
        cores = _cores(cells[0])
        yield f"load average up to {max(busy.values()):.1f} on {cores} cores during {len(busy)} of {len(cells)} runs"


def _cores(cell: Cell) -> int:
    return cell.record["machine"]["cores"] if "machine" in cell.record else 0


def _machines(cells: Sequence[Cell]) -> Iterator[str]:
    kinds = {(_cores(cell), cell.record.get("model", {}).get("device")) for cell in cells if _cores(cell)}
    if len(kinds) > 1:
        yield "runs on different machines: " + " and ".join(
            f"{cores} cores, {device}" for cores, device in sorted(kinds)
        )


def _loose(cells: Sequence[Cell]) -> Iterator[str]:
    spreads = [value for cell in cells if (value := spread(cell.record)) is not None]
    if spreads and max(spreads) > LOOSE:
        yield f"within a run, times to first token spread by up to {100 * max(spreads):.0f} % of their median"


def _shared(run: Run) -> Iterator[str]:
    jobs = run.settings.get("jobs") or 1
    if jobs > 1:
        yield f"{jobs} runs shared the machine at any time"


def _inverted(lines: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Two budgets of one method of which the smaller took longer."""
    timed = [line for line in lines if line["ttft_ratio"] and line["flops_ratio"]]
    for _, group in groupby(sorted(timed, key=lambda line: line["pruning"]), key=lambda line: line["pruning"]):
        for small, large in pairwise(sorted(group, key=lambda line: line["flops_ratio"])):
            if small["flops_ratio"] < large["flops_ratio"] and small["ttft_ratio"] > ODD * large["ttft_ratio"]:
                yield f"{_cost(small)}, though {_cost(large)}"


def _cost(line: Mapping[str, Any]) -> str:
    return f"{line['label']} took {line['ttft_ratio']:.2f}x of the time for {line['flops_ratio']:.2f}x of the FLOPs"
