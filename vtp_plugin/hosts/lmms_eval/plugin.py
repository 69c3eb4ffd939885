"""lmms-eval's entry point: three seams, each as narrow as the host allows, and nothing of ours before they are used.

* its command line gets `--pruning` and `--pruning_args`, folded into `model_args` (commandline.py, settings.py);
* where it makes a model of an argument string, one that asks for pruning is built here (building.py) and that one
  evaluation is followed to its end, where the proof is written (evaluation.py);
* its catalogue of tasks finds ours.

A run without `pruning` and without `vtp-tiny` takes none of these paths, and the registry's classes are the host's own.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from copy import deepcopy
from difflib import get_close_matches
from functools import wraps
from inspect import signature
from pathlib import Path
from typing import Any

from vtp_plugin.contract import broken
from vtp_plugin.errors import PruningError, unknown
from vtp_plugin.hosts.lmms_eval import commandline, settings
from vtp_plugin.hosts.lmms_eval.contract import MODELS
from vtp_plugin.hosts.lmms_eval.contract import TASKS as TASKS_OFFERED
from vtp_plugin.hosts.wrapping import wrap

TASKS = Path(__file__).parent / "tasks"


def documents(task: str) -> int | None:
    """How many questions a task of ours has: its folder's one file of documents; None where that is not known."""
    found = [path for path in TASKS.rglob("*.yaml") if path.stem == task]
    files = list(found[0].parent.glob("*.parquet")) if found else []
    if len(files) != 1:
        return None
    from pyarrow.parquet import read_metadata

    return read_metadata(files[0]).num_rows


def register() -> list[Any]:
    """Entry point of the group `lmms_eval.models`: brings no model, extends the host. Harmless when repeated.

    Never raises: that would stop the plugins behind it. A host that has moved is named in a warning.
    """
    if said := next(broken((*TASKS_OFFERED, *MODELS[:1])), None):
        warnings.warn(f"--pruning is not available: {said}", RuntimeWarning, stacklevel=2)
    elif not registered():
        commandline.extend()
        _watch_models()
        _offer_tasks()
    return []


def registered() -> bool:
    """Whether the host has called the entry point."""
    from lmms_eval.tasks import TaskManager

    return hasattr(TaskManager.initialize_tasks, "_vtp")


def _watch_models() -> None:
    """Build what asks for us; `create_from_arg_string` is the one place where the host reads model arguments."""
    from lmms_eval.api.model import lmms
    from lmms_eval.utils import simple_parse_args_string

    original = vars(lmms)["create_from_arg_string"].__func__

    @wraps(original)
    def create(cls: type, arg_string: str, additional_config: dict[str, Any] | None = None) -> Any:
        if not settings.concern(arg_string, signature(cls.__init__).parameters):
            return original(cls, arg_string, additional_config)
        from vtp_plugin.hosts.lmms_eval import building

        said = {name: value for name, value in (additional_config or {}).items() if value is not None}
        return building.build(cls, {**simple_parse_args_string(arg_string), **said})

    lmms.create_from_arg_string = classmethod(create)


def _offer_tasks() -> None:
    """Let every TaskManager find our tasks, as if they had been named with --include_path.

    The host's own tasks, 1600 files that take seconds, and ours are read once for all configurations of a process.
    """
    from lmms_eval.tasks import TaskManager

    defaults: dict[str, Any] = {}
    ours: dict[str, Any] = {}

    def around(original: Callable, manager: Any, include_path: Any = None, include_defaults: bool = True) -> Any:
        paths = [include_path] if isinstance(include_path, str) else list(include_path or [])
        if include_defaults and not defaults:
            defaults.update(original(manager, include_path=None, include_defaults=True))
        if not ours:
            ours.update(original(manager, include_path=str(TASKS), include_defaults=False))
        named = original(manager, include_path=[*paths, str(TASKS)], include_defaults=False) if paths else ours
        return deepcopy({**named, **(defaults if include_defaults else {})})

    wrap(TaskManager, "initialize_tasks", around)


def check_names(model: str, tasks: Sequence[str]) -> None:
    """PruningError for a model or a task that the host does not have; patterns and files of tasks are let through."""
    from lmms_eval.models import list_available_models

    if model not in (models := list_available_models(include_aliases=True)):
        raise unknown("model", model, models)
    named = [task for task in tasks if "*" not in task and not Path(task).exists()]
    if named:
        from lmms_eval.tasks import TaskManager

        known = TaskManager("ERROR", model_name=model).all_tasks
        for task in named:
            if task not in known:
                close = ", ".join(get_close_matches(task, known, n=3)) or "see `lmms-eval tasks list`"
                raise PruningError(f"unknown task '{task}'. Nearest: {close}")
