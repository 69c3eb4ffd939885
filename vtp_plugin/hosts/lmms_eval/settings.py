"""What a configuration says about pruning: on the command line, in a `--config` file, or inside `model_args`.

`model_args` is the one carrier that every route into the host shares: `pruning=NAMES,pruning.FIELD=VALUE`. Flags are
folded into it. Whatever is misspelt, empty or said twice is refused here, before anything is loaded.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import yaml

from vtp_plugin import config, files
from vtp_plugin.errors import PruningError
from vtp_plugin.hosts.lmms_eval.perturb import Perturbation
from vtp_plugin.strategy import PruningStrategy
from vtp_plugin.tiny import checkpoint

KEY, ARGS, MODULES = "pruning", "pruning_args", "pruning_module"
CARRIER, TASKS = "model_args", "tasks"
PERTURB = f"{KEY}.perturb"  # beside the hyper-parameters: harder pictures or questions, see perturb.py
FIELDS = (KEY, ARGS, CARRIER, TASKS)
ALIKE = 0.75  # of difflib: prunning, purning and the like are no argument of any model


# -- where it is said -------------------------------------------------------------------------------------------------


def entries(path: Path) -> list[dict[str, Any]]:
    """The evaluations in a `--config` file; PruningError if one of pruning is no plain YAML, the rest is the host's."""
    try:
        found = _mappings(yaml.safe_load(path.read_text()))
    except (yaml.YAMLError, OSError, UnicodeDecodeError, RecursionError):
        return []
    return _mappings(files.read_yaml(path)) if any(map(_ours, found)) else found


def _mappings(content: Any) -> list[dict[str, Any]]:
    return [entry for entry in (content if isinstance(content, list) else [content]) if isinstance(entry, dict)]


def _ours(entry: Mapping[str, Any]) -> bool:
    return any(name in entry for name in (KEY, ARGS, MODULES)) or KEY in str(entry.get(CARRIER))


def every(said: Mapping[str, Any], config_file: Any) -> Iterator[dict[str, Any]]:
    """What every evaluation of a command line is told: the file's entries, each under what the command line says."""
    refuse_empty(said)
    given = {name: said[name] for name in FIELDS if said.get(name) is not None}
    if not config_file or not Path(config_file).is_file():
        yield given
        return
    for entry in entries(Path(config_file)):
        refuse_empty(entry, f"{config_file}: ", written=True)
        yield {**entry, **{name: value for name, value in given.items() if value != ""}}


def modules(said: Mapping[str, Any], config_file: Any) -> list[str]:
    """The Python files that a command line and its file of evaluations name."""
    found = list(said.get(MODULES) or [])
    for entry in entries(Path(config_file)) if config_file and Path(config_file).is_file() else []:
        named = entry.get(MODULES, [])
        named = [named] if isinstance(named, str) else named
        if not isinstance(named, list) or not all(isinstance(name, str) for name in named):
            raise PruningError(f"{config_file}: {MODULES} must be FILE.py or a list of these, got {named!r}")
        found += [name for name in named if name not in found]
    if not all(name.strip() for name in found):
        raise PruningError(f"{MODULES} is empty: say FILE.py, or leave it out")
    return found


def refuse_empty(said: Mapping[str, Any], where: str = "", *, written: bool = False) -> None:
    """An unset shell variable or a key without a value is no wish for the unpruned model."""
    for name in (KEY, ARGS):
        value = said.get(name, 0)
        if (isinstance(value, str) and not value.strip()) or (written and value is None):
            example = "NAME, or leave it out" if name == KEY else "KEY=VALUE, or leave it out"
            raise PruningError(f"{where}{name} is empty: say {example}")


def refuse_output(path: Any) -> None:
    """Where the host could write nothing it says so after the work, and ends well; commas end its own options."""
    if not path:
        return
    if "," in str(path):
        raise PruningError(f"--output_path {path}: the host cannot read a path with a comma")
    files.check_folder(str(path))


# -- model_args, the one carrier --------------------------------------------------------------------------------------


def folded(model_args: Any, pruning: Any, pruning_args: Any) -> Any:
    """`model_args` with our options in them."""
    if pruning is None:
        if pruning_args is not None:
            raise PruningError("--pruning_args needs --pruning")
        return model_args
    pairs, inside = _pairs(pruning_args), said_in(model_args)
    if KEY in inside:
        raise PruningError(f"say --pruning {pruning} or pruning={inside[KEY]} in --model_args, not both")
    for key in pairs:
        if f"{KEY}.{key}" in inside:
            raise PruningError(f"'{key}' is said twice: in --pruning_args and as {KEY}.{key} in --model_args")
    ours = [f"{KEY}={_names(pruning)}", *(f"{KEY}.{key}={yaml_scalar(value)}" for key, value in pairs.items())]
    return ",".join(filter(None, [model_args, *ours]))


def _pairs(pruning_args: Any) -> dict[str, Any]:
    """Hyper-parameters as text or as a mapping, hyphens in keys allowed."""
    if isinstance(pruning_args, str):
        once(part.partition("=")[::2] for part in pruning_args.split(",") if "=" in part)
        return config.parse_pairs(pruning_args)
    if pruning_args is not None and not isinstance(pruning_args, Mapping):
        raise PruningError(f"pruning_args must be KEY=VALUE,... or a mapping, got {pruning_args!r}")
    given = {str(key): value for key, value in (pruning_args or {}).items()}
    once((key, repr(value)) for key, value in given.items())
    return {key.replace("-", "_"): value for key, value in given.items()}


def once(pairs: Iterable[tuple[str, str]]) -> dict[str, str]:
    """The values by key, in one spelling. PruningError if a key has two, in whatever spelling."""
    seen: dict[str, tuple[str, str]] = {}
    for key, value in pairs:
        said, name = (key.strip(), value.strip()), key.strip().replace("-", "_")
        if seen.setdefault(name, said)[1] != said[1]:
            first = "=".join(seen[name])
            raise PruningError(f"'{name}' is said twice with different values: {first} and {'='.join(said)}")
    return {name: value for name, (_, value) in seen.items()}


def _names(pruning: Any) -> str:
    """What `pruning` says, if it can be names or a file."""
    if not isinstance(pruning, str):
        raise PruningError(f"pruning must be NAME[+NAME...] or FILE.yaml, got {pruning!r}")
    if not pruning.strip():
        raise PruningError("pruning is empty: say NAME, or leave it out")
    if "," in pruning:
        composed = "+".join(config.parse_names(pruning, KEY))
        raise PruningError(f"'{pruning}': use + to compose ({composed}); vtp compare takes commas")
    return pruning.strip()


def yaml_scalar(value: Any) -> str:
    """A value as it is written on a command line."""
    return yaml.safe_dump(value, default_flow_style=True).removesuffix("...\n").strip()


def concern(model_args: Any, known: Iterable[str]) -> bool:
    """Whether model arguments ask for pruning or for an embedded model; `known` are the model class's own."""
    pairs = [part.partition("=") for part in str(model_args or "").split(",")]
    refuse_alike({key.strip(): value for key, equals, value in pairs if equals}, known)
    return bool(said_in(model_args)) or any(value.strip() in checkpoint.NAMES for _, _, value in pairs)


def said_in(model_args: Any) -> dict[str, str]:
    """Our keys among model arguments as they are written; PruningError for what cannot be meant."""
    found: list[tuple[str, str]] = []
    before = ""
    for part in str(model_args or "").split(","):
        key, equals, value = (piece.strip() for piece in part.partition("="))
        if not equals and key and before == KEY:
            _names(f"{found[-1][1]},{key}")
        before = key if equals else before
        if is_ours(key) and equals:
            found.append((key, value))
    return once(found)


def is_ours(name: str) -> bool:
    """Whether a model argument is for the plugin, whatever its field is."""
    return name == KEY or name.startswith(f"{KEY}.")


def refuse_alike(arguments: Mapping[str, Any], known: Iterable[str]) -> None:
    """PruningError for `prunning=`, which some model classes would swallow; `known` are the class's own arguments."""
    for name in arguments:
        head = name.partition(".")[0]
        misspelt = head.lower().startswith(KEY) or get_close_matches(head.lower(), [KEY], cutoff=ALIKE)
        if misspelt and head != KEY and name not in known:
            raise PruningError(f"unknown model argument '{name}'. Did you mean '{KEY}{name[len(head) :]}'?")


# -- what it means ----------------------------------------------------------------------------------------------------


def strategies_in(said: Mapping[str, Any]) -> list[PruningStrategy] | None:
    """The strategies that an evaluation asks for; None if it does not ask for any. PruningError for any mistake."""
    from lmms_eval.utils import simple_parse_args_string

    carrier = folded(said.get(CARRIER), said.get(KEY), said.get(ARGS))
    if not said_in(carrier):
        return None
    chosen = strategies_of(simple_parse_args_string(carrier))
    if chosen is not None and not said.get(TASKS):
        raise PruningError("pruning needs --tasks: nothing would be evaluated")
    return chosen


def strategies_of(arguments: Mapping[str, Any]) -> list[PruningStrategy] | None:
    """The strategies in parsed model arguments; None if there are none."""
    if KEY not in arguments:
        if ours := [name for name in arguments if is_ours(name)]:
            raise PruningError(f"{ours[0]} needs {KEY}=NAME")
        return None
    perturbation_of(arguments)
    return config.resolve(_names(arguments[KEY]), settings_of(arguments))


def perturbation_of(arguments: Mapping[str, Any]) -> Perturbation | None:
    """What is to be done to pictures or questions; None if nothing."""
    return Perturbation.parse(arguments[PERTURB]) if PERTURB in arguments else None


def settings_of(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The hyper-parameters among parsed model arguments."""
    ours = {k: v for k, v in arguments.items() if k.startswith(f"{KEY}.") and k != PERTURB}
    return {name.removeprefix(f"{KEY}."): _typed(name, value) for name, value in ours.items()}


def _typed(name: str, value: Any) -> Any:
    """A value as it was written: the host reads -1 as -1.0, because only digits are a whole number to it."""
    if isinstance(value, float) and value < 0 and value.is_integer():
        return int(value)
    if not isinstance(value, str):
        return value
    try:
        return files.parse_yaml(value)
    except PruningError as error:
        raise PruningError(f"cannot read {name}={value} of the model arguments ({error})") from None


def others(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The host's own model arguments."""
    return {name: value for name, value in arguments.items() if not is_ours(name)}
