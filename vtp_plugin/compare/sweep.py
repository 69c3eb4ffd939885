"""Many configurations of one model through the real lmms-eval command line, into a run folder that can be resumed.

The folder's layout is that of `vtp_plugin.reporting.runs`. A cell whose cell.json says "done" is never run again;
failed and unfinished ones are.
"""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from threading import Event
from typing import Any

import yaml
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from vtp_plugin import config, files, locks
from vtp_plugin.compare.matrix import OWN, resolve, unique
from vtp_plugin.errors import Interrupted, PruningError
from vtp_plugin.hosts import compatibility
from vtp_plugin.hosts.lmms_eval import plugin as lmms_eval
from vtp_plugin.hosts.lmms_eval.building import TINY_LAYOUTS
from vtp_plugin.hosts.lmms_eval.process import Host, Listener
from vtp_plugin.hosts.lmms_eval.proof import IDLE
from vtp_plugin.reporting import runs
from vtp_plugin.reporting.runs import Cell, Run, Spec
from vtp_plugin.tiny import checkpoint

OFFLINE = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
# Where another program wants the same cores, threads that spin while they wait cost a small model nearly all its speed.
PATIENT = {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "0"}
SAME = ("model", "model_args", "tasks", "limit", "options")  # what all results of a folder must agree on
WORK, PICTURES = "work", "pictures"
OURS = (*SAME, "pruning", "pruning_args", "output_path", "log_samples", "config")  # no options: they have a place
PATH = re.compile(r"[\w./+:@=-]*", re.ASCII)  # a path that the host's options can hold


def run(
    folder: str | Path,
    cells: Sequence[Spec],
    *,
    model: str,
    model_args: str,
    tasks: str | Sequence[str],
    limit: int = -1,
    options: Mapping[str, Any] | None = None,
    launch: str = "",
    jobs: int = 1,
    environment: Mapping[str, str] | None = None,
    gallery: bool = False,
    idle: bool = False,
    console: Console | None = None,
) -> Run:
    """Evaluate every cell that the folder does not hold yet; the folder as it is afterwards, failed cells included.

    `limit`: questions per task, -1 for all. `options`: further options of the host (batch_size, gen_kwargs, ...).
    `launch`: what to start the host with, such as `accelerate launch --num_processes 4`. `jobs`: processes that share
    the cells; the machine's threads are divided among them. `environment`: variables of these processes. `gallery`:
    keep pictures of the first questions (VTP_GALLERY). `idle`: thresholds that drop nothing of any picture are a
    result, not a failure. PruningError: bad settings, or a folder of other settings.
    """
    folder, named = Path(folder), config.parse_names(tasks, "tasks")
    settings = {"model": model, "model_args": model_args, "tasks": named, "limit": limit}
    settings |= {"options": dict(options or {}), "launch": launch, "jobs": jobs}
    settings |= {"environment": dict(environment or {}) | ({IDLE: "1"} if idle else {})}
    settings |= {"gallery": gallery, "positions": OWN, "cells": [asdict(cell) for cell in unique(cells)]}
    _check(settings)
    files.check_folder(folder)
    try:
        with locks.folder(folder):
            settings = _joined(folder, settings)
            todo = [cell for cell in unique(cells) if not finished(folder, cell.id)]
            if todo:
                check_host(model, settings["tasks"])
            _write_settings(folder, settings)
            for cell in todo:
                (folder / runs.CELLS / cell.id / runs.CELL).unlink(missing_ok=True)  # how it failed before
            _Sweep(folder, settings, len(cells), console or Console(quiet=True)).work(todo)
    except KeyboardInterrupt:
        kept = sum(finished(folder, cell.id) for cell in unique(cells))
        raise Interrupted(
            f"stopped; {kept} of {len(cells)} cells are kept in {folder}: the same command goes on"
        ) from None
    return runs.load(folder)


def finished(folder: Path, id: str) -> bool:
    """Whether a cell has its results."""
    path = folder / runs.CELLS / id / runs.CELL
    return path.is_file() and runs.read_json(path)["status"] == "done"


def _check(settings: Mapping[str, Any]) -> None:
    """Refuse what can be refused without the host."""
    check_limit(settings["limit"], settings["tasks"])
    if settings["jobs"] < 1:
        raise PruningError(f"jobs must be at least 1, got {settings['jobs']}")
    for part in _arguments(settings["model_args"]):
        if "=" not in part:
            raise PruningError(f"model_args must be key=value,..., such as pretrained=FOLDER, got '{part}'")
        checkpoint.refuse_alike(part.partition("=")[2].strip())
    if settings["launch"].split() and shutil.which(program := settings["launch"].split()[0]) is None:
        raise PruningError(f"launch: there is no program '{program}'")
    if "pruning=" in settings["model_args"]:
        raise PruningError("say which pruning to compare as cells, not as pruning= in model_args")
    if said := set(settings["options"]) & set(OURS):
        raise PruningError(f"{min(said)} is not one of the host's options here: it is a field of the comparison")
    for name, value in settings["environment"].items():
        if not re.fullmatch(r"[A-Za-z_]\w*", name) or "\0" in str(value):
            raise PruningError(f"environment: '{name}={value}' is no variable")
    for entry in settings["cells"]:
        resolve(entry["pruning"], entry["pruning_args"])


def _arguments(model_args: str) -> list[str]:
    """The arguments of a model one by one; none of one that quotes or brackets hold together, which the host reads."""
    return [] if set(model_args) & set("'\"{[") else [part for part in model_args.split(",") if part.strip()]


def check_limit(limit: Any, tasks: Sequence[str]) -> None:
    """Refuse a number of questions that means nothing, or that no task has, where that is known without the host."""
    whole = isinstance(limit, int) and not isinstance(limit, bool)
    if not whole or limit == 0 or limit < -1:
        raise PruningError(f"limit must be a number of questions per task, or -1 for all, got {limit}")
    known = [lmms_eval.documents(task) for task in tasks] if limit > 0 else []
    if known and None not in known and limit > max(known):
        raise PruningError(f"limit must be at most the {max(known)} questions there are per task, or -1, got {limit}")


def check_host(model: str, tasks: Sequence[str]) -> None:
    """Refuse a model or a task that the host does not have; what the plugin brings is known without asking it."""
    compatibility.refuse_broken(model)
    if _foreign(tasks) or not any(model in layouts for layouts in TINY_LAYOUTS.values()):
        lmms_eval.check_names(model, _foreign(tasks))


def _foreign(tasks: Sequence[str]) -> list[str]:
    """Those that do not come with the plugin."""
    own = {path.stem for path in lmms_eval.TASKS.rglob("*.yaml")}
    return [task for task in tasks if task not in own]


def _embedded(settings: Mapping[str, Any]) -> bool:
    """Whether model and tasks come with the plugin, so that nothing is wanted from the hub."""
    said = settings["model_args"].split(",")
    return any(f"pretrained={name}" in said for name in checkpoint.NAMES) and not _foreign(settings["tasks"])


def _joined(folder: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """The settings with the cells that the folder holds already. PruningError if it is another comparison's.

    Where nothing was measured, whatever was wrong before may be put right: the folder is as good as new.
    """
    path = folder / runs.SETTINGS
    if not path.is_file():
        if folder.is_dir() and any(entry.name != locks.LOCK for entry in folder.iterdir()):
            raise PruningError(f"{folder} is not empty and holds no comparison ({runs.SETTINGS}); take another folder")
        return settings
    before = runs.read_settings(path)
    if not runs.measured(folder):
        return settings
    for key in SAME:
        if before.get(key) != settings[key]:
            raise PruningError(
                f"{folder} holds a comparison with {key} = {before.get(key)!r}, asked was {settings[key]!r}; "
                "take another folder"
            )
    known = {entry["id"]: entry for entry in before["cells"]}
    for entry in settings["cells"]:
        if known.get(entry["id"], entry) != entry and finished(folder, entry["id"]):
            raise PruningError(f"{folder} holds another cell of the name '{entry['id']}'; take another folder")
        known[entry["id"]] = entry
    return {**settings, "cells": list(known.values())}


def _write_settings(folder: Path, settings: Mapping[str, Any]) -> None:
    files.write(folder / runs.SETTINGS, yaml.safe_dump({"schema": runs.SCHEMA, **settings}, sort_keys=False))


@contextmanager
def _plain(folder: Path) -> Iterator[Path]:
    """The folder for the host's own output, under a name that its options can hold: commas and quotes end them."""
    work = folder.resolve() / WORK
    if PATH.fullmatch(str(work)):
        yield folder / WORK
        return
    work.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="vtp-") as aside:
        (Path(aside) / WORK).symlink_to(work)
        yield Path(aside) / WORK


class _Sweep:
    """The processes that work through the cells, and the bars that show it."""

    def __init__(self, folder: Path, settings: Mapping[str, Any], total: int, console: Console) -> None:
        self.folder, self.settings, self.console, self.total = folder, settings, console, total
        self.stopped = Event()
        self.hosts: list[Host] = []
        columns = (
            TextColumn("{task.description:<28}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
        )
        self.progress = Progress(*columns, console=console)

    def work(self, todo: Sequence[Spec]) -> None:
        """Run the cells in at most `jobs` processes at a time."""
        shutil.rmtree(self.folder / WORK, ignore_errors=True)  # what a killed comparison left
        if not todo:
            return
        jobs = min(self.settings["jobs"], len(todo))
        self.console.print(f"{len(todo)} of {self.total} cells to run, logs: {self.folder / WORK}", soft_wrap=True)
        with _plain(self.folder) as self.work_folder, self.progress, ThreadPoolExecutor(jobs) as pool:
            self.bar = self.progress.add_task("cells", total=self.total, completed=self.total - len(todo))
            try:
                list(pool.map(lambda job: self._through(job, todo[job::jobs]), range(jobs)))
            except BaseException:
                self._stop()
                raise

    def _through(self, job: int, rest: Sequence[Spec]) -> None:
        """One process after the other until no cell is left: a crash costs the cell that was running."""
        attempt = 0
        while rest and not self.stopped.is_set():
            host = Host(
                rest,
                self._entry(),
                self.folder / runs.CELLS,
                self.work_folder / f"{os.getpid()}-{job}-{attempt}",
                self.settings["launch"].split(),
                self._environment(),
            )
            self.hosts.append(host)
            rest = host.run(self._listener(job), self.stopped.is_set)
            attempt += 1

    def _stop(self) -> None:
        self.stopped.set()
        for host in self.hosts:
            host.stop()

    def _entry(self) -> dict[str, Any]:
        """What all cells say to the host."""
        said = {key: self.settings[key] for key in ("model", "model_args", "limit")}
        return {**said, "tasks": ",".join(self.settings["tasks"]), **self.settings["options"]}

    def _environment(self) -> dict[str, str]:
        threads = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // self.settings["jobs"]))}
        looks = {"VTP_GALLERY_EACH": "1", "VTP_GALLERY_PICTURES": str(self.folder / PICTURES)}
        said = {name: str(value) for name, value in self.settings["environment"].items()}
        shared = threads if self.settings["jobs"] > 1 and "OMP_NUM_THREADS" not in os.environ else {}
        spinning = {name: value for name, value in PATIENT.items() if name not in os.environ}
        embedded = {**OFFLINE, **spinning} if _embedded(self.settings) else {}
        return {**shared, **embedded, **(looks if self.settings["gallery"] else {}), **said}

    def _listener(self, job: int) -> Listener:
        """A bar for this process: the questions of its cell."""
        bar = self.progress.add_task("loading", total=None)

        def started(cell: Spec) -> None:
            self.progress.reset(bar, total=None, description=f"  {cell.id}")

        def answered(cell: Spec, done: int, of: int) -> None:
            self.progress.update(bar, completed=done, total=of)

        def ended(cell: Cell) -> None:
            self.progress.advance(self.bar)
            self.console.print(f"{cell.status}  {cell.id}  {cell.error or ''}".rstrip(), soft_wrap=True, markup=False)

        return Listener(started, answered, ended)
