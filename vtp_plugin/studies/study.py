"""What every study is: settings in, measurements that can be interrupted, one record, tables and figures out of it."""

from __future__ import annotations

import io
import json
import shlex
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from pkgutil import iter_modules
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

import yaml
from rich.console import Console

from vtp_plugin import files, locks, settings
from vtp_plugin.errors import PruningError, unknown
from vtp_plugin.reporting import runs
from vtp_plugin.reporting.record import versions
from vtp_plugin.reporting.tables import Table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

T = TypeVar("T")
SCHEMA = 1
SETTINGS = "settings.yaml"
CONFIGS = settings.CONFIGS / "studies"


@dataclass
class Study(ABC):
    """One study. `measure` is the work; `tables` and `figures` only show what it returned."""

    name: ClassVar[str]
    source: ClassVar[str]  # whose claim it is, and what is claimed

    settings: dict[str, Any]
    folder: Path
    console: Console = field(default_factory=lambda: Console(quiet=True))
    jobs: int = 1

    def check(self) -> None:
        """Refuse bad input before the work starts."""

    @abstractmethod
    def measure(self) -> dict[str, Any]:
        """The results, as JSON. What is finished survives an interruption."""

    @abstractmethod
    def tables(self, results: Mapping[str, Any]) -> list[Table]:
        """Laid out like the source's."""

    def figures(self, results: Mapping[str, Any]) -> dict[str, Figure]:
        """By file name without suffix."""
        return {}

    def check_counts(self, *names: str) -> None:
        """Refuse settings that are no whole number of at least 1."""
        for name in names:
            if not whole(self.settings[name]) or self.settings[name] < 1:
                raise PruningError(f"{self.name}: {name} must be a whole number, at least 1: {self.settings[name]!r}")

    def check_ratios(self, *names: str) -> None:
        """Refuse lists that hold no keep ratio, or anything else."""
        for name in names:
            said = self.settings[name]
            if not said or not all(_kind(value) == "a number" and 0 < value <= 1 for value in said):
                raise PruningError(f"{self.name}: {name} must be keep ratios in (0, 1], got {said!r}")

    def once(self, key: str, work: Callable[[], Any]) -> Any:
        """What `work` returned the first time, also in an earlier, interrupted run of the same settings."""
        done = self.folder / "units" / f"{key}.json"
        if not done.exists():
            value = work()
            done.parent.mkdir(parents=True, exist_ok=True)
            files.write(done, json.dumps(value))
        try:
            return json.loads(done.read_text())
        except ValueError:
            raise PruningError(f"{done} is damaged: without it the study measures that part again") from None


def whole(value: Any) -> bool:
    """Whether it is a whole number; true is none."""
    return isinstance(value, int) and not isinstance(value, bool)


def some(found: Sequence[T], limit: Any, what: str) -> list[T]:
    """So many of what there is, evenly spread; -1: all. PruningError for a number that means nothing here."""
    if not whole(limit) or limit == 0 or limit < -1 or limit > len(found):
        raise PruningError(f"{what} must be from 1 to the {len(found)} there are, or -1 for all, got {limit!r}")
    return list(found) if limit < 0 else [found[number * len(found) // limit] for number in range(limit)]


def studies() -> dict[str, type[Study]]:
    """Every study by name."""
    package = import_module("vtp_plugin.studies")
    modules = [import_module(f"vtp_plugin.studies.{info.name}") for info in iter_modules(package.__path__)]
    found = {value for module in modules for value in vars(module).values() if _is_study(value)}
    return {cls.name: cls for cls in sorted(found, key=lambda cls: cls.name)}


def _is_study(value: Any) -> bool:
    return isinstance(value, type) and issubclass(value, Study) and hasattr(value, "name")


def listed() -> Table:
    """Every study, whose claim it is and what is claimed."""
    table = Table(["study", "claim"])
    for name, cls in studies().items():
        table.add(name, cls.source)
    return table


def settings_of(name: str, said: Mapping[str, Any]) -> dict[str, Any]:
    """The study's YAML with what the user said over it; PruningError for a name or a key that there is not."""
    if name not in studies():
        raise unknown("study", name, studies())
    known = files.read_yaml(CONFIGS / f"{name}.yaml")
    for key, value in said.items():
        if key not in known:
            raise PruningError(f"{name}: it has no setting '{key}'. Settings: {', '.join(known)}")
        if _kind(value) != _kind(known[key]) and known[key] is not None:
            raise PruningError(f"{name}: {key} must be {_kind(known[key])} such as {known[key]!r}, got {value!r}")
    return {**known, **said}


def _kind(value: Any) -> str:
    """What a setting is, for a message; a number is a number."""
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return "a number"
    return {str: "text", list: "a list", dict: "a mapping", bool: "true or false"}.get(type(value), "empty")


def conduct(name: str, said: Mapping[str, Any], folder: Path, console: Console, jobs: int = 1) -> Path:
    """Run a study, or go on with it, and write record.json, table.md and the figures; the record's path."""
    settings = settings_of(name, said)  # refuses an unknown name
    study = studies()[name](settings, folder, console, jobs)
    study.check()
    with locks.folder(folder):
        _claim(folder, name, study.settings)
        return _conducted(study)


def _conducted(study: Study) -> Path:
    folder = study.folder
    began = time.monotonic()
    results = study.measure()
    record = {
        "schema": SCHEMA,
        "study": study.name,
        "source": study.source,
        "command": shlex.join(["vtp", *sys.argv[1:]]),
        "settings": study.settings,
        "device": device(),
        "versions": versions(),
        "seconds": round(time.monotonic() - began, 1),
        "results": results,
    }
    write(folder / "record.json", json.dumps(record, indent=1) + "\n")
    publish(study, results)
    return folder / "record.json"


def publish(study: Study, results: Mapping[str, Any]) -> None:
    """Tables and figures of finished results."""
    tables = study.tables(results)
    write(study.folder / "table.md", "\n\n".join(table.markdown() for table in tables) + "\n")
    for table in tables:
        table.show(study.console)
    for name, figure in study.figures(results).items():
        drawn = io.BytesIO()
        figure.savefig(drawn, format="png", dpi=110)
        files.write(study.folder / f"{name}.png", drawn.getvalue())


def _claim(folder: Path, name: str, settings: Mapping[str, Any]) -> None:
    """A folder belongs to one study with one set of settings, so that going on never mixes two.

    Where nothing was measured yet, other settings may take it.
    """
    mine = {"study": name, "settings": dict(settings)}
    claimed = folder / SETTINGS
    left = [entry for entry in folder.iterdir() if entry.name not in (SETTINGS, locks.LOCK)]
    if not claimed.exists() and left:
        raise PruningError(f"{folder} is not empty and holds no study: choose another folder (-o)")
    if claimed.exists() and files.read_yaml(claimed) != mine and not all(map(_without_results, left)):
        raise PruningError(f"{folder} holds a study with other settings: choose another folder (-o) or delete it")
    write(claimed, yaml.safe_dump(mine, sort_keys=False))


def _without_results(entry: Path) -> bool:
    """Whether this is a run folder in which no cell has its results."""
    return (entry / runs.SETTINGS).is_file() and not runs.measured(entry)


def device() -> str:
    """What the study ran on."""
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads"


def write(path: Path, text: str) -> None:
    """Whole or not at all."""
    files.write(path, text)
