"""A comparison as a YAML file (plugin_configs/sweeps), or as the sweep.yaml that a run folder keeps of itself."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vtp_plugin import config, files
from vtp_plugin.compare import matrix
from vtp_plugin.errors import PruningError, unknown
from vtp_plugin.reporting import schema
from vtp_plugin.reporting.runs import Spec

HOST = ("model", "model_args", "tasks", "limit", "options", "launch", "jobs", "environment", "gallery")
FIELDS = (*HOST, "pruning", "keep", "seeds", "positions", "cells", "without", "schema")
NEEDED = ("model", "model_args", "tasks")
CELL_FIELDS = ("id", "label", "pruning", "pruning_args", "seed", "keep")


def read(path: Path) -> dict[str, Any]:
    """The fields of a file, of its own spelling. PruningError for one that does not exist."""
    if not path.is_file():
        said = "" if path.suffix in (".yaml", ".yml") else "; strategies are named with --pruning"
        raise PruningError(f"sweep file not found: {path}{said}")
    content = files.read_yaml(path)
    if not isinstance(content, dict):
        raise PruningError(f"{path}: expected the fields of a comparison: {', '.join(FIELDS)}")
    for field in content:
        if field not in FIELDS:
            raise unknown("field", str(field), FIELDS, of=f" in {path}", listed="Fields")
    _check(content, str(path))
    return content


def _check(said: Mapping[str, Any], source: str = "") -> None:
    """Refuse values of the wrong kind."""
    for entry in said.get("cells") or [] if isinstance(said.get("cells"), list) else []:
        if not isinstance(entry, dict) or not isinstance(entry.get("pruning"), str):
            raise PruningError(f"a cell needs 'pruning: NAME', got {entry!r}")
        for field in entry:
            if field not in CELL_FIELDS:
                raise unknown("field", str(field), CELL_FIELDS, of=" of a cell", listed="Fields")
    schema.checked(schema.SweepFile, dict(said), source)


def planned(said: Mapping[str, Any]) -> tuple[list[Spec], dict[str, Any]]:
    """The cells of a comparison and the other arguments of `sweep.run`."""
    _check(said)
    missing = [field for field in NEEDED if not said.get(field)]
    if missing:
        raise PruningError(f"a comparison needs {' and '.join(missing)}")
    made = matrix.cells(names(said.get("pruning"), "pruning"), ratios(said.get("keep")), said.get("seeds", 1))
    made += [_listed(entry) for entry in said.get("cells") or []]
    left_out = names(said.get("without"), "without")
    for id in left_out:
        if id not in {cell.id for cell in made}:
            raise unknown("cell", id, {cell.id for cell in made}, of=" in without")
    made = matrix.unique([cell for cell in made if cell.id not in left_out])
    if len(made) < 2:
        raise PruningError("a comparison needs strategies to compare: pruning or cells")
    made = matrix.numbered(made, said.get("positions", matrix.SHARED), said["model"])
    host = {field: said[field] for field in HOST if said.get(field) is not None}
    return made, host | {"tasks": names(said["tasks"], "tasks")}


def names(said: Any, field: str) -> list[str]:
    """A list, or a text with commas; every name once."""
    return config.parse_names(said, field) if said or said == "" else []


def ratios(said: Any) -> list[float]:
    """Keep ratios: a list, one number, or a text with commas."""
    parts = [said] if isinstance(said, (int, float)) else said.split(",") if isinstance(said, str) else said or []
    try:
        numbers = [float(part) for part in parts]
    except (ValueError, OverflowError):
        raise PruningError(f"keep must be ratios in (0, 1], separated by commas, got '{said}'") from None
    wrong = [number for number in numbers if not 0 < number <= 1]
    if wrong:
        raise PruningError(f"keep must be in (0, 1], got {wrong[0]:g}")
    return numbers


def _listed(entry: Mapping[str, Any]) -> Spec:
    """A cell that stands by itself: pruning, its pruning_args, and a name if the usual one would not be unique."""
    fields = dict(entry.get("pruning_args") or {})
    given = {"keep": fields.pop("keep_ratio", entry.get("keep")), "seed": fields.pop("seed", entry.get("seed"))}
    return matrix.cell(entry["pruning"], **given, id=entry.get("id"), label=entry.get("label"), **fields)
