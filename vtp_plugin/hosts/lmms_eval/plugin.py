"""lmms-eval: `--pruning`, its folding into `model_args`, attaching to the model, and the proof in the results.

The host loads `register` as an entry point while it imports its models, before it parses arguments. From there:

* the evaluation's argument parser gets `--pruning` and `--pruning_args`, which are checked at once and folded into
  `model_args` as `pruning=NAMES,pruning.FIELD=VALUE`, the one carrier that also serves `--config` files, the server and
  `simple_evaluate(model_args=...)`;
* model classes come out of the registry with a constructor that takes these arguments away, builds the host's own
  class, and attaches the strategies to the instance;
* that one run is followed to its end, where the proof is written (evaluation.py).

A run without `pruning` and without `vtp-tiny` takes none of these paths.
"""

from __future__ import annotations

import argparse
import atexit
import importlib
import inspect
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from difflib import get_close_matches
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import yaml

from vtp_plugin import config, plugins
from vtp_plugin.errors import PruningError, unknown
from vtp_plugin.hosts import llava
from vtp_plugin.hosts.lmms_eval.evaluation import KEY, Run
from vtp_plugin.hosts.lmms_eval.perturb import Perturbation
from vtp_plugin.hosts.wrapping import wrap
from vtp_plugin.pruning import Pruned
from vtp_plugin.strategy import PruningStrategy
from vtp_plugin.tiny import checkpoint

PERTURB = f"{KEY}.perturb"  # beside the hyper-parameters: harder pictures or questions, see perturb.py
TINY_LAYOUTS = {"llava": "llava", "llava_hf": "hf"}
TASKS = Path(__file__).parent / "tasks"
VLLM = ("vllm", "vllm_generate")  # models that live in the processes of an engine: hooks do not reach them
CPU_ARGUMENTS = {"llava": {"device": "cpu", "device_map": "auto"}}  # what a class needs beside a CUDA-only default
CPU_DEFAULT = {"device": "cpu", "device_map": "cpu"}

_failed = False  # a pruned run of this process raised: the host would exit with 0


def register() -> list[Any]:
    """Entry point of the group `lmms_eval.models`: brings no model, extends the host. Never raises."""
    from lmms_eval.models.registry_v2 import ModelRegistryV2

    if not hasattr(argparse.ArgumentParser.parse_known_args, "_vtp"):
        wrap(argparse.ArgumentParser, "parse_known_args", _parsing)
        wrap(ModelRegistryV2, "get_model_class", _resolving)
        _offer_tasks()
        atexit.register(_exit_code)
    return []


def _exit_code() -> None:
    """The host exits with 0 after an exception; a pruned run that failed must not."""
    if _failed:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(1)


def _offer_tasks() -> None:
    """Let every TaskManager find our tasks, as if they had been named with --include_path.

    The host's own tasks, 1600 files that take seconds, are read once for all configurations of a process.
    """
    from lmms_eval.tasks import TaskManager

    defaults: dict[str, Any] = {}

    def around(original: Callable, manager: Any, include_path: Any = None, include_defaults: bool = True) -> Any:
        paths = [include_path] if isinstance(include_path, str) else list(include_path or [])
        if include_defaults and not defaults:
            defaults.update(original(manager, include_path=None, include_defaults=True))
        named = original(manager, include_path=[*paths, str(TASKS)], include_defaults=False)
        return {**named, **(deepcopy(defaults) if include_defaults else {})}

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


# -- the command line -------------------------------------------------------------------------------------------------


def _parsing(original: Callable, parser: argparse.ArgumentParser, *args: Any, **kwargs: Any) -> Any:
    """Add our options to the evaluation's parser, and check what the user said before anything is loaded."""
    if not {"--model_args", "--include_path", "--log_samples"} <= set(parser._option_string_actions):
        return original(parser, *args, **kwargs)
    if "--pruning" not in parser._option_string_actions:
        _add_options(parser)
    namespace, rest = original(parser, *args, **kwargs)
    try:
        for settings in _all_settings(namespace):
            _settings(settings)
    except PruningError as error:
        parser.exit(2, f"{parser.prog}: error: {error}\n")
    host = inspect.currentframe().f_back
    while host is not None and "cli_evaluate_single" not in host.f_globals:
        host = host.f_back
    if host is not None and not hasattr(host.f_globals["cli_evaluate_single"], "_vtp"):
        wrap(SimpleModule(host.f_globals), "cli_evaluate_single", _evaluating)
    return namespace, rest


def _add_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("visual token pruning (vtp-plugin)")
    group.add_argument(
        "--pruning",
        type=str,
        default=None,
        metavar="NAME[+NAME...]|FILE.yaml",
        help=f"Strategies to prune visual tokens with: {', '.join(plugins.list_strategies())}, or none",
    )
    group.add_argument(
        "--pruning_args",
        "--pruning-args",
        type=str,
        default=None,
        metavar="KEY=VALUE,...",
        help="Their hyper-parameters, e.g. keep_ratio=0.6,alpha=0.5; with several strategies fastv.layer=2",
    )


def _all_settings(namespace: argparse.Namespace) -> list[dict[str, Any]]:
    """What the command line says, and every entry of its --config file under it."""
    said = {k: v for k in (KEY, "pruning_args", "model_args") if (v := getattr(namespace, k, None))}
    path = getattr(namespace, "config", None)
    if not path or not Path(path).is_file():
        return [said]
    entries = yaml.safe_load(Path(path).read_text())
    entries = entries if isinstance(entries, list) else [entries]
    return [{**entry, **said} for entry in entries if isinstance(entry, dict)]


def _evaluating(original: Callable, args: argparse.Namespace) -> Any:
    """One configuration of the command line: fold our options into model_args, remember a failure."""
    global _failed
    settings = vars(args)
    if os.environ.get("VTP_GALLERY_EACH") and args.output_path:
        os.environ["VTP_GALLERY"] = str(Path(args.output_path) / "gallery")
    try:
        args.model_args = folded(settings.get("model_args"), settings.get(KEY), settings.get("pruning_args"))
        return original(args)
    except Exception:
        _failed = _failed or f"{KEY}=" in str(args.model_args) or bool(settings.get(KEY))
        raise


class SimpleModule:
    """Attribute access to a module's globals, also where the module runs as __main__."""

    def __init__(self, variables: dict[str, Any]) -> None:
        object.__setattr__(self, "__dict__", variables)


# -- model_args, the one carrier --------------------------------------------------------------------------------------


def folded(model_args: Any, pruning: str | None, pruning_args: Any) -> Any:
    """`model_args` with our options in them."""
    if not pruning:
        if pruning_args:
            raise PruningError("--pruning_args needs --pruning")
        return model_args
    if f"{KEY}=" in str(model_args or ""):
        raise PruningError("say --pruning or pruning= in --model_args, not both")
    pairs = config.parse_pairs(pruning_args) if isinstance(pruning_args, str) else dict(pruning_args or {})
    ours = [f"{KEY}={pruning}", *(f"{KEY}.{key}={yaml_scalar(value)}" for key, value in pairs.items())]
    return ",".join(filter(None, [model_args, *ours]))


def yaml_scalar(value: Any) -> str:
    """A value as it is written on a command line."""
    return yaml.safe_dump(value, default_flow_style=True).removesuffix("...\n").strip()


def _settings(settings: Mapping[str, Any]) -> list[PruningStrategy] | None:
    """The strategies that a configuration asks for; None if it does not ask for any."""
    from lmms_eval.utils import simple_parse_args_string

    carrier = folded(settings.get("model_args"), settings.get(KEY), settings.get("pruning_args"))
    return strategies_of(simple_parse_args_string(carrier) if isinstance(carrier, str) else carrier or {})


def strategies_of(arguments: Mapping[str, Any]) -> list[PruningStrategy] | None:
    """The strategies in parsed model arguments; None if there are none."""
    if KEY not in arguments:
        if ours := [name for name in arguments if name.startswith(f"{KEY}.")]:
            raise PruningError(f"{ours[0]} needs {KEY}=NAME")
        return None
    perturbation_of(arguments)
    return config.resolve(str(arguments[KEY]), settings_of(arguments))


def perturbation_of(arguments: Mapping[str, Any]) -> Perturbation | None:
    """What is to be done to pictures or questions; None if nothing."""
    return Perturbation.parse(arguments[PERTURB]) if PERTURB in arguments else None


def settings_of(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The hyper-parameters among parsed model arguments."""
    ours = {k: v for k, v in arguments.items() if k.startswith(f"{KEY}.") and k != PERTURB}
    return {name.removeprefix(f"{KEY}."): _typed(value) for name, value in ours.items()}


def _typed(value: Any) -> Any:
    return yaml.safe_load(value) if isinstance(value, str) else value


# -- the model --------------------------------------------------------------------------------------------------------


def _resolving(original: Callable, registry: Any, model_name: str, *args: Any, **kwargs: Any) -> type:
    """The host's model class, with a constructor that understands `pruning` and `vtp-tiny`."""
    host = original(registry, model_name, *args, **kwargs)
    model_id = registry.resolve(model_name, *args, **kwargs).model_id

    class Prunable(host):
        def __new__(cls, *positional: Any, **arguments: Any) -> Any:
            names = list(inspect.signature(host.__init__).parameters)[1:]
            return build(host, model_id, dict(zip(names, positional, strict=False)) | arguments)

        @classmethod
        def create_from_arg_string(cls, arg_string: str, additional_config: dict | None = None) -> Any:
            from lmms_eval.utils import simple_parse_args_string

            return cls.create_from_arg_obj(simple_parse_args_string(arg_string), additional_config)

        @classmethod
        def create_from_arg_obj(cls, arg_dict: dict, additional_config: dict | None = None) -> Any:
            said = {k: v for k, v in (additional_config or {}).items() if v is not None}
            return build(host, model_id, {**arg_dict, **said})

    Prunable.__name__, Prunable.__qualname__, Prunable.__module__ = host.__name__, host.__qualname__, host.__module__
    return Prunable


def build(host: type, model_id: str, arguments: Mapping[str, Any]) -> Any:
    """The host's model from its arguments, pruned if they say so."""
    strategies = strategies_of(arguments)
    rest = {k: v for k, v in arguments.items() if k != KEY and not k.startswith(f"{KEY}.")}
    if model_id in VLLM:
        return importlib.import_module("vtp_plugin.hosts.lmms_eval.served").build(
            host,
            strategies,
            {"strategy": arguments.get(KEY), **settings_of(arguments)},
            rest,
            perturbation_of(arguments),
        )
    tiny = rest.get("pretrained") == checkpoint.NAME
    if strategies is None and not tiny:
        return host(**rest)
    if tiny:
        rest["pretrained"] = str(_tiny(model_id))
    lm = host(**_with_device(host, model_id, rest))
    if llava.is_authors(lm.model):
        llava.make_ready(lm.model)
    if strategies is not None:
        Run(lm, attach(lm, strategies), strategies, perturbation_of(arguments)).install()
    return lm


def attach(lm: Any, strategies: list[PruningStrategy]) -> Pruned:
    """Ask the plugins to attach the strategies to a host's model."""
    return plugins.manager().hook.vtp_model_loaded(lm=lm, model=lm.model, processor=_processor(lm), config=strategies)


def _processor(lm: Any) -> Any:
    """The host's processor, or its image processor and tokenizer side by side."""
    names = ("processor", "_processor", "_image_processor")
    found = [p for name in names if (p := getattr(lm, name, None)) is not None]
    whole = [p for p in found if hasattr(p, "image_processor")]
    if whole:
        return whole[0]
    return SimpleNamespace(image_processor=found[0] if found else None, tokenizer=getattr(lm, "_tokenizer", None))


def _tiny(model_id: str) -> Path:
    """The embedded model in the layout that this model class reads."""
    if model_id not in TINY_LAYOUTS:
        raise unknown("model for vtp-tiny", model_id, TINY_LAYOUTS)
    return checkpoint.resolve(layout=TINY_LAYOUTS[model_id])


def _with_device(host: type, model_id: str, arguments: dict[str, Any]) -> dict[str, Any]:
    """On a machine without CUDA, the device arguments that the class needs and the user did not give."""
    from loguru import logger

    if torch.cuda.is_available():
        return arguments
    known = inspect.signature(host.__init__).parameters
    wanted = CPU_ARGUMENTS.get(model_id, CPU_DEFAULT)
    added = {k: v for k, v in wanted.items() if k in known and k not in arguments}
    if added:
        said = ", ".join(f"{k}={v}" for k, v in added.items())
        logger.info(f"vtp-plugin: no CUDA device, adding {said} to the arguments of {model_id}")
    return {**arguments, **added}
