"""The page of the records that `make gpu` wrote; one line where there are none."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

from vtp_plugin import files
from vtp_plugin.bench import tables
from vtp_plugin.reporting.tables import Table

SHAPES = ("llava-1.5-7b", "llava-next-7b", "qwen2.5-vl-7b", "qwen3-vl-4b")
ENCODERS = ("clip-vit-l-14-336", "clip-vit-b-32")
NOTES = "notes.md"  # what a reader of these records has to know besides
NOTHING = "Not yet measured: `make gpu` on a machine with a CUDA device writes the records."
HEAD = """# On a GPU

Written by `make gpu`: random weights in real shapes at full depth, pruned against unpruned and against the ideal, the
same model given as many tokens by hand. What the columns mean: [measuring](../../measuring.md).
"""


def page(folder: Path) -> str:
    """All of it in Markdown."""
    blocks = [_shape(record) for record in records(folder)]
    if not blocks:
        return f"# On a GPU\n\n{NOTHING}\n"
    notes = [files.read_text(folder / NOTES).strip()] if (folder / NOTES).exists() else []
    blocks = [goals(records(folder)).markdown(), *notes, *blocks]
    blocks += [line for name in ("tests", "training") if (line := _line(folder / f"{name}.json", name))]
    return "\n".join([HEAD, *(f"{block}\n" for block in blocks)])


def records(folder: Path) -> list[dict[str, Any]]:
    """The records of shapes that have rows, the published ones first."""
    found = [files.read_json(path) for path in sorted(folder.glob("*.json"))]
    shapes = [record for record in found if record.get("timings")]
    return sorted(shapes, key=lambda record: (record["shape"] not in SHAPES, _place(record["shape"])))


def short(folder: Path) -> str:
    """The README's table: every method at a quarter of the tokens and batch 8."""
    table = Table(["model", "method", "tokens", "TTFT", "of ideal", "decode"])
    found = records(folder)
    for record in found:
        for row in record["timings"]:
            if row["batch"] == 8 and row["keep"] == 0.25:
                tokens = f"{row['tokens_after']:.0f}/{row['tokens_before']}"
                ratios = [tables.ratio(row, name) for name in ("ttft_ratio", "over_ideal", "decode_ratio")]
                table.add(record["shape"], row["strategy"], tokens, *ratios)
    if not table.rows:
        return NOTHING
    table.caption = f"{_device(found[0])}, {found[0]['dtype']}, batch 8, random weights. {tables.BOLD}"
    return table.markdown()


def goals(found: Sequence[dict[str, Any]]) -> Table:
    """How many rows reach what was aimed at, and the median."""
    table = Table(["goal", "rows", "reached", "median"], keys=1)
    decoding = [row for record in found for row in record["timings"] if row["kv_bytes"]]
    encoding = [row for record in found for row in record["timings"] if not row["kv_bytes"] and row["keep"] == 0.5]
    wide = [row for row in decoding if row["batch"] == 8 and row["keep"]]
    paper = [row for row in decoding if row["strategy"] == "atp" and row["keep"] == 0.4]
    selecting = [median(row["selector"]) / median(row["prefill"]["unpruned"]) for row in decoding]
    aims: list[tuple[str, list[float], float, bool]] = [
        ("before the language model, of ideal at most 1.03x", _of(decoding, "over_ideal", late=False), 1.03, False),
        ("fastv, of ideal at most 1.05x", _of(decoding, "over_ideal", late=True), 1.05, False),
        ("realised at batch 8, at least 0.8", [row["realised"] for row in wide], 0.8, True),
        ("host's time for the selector, at most 0.01 of the prefill", selecting, 0.01, False),
        ("tower at keep 0.5, at least 1.8x as fast", [1 / row["ttft_ratio"] for row in encoding], 1.8, True),
        ("prefill of atp at keep 0.4, at least 1.5x as fast", [1 / row["prefill_ratio"] for row in paper], 1.5, True),
    ]
    for name, values, aim, above in aims:
        reached = sum(value >= aim if above else value <= aim for value in values)
        table.add(name, len(values), reached, f"{median(values):.3g}" if values else "not measured")
    return table


def _of(rows: Sequence[dict[str, Any]], name: str, *, late: bool) -> list[float]:
    """A ratio of the methods that cut between decoder layers, or of those that cut before them."""
    return [row[name] for row in rows if row["keep"] and (row["strategy"] == "fastv") is late]


def _shape(record: dict[str, Any]) -> str:
    rows = sorted(record["timings"], key=lambda row: (row["batch"], row["strategy"], -(row["keep"] or 0)))
    where = f"{_device(record)}, {record['dtype']}, {record['attention']}, median of {record['repeats']} rounds"
    shown = (tables.timings if any(row["kv_bytes"] for row in rows) else tables.encoders)(rows, "")
    return f"## {record['shape']}\n\n{where}.\n\n{shown.markdown()}"


def _device(record: dict[str, Any]) -> str:
    versions = record["versions"]
    told = ", ".join(f"{name} {versions[name]}" for name in ("torch", "transformers") if versions.get(name))
    return f"{record['device']}, {told}"


def _line(path: Path, name: str) -> str:
    """What the tests, or the training, came to."""
    if not path.exists():
        return ""
    found = files.read_json(path)
    if name == "tests":
        counts = ", ".join(f"{found[word]} {word}" for word in ("passed", "failed", "skipped") if word in found)
        counts = counts or ("all passed" if found["code"] == 0 else "not all passed, or ended before their end")
        return f"Tests marked `gpu`: {counts}, {found['seconds']:.0f} s."
    if "steps" not in found:
        return f"Training of the embedded model: exit code {found['code']}, see `{path.name}`."
    pace, losses = found["steps_per_second"], (found["first_loss"], found["last_loss"])
    return (
        f"Training of the embedded model: {found['steps']} steps, {pace:.1f} per second, loss {losses[0]:.3f} to "
        f"{losses[1]:.3f}."
    )


def _place(shape: str, among: Sequence[str] = SHAPES) -> int:
    return among.index(shape) if shape in among else len(among)
