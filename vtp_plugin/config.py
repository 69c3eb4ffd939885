"""From names, key=value pairs and YAML files to strategies. Everything that a user can misspell is refused here."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from itertools import pairwise
from math import prod
from pathlib import Path
from typing import Any

from vtp_plugin import files, settings
from vtp_plugin.errors import PruningError, unknown
from vtp_plugin.plugins import get_strategy
from vtp_plugin.stages import Stage
from vtp_plugin.strategy import PruningStrategy

SHARED = "positions"  # without a strategy's name in front: for every strategy
TOTAL = "keep_ratio"  # without a strategy's name in front, over several strategies: the budget of all together
NONE = "none"  # the unpruned model with the same measurements and record

Spec = str | Path | PruningStrategy | Mapping[str, Any] | Sequence[str | PruningStrategy | Mapping[str, Any]]


def resolve(spec: Spec, args: Mapping[str, Any] | None = None) -> list[PruningStrategy]:
    """The strategies of `atp`, `vprune+fastv:k2_r50`, `runs/x.yaml`, objects or a list of them, in stage order.

    `NAME:SETTING` is a setting that comes with the package, see settings.py.

    `args` are hyper-parameters: `alpha`, or `atp.alpha` where several strategies have a field of that name. A bare
    `keep_ratio` over several is what all of them leave together; see `_shares`.
    """
    if isinstance(spec, PruningStrategy):
        spec = [spec]
    if isinstance(spec, Mapping):
        return _of_mapping(spec, args or {})
    if not isinstance(spec, (str, Path)):
        _check_list(spec)
        if all(isinstance(part, str) for part in spec):
            return resolve("+".join(spec), args)
        if args:
            raise PruningError(f"hyper-parameters belong into the strategy objects, got {', '.join(args)} beside them")
        return _ordered([s for part in spec for s in ([part] if isinstance(part, PruningStrategy) else resolve(part))])
    fields, source = _read(spec)
    _distribute(fields, _spelled(args or {}))
    return _ordered([build(name, own, source) for name, own in fields.items()])


def _check_list(spec: Any) -> None:
    """Refuse what is no list of strategies, and an empty one."""
    if not isinstance(spec, Sequence):
        found = spec.__name__ if isinstance(spec, type) else repr(spec)
        raise PruningError(
            f"expected a strategy's name, a YAML file, a strategy object or a list of these, got {found}"
        )
    if not spec:
        raise PruningError(f"no strategy was named; say '{NONE}' for the unpruned model")


def is_setting(spec: str) -> bool:
    """Whether a specification brings hyper-parameters of its own: a file, or a setting by name."""
    return spec.strip().endswith((".yaml", ".yml")) or ":" in spec


def _of_mapping(spec: Mapping[str, Any], args: Mapping[str, Any]) -> list[PruningStrategy]:
    """`{"strategy": NAME, field: value}` as in a file, or `{NAME: {field: value}}`."""
    if not spec or not all(isinstance(key, str) for key in spec):
        raise PruningError(f"no strategy was named in {dict(spec)}; say '{NONE}' for the unpruned model")
    if "strategy" in spec:
        return resolve(str(spec["strategy"]), {k: v for k, v in spec.items() if k != "strategy"} | dict(args))
    if "strategies" in spec:
        if len(spec) > 1:
            raise PruningError("nothing can stand beside 'strategies': put it into one of its entries")
        return resolve(list(spec["strategies"]), args)
    fields = {name: {} if value is None else value for name, value in spec.items()}
    for name, value in fields.items():
        if not isinstance(value, Mapping):
            raise PruningError(f"expected the fields of '{name}' as a dictionary, got {value!r}")
    return resolve(
        "+".join(fields), {f"{n}.{k}": v for n, value in fields.items() for k, v in value.items()} | dict(args)
    )


def build(name: str, fields: Mapping[str, Any], source: str = "") -> PruningStrategy:
    """One strategy from its fields; `source` (a file) goes in front of the message if something is wrong."""
    cls = get_strategy(name)
    for field in fields:
        if field not in cls.fields():
            raise _located(source, unknown("field", field, cls.fields(), of=f" for strategy '{name}'", listed="Fields"))
    try:
        return cls(**fields)
    except PruningError as error:
        raise _located(source, error) from None


def parse_names(said: str | Sequence[str], option: str) -> list[str]:
    """`atp,fastv+l2`, or a list, as a list of every name once. PruningError with the option where one is missing."""
    names = [name.strip() for name in (said.split(",") if isinstance(said, str) else said)]
    if not names or not all(names):
        raise PruningError(f"{option}: a name is missing in {said!r}")
    return list(dict.fromkeys(names))


def parse_numbers(text: str, kind: type, option: str) -> list[Any]:
    """`0.5,0.25` as a list, every number once. PruningError with the option for what is no number of that kind."""
    try:
        return list(dict.fromkeys(kind(part) for part in text.split(",")))
    except ValueError:
        raise PruningError(f"{option} must be numbers separated by commas, got '{text}'") from None


def parse_pairs(text: str) -> dict[str, Any]:
    """`keep_ratio=0.6,fastv.layer=2` as a dictionary; values as YAML reads them, hyphens in keys allowed.

    An empty place between commas is skipped, as the hosts do; commas and nothing else are refused.
    """
    pairs: list[tuple[str, Any]] = []
    for part in filter(None, (p.strip() for p in text.split(","))):
        key, equals, value = part.partition("=")
        if not equals or not key.strip() or not value.strip():
            raise PruningError(f"cannot read '{part}' of the pruning arguments. Expected key=value[,key=value...]")
        pairs.append((key.strip(), _value(part, value)))
    if text.strip() and not pairs:
        raise PruningError(f"no pruning argument in '{text}'. Expected key=value[,key=value...]")
    return _once(pairs)


def _value(part: str, text: str) -> Any:
    """A value as YAML reads it."""
    try:
        return files.parse_yaml(text.strip())
    except PruningError as error:
        raise PruningError(
            f"cannot read '{part}' of the pruning arguments ({error}). Expected key=value[,key=value...]"
        ) from None


def _spelled(args: Mapping[str, Any]) -> dict[str, Any]:
    """The same arguments with underscores in their names."""
    return _once([(str(key), value) for key, value in args.items()])


def _once(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    """Arguments by name, hyphens as underscores. PruningError if one is given twice with different values."""
    found: dict[str, tuple[str, Any]] = {}
    for said, value in pairs:
        before, other = found.setdefault(_key(said), (said, value))
        if other is not value and (type(other) is not type(value) or other != value):
            raise PruningError(f"given twice with different values: {before}={other!r} and {said}={value!r}")
    return {key: value for key, (_, value) in found.items()}


def describe(strategies: Sequence[PruningStrategy]) -> list[dict[str, Any]]:
    """Name, stage and full configuration of every strategy, as JSON."""
    return [{"name": s.name, "stage": s.stage.value, "config": s.config()} for s in strategies]


def fingerprint(strategies: Sequence[PruningStrategy], version: str) -> str:
    """The same text for the same behaviour: every value, defaults included, and the plugin's version."""
    return json.dumps([version, describe(strategies)], sort_keys=True, default=str)


def _read(spec: str | Path) -> tuple[dict[str, dict[str, Any]], str]:
    """Fields by strategy name, and the file that they come from."""
    text = str(spec).strip()
    if text.endswith((".yaml", ".yml")) or isinstance(spec, Path):
        return _read_file(Path(text)), text
    names = [name.strip() for name in text.split("+")]
    if names == [NONE]:
        return {}, ""
    if "," in text:
        raise PruningError(f"'{text}': use + to compose strategies; only `vtp compare` and its like take commas")
    found: dict[str, dict[str, Any]] = {}
    for name, colon, setting in (each.partition(":") for each in names):
        if name == NONE:
            raise PruningError(f"'none' cannot be combined with other strategies, got '{text}'")
        get_strategy(name)
        if name in found:
            raise PruningError(f"a strategy is named twice in '{text}'")
        found[name] = settings.named(name, setting) if colon else {}
    return found, ""


def _read_file(path: Path) -> dict[str, dict[str, Any]]:
    """A YAML file: `strategy: NAME` with its fields beside it, or `strategies:` with a list of such entries."""
    if not path.is_file():
        raise PruningError(f"pruning file not found: {path}")
    content = files.read_yaml(path)
    alone = isinstance(content, dict) and "strategies" not in content
    entries = [content] if alone else content.get("strategies") if isinstance(content, dict) else content
    if not isinstance(entries, list) or not entries or not all(map(_is_entry, entries)):
        raise PruningError(f"{path}: expected 'strategy: NAME' and its fields, or a list of such entries")
    if isinstance(content, dict) and not alone and len(content) > 1:
        beside = next(key for key in content if key != "strategies")
        raise PruningError(f"{path}: '{beside}' stands beside 'strategies': put it into one of the entries")
    names = [e["strategy"] for e in entries]
    if entries == [{"strategy": NONE}]:
        return {}
    if len(set(names)) < len(names):
        raise PruningError(f"{path}: a strategy is named twice in {', '.join(names)}")
    try:
        return {e["strategy"]: _spelled({k: v for k, v in e.items() if k != "strategy"}) for e in entries}
    except PruningError as error:
        raise _located(str(path), error) from None


def _is_entry(entry: Any) -> bool:
    return isinstance(entry, dict) and isinstance(entry.get("strategy"), str) and all(isinstance(k, str) for k in entry)


def _distribute(fields_of: dict[str, dict[str, Any]], args: Mapping[str, Any]) -> None:
    """Put every argument where it belongs; a bare key must be a field of exactly one strategy, or a total budget."""
    for key, value in args.items():
        name, dot, field = key.rpartition(".")
        if dot:
            if name not in fields_of:
                raise PruningError(f"'{key}' names no strategy of this run. Strategies: {', '.join(fields_of) or NONE}")
            fields_of[name][field] = value
            continue
        owners = [s for s in fields_of if key in get_strategy(s).fields()]
        if not owners:
            fields = {field for s in fields_of for field in get_strategy(s).fields()}
            raise unknown("field", key, fields, of=f" for '{'+'.join(fields_of) or NONE}'", listed="Fields")
        if len(owners) > 1 and key == TOTAL:
            for owner, share in _shares(value, owners, fields_of, args).items():
                fields_of[owner][key] = share
            continue
        if len(owners) > 1 and key == SHARED:
            for owner in owners:
                fields_of[owner][key] = args.get(f"{owner}.{key}", value)
            continue
        if len(owners) > 1:
            options = " or ".join(f"{owner}.{key}" for owner in owners)
            raise PruningError(f"'{key}' is a field of several strategies; say {options}")
        if (own := f"{owners[0]}.{key}") in args and args[own] != value:
            raise PruningError(f"given twice with different values: {key}={value!r} and {own}={args[own]!r}")
        fields_of[owners[0]][key] = value


def _shares(
    total: Any, owners: Sequence[str], fields_of: Mapping[str, Mapping[str, Any]], args: Mapping[str, Any]
) -> dict[str, Any]:
    """What each strategy keeps of what reaches it, so that all of them together keep `total`.

    Ratios multiply, so each of m strategies gets the m-th root. A ratio given to one of them by name is taken out
    first; a strategy with its own keep_tokens, or without a budget (V-PRUNE), takes no part.
    """
    own = {owner: args[f"{owner}.{TOTAL}"] for owner in owners if f"{owner}.{TOTAL}" in args}
    counted = [o for o in owners if "keep_tokens" in fields_of[o] or f"{o}.keep_tokens" in args]
    sharing = [owner for owner in owners if owner not in own and owner not in counted]
    if not sharing:
        raise PruningError(f"'{TOTAL}' is the budget of all strategies together, but each of them has its own already")
    ratios = [total, *own.values()]
    if not all(type(ratio) in (int, float) and 0 < ratio <= 1 for ratio in ratios):
        return dict.fromkeys(sharing, total)  # the strategies say what is wrong with it
    rest = total / prod(own.values())
    if rest > 1:
        raise PruningError(f"{TOTAL}={total:g} for all strategies together, but {', '.join(own)} alone keep less")
    return dict.fromkeys(sharing, rest ** (1 / len(sharing)))


def _ordered(strategies: list[PruningStrategy]) -> list[PruningStrategy]:
    """In the order in which an image meets them; one that merges comes last in its stage."""
    ordered = sorted(strategies, key=lambda s: (s.stage.order, s.decoder_layer or 0, s.merges))
    for first, second in pairwise(ordered):
        if first.merges and first.stage is second.stage is not Stage.LLM:  # there new values keep a column
            raise PruningError(f"{first.name} and {second.name} both merge tokens at the {first.stage.value} stage")
    return ordered


def _key(key: str) -> str:
    return key.replace("-", "_")


def _located(source: str, error: PruningError) -> PruningError:
    return PruningError(f"{source}: {error}") if source else error
