"""The settings that come with the package: the papers' hyper-parameters by name, `fastv:k2_r50`.

`NAME:SETTING` is the file plugin_configs/strategies/NAME_SETTING.yaml, and `NAME:default` is NAME.yaml. A file opens
with a comment that says where its numbers come from.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vtp_plugin import files
from vtp_plugin.errors import unknown

HERE = Path(__file__).parent
CONFIGS = next((p for p in (HERE / "plugin_configs", HERE.parent / "plugin_configs") if p.is_dir()), HERE)
DEFAULT = "default"  # the setting in the file that has the strategy's own name


@dataclass(frozen=True)
class Setting:
    """One file: its name, where its numbers come from, its fields."""

    name: str
    source: str
    fields: dict[str, Any]


def of(strategy: str) -> list[Setting]:
    """Every setting of a strategy, in the order of their names, numbers by their size."""
    paths = sorted((CONFIGS / "strategies").glob(f"{strategy}*.yaml"), key=_natural)
    found = [_read(path, strategy) for path in paths]
    return [setting for setting in found if setting is not None]


def named(strategy: str, setting: str) -> dict[str, Any]:
    """The fields of `strategy:setting`. PruningError with what there is if there is no such setting."""
    known = {each.name: each.fields for each in of(strategy)}
    if setting not in known:
        raise unknown("setting", setting, known, of=f" of '{strategy}'", listed="Settings")
    return dict(known[setting])


def _natural(path: Path) -> list[tuple[int, str]]:
    """A key by which rank72 comes before rank144."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", path.stem)]


def _read(path: Path, strategy: str) -> Setting | None:
    """The setting in a file; None if it is of another strategy, whose name begins alike."""
    fields = files.read_yaml(path)
    if fields.pop("strategy", None) != strategy:
        return None
    lines = path.read_text("utf-8").splitlines()
    comments = [line.lstrip("# ") for line in lines[: next(i for i, x in enumerate(lines) if x[:1] != "#")]]
    name = path.stem.removeprefix(strategy).removeprefix("_") or DEFAULT
    return Setting(name, " ".join(comments), fields)
