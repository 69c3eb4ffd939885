"""The configurations of a comparison: cells with names, budgets, seeds and positions."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from vtp_plugin import config
from vtp_plugin.errors import PruningError
from vtp_plugin.hosts.lmms_eval.building import VLLM
from vtp_plugin.hosts.lmms_eval.perturb import Perturbation
from vtp_plugin.plugins import strategies as catalogue
from vtp_plugin.reporting import schema
from vtp_plugin.reporting.runs import BASELINE, Spec

UNPRUNED = Spec(id=BASELINE, label="unpruned", pruning=BASELINE)
ALL = "all"
OWN, SHARED = "own", "shared"
POLICIES = ("original", "compact", OWN, SHARED)  # for the positions of kept tokens
SEEDS = 1000  # at most


def cells(pruning: Sequence[str], keep: Sequence[float] = (), seeds: int = 1) -> list[Spec]:
    """The unpruned model, then every specification at every keep ratio, those with a random seed `seeds` times.

    `all` stands for every strategy of the catalogue that is for pictures. A specification without a budget (V-PRUNE)
    and one with settings of its own (a file) stands once, as it is.
    """
    if seeds < 1:
        raise PruningError(f"seeds must be at least 1, got {seeds}")
    if seeds > SEEDS:
        raise PruningError(f"seeds must be at most {SEEDS}, got {seeds}")
    made = [UNPRUNED]
    everything = [name for name, cls in catalogue().items() if cls.pictures]
    for spec in (name for given in pruning for name in (everything if given == ALL else [given])):
        strategies = config.resolve(spec)
        if spec == BASELINE:
            continue
        free = not config.is_setting(spec) and any(strategy.budgeted for strategy in strategies)
        seeded = seeds > 1 and any("seed" in strategy.fields() for strategy in strategies)
        for ratio in keep if free and keep else [None]:
            made += [cell(spec, ratio, seed) for seed in (range(seeds) if seeded else [None])]
    return unique(made)


def numbered(cells: Sequence[Spec], positions: str, model: str = "") -> list[Spec]:
    """The same cells with one policy for the positions of kept tokens, so that no method is ahead by its numbering.

    `positions`: original, compact, own (what each method's paper does), or shared, which is original where the host
    can (vLLM counts columns). A cell whose settings say it keeps what they say.
    """
    if positions not in POLICIES:
        raise PruningError(f"positions must be one of {', '.join(POLICIES)}, got '{positions}'")
    if positions == SHARED:
        positions = "compact" if model in VLLM else "original"
    return list(cells) if positions == OWN else [_numbered(each, positions) for each in cells]


def _numbered(spec: Spec, positions: str) -> Spec:
    said = any(key.rpartition(".")[2] == "positions" for key in spec.pruning_args)
    if spec.pruning == BASELINE or said or any(strategy.positions for strategy in config.resolve(spec.pruning)):
        return spec
    return replace(spec, pruning_args={**spec.pruning_args, "positions": positions})


def cell(
    spec: str,
    keep: float | None = None,
    seed: int | None = None,
    *,
    id: str | None = None,
    label: str | None = None,
    **fields: Any,
) -> Spec:
    """One configuration, checked. `fields` are further hyper-parameters; names are made where none is given."""
    arguments = {"keep_ratio": keep, "seed": seed}
    arguments = {key: value for key, value in arguments.items() if value is not None} | fields
    resolve(spec, arguments)
    id = id or _name(spec, keep, seed)
    label = label or (UNPRUNED.label if spec == BASELINE else id)
    return Spec(id=id, label=label, pruning=spec, pruning_args=arguments, seed=seed, keep=keep)


def _name(spec: str, keep: float | None, seed: int | None) -> str:
    """atp-0.25, random-0.25-seed3, vprune, fastv-k2_r50."""
    name = Path(spec).stem if spec.endswith((".yaml", ".yml")) else spec.replace(":", "-").replace(" ", "")
    name = re.sub(r"[^A-Za-z0-9._+=@-]", "_", name)
    parts = (name, "" if keep is None else f"{keep:g}", "" if seed is None else f"seed{seed}")
    return "-".join(filter(None, parts))


def unique(made: Sequence[Spec]) -> list[Spec]:
    """The same cells, if no two different ones have the same name; one that is named twice stands once."""
    found: dict[str, Spec] = {}
    for each in made:
        if found.setdefault(each.id, each) != each:
            raise PruningError(f"two different cells are named '{each.id}'")
        try:
            schema.folder_name(each.id)
        except ValueError as error:
            raise PruningError(str(error)) from None
    return list(found.values())


def resolve(spec: str, arguments: Mapping[str, Any]) -> None:
    """Refuse strategies, hyper-parameters and a perturbation that there are not."""
    said = dict(arguments)
    if perturbation := said.pop("perturb", None):
        Perturbation.parse(str(perturbation))
    config.resolve(spec, said)
