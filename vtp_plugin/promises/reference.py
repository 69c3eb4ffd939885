"""A slow reference that knows no family and nothing of the surgery: one sample, no cache, everything computed.

Tokens that were dropped inside the tower stay in its sequence as nan, and no attention reads them: whatever the host
makes of the tower's output, its rows without a nan are what is left. The host then puts its rows into the prompt; the
columns that are left go through its language model once more, at positions that are said to it. Columns that were
dropped between decoder layers stay in the sequence, hidden from that layer on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn

from vtp_plugin.hosts.transformers import kernels

KERNEL = "vtp_reference"


class _Stop(Exception):
    """The language model was about to begin."""


@dataclass
class Parts:
    """Where the model has what the reference looks at."""

    tower: nn.Module | None  # nothing is dropped inside it: None
    block: nn.Module | None  # its first
    language_model: nn.Module
    layers: Any  # of the decoder


@dataclass
class Dropped:
    """What is missing from one sample."""

    tower: Tensor | None = None  # bool [T, L], or [S] where the tower sees one sequence of all images: True is dropped
    columns: Tensor | None = None  # long: columns of the whole prompt that never enter it
    late: Tensor | None = None  # long: columns that decoder layers from `layer` on do not see
    layer: int = 0
    positions: str = "original"
    late_positions: str = "original"  # of what those layers still see
    merged: tuple[Tensor, Tensor] | None = None  # columns that got the values of other columns, and these
    later: Mapping[str, int] = field(default_factory=dict)  # of a new token, in arguments with a value per column


def logits(model: nn.Module, parts: Parts, inputs: Mapping[str, Any], dropped: Dropped, new: list[int]) -> Tensor:
    """The logits behind the prompt and every new token but the last, [len(new), V], of the model without pruning."""
    with torch.no_grad():
        whole = _continued(inputs, new[:-1], {"attention_mask": 1, **dropped.later})
        told = _assembled(model, parts, whole, dropped)
        length, kept = whole["input_ids"].shape[1], _left(told, dropped)
        hidden = torch.zeros(length, dtype=torch.bool)
        if dropped.late is not None:
            hidden[dropped.late] = True
        arguments = {"inputs_embeds": told["inputs_embeds"][:, kept], "use_cache": False}
        arguments |= {n: v[:, kept] for n, v in whole.items() if _by_column(v, length) and n != "input_ids"}
        wanted, heard = _positions(told.get("position_ids"), kept, dropped.positions)
        with ExitStack() as stack:
            stack.callback(_extras(parts, told, whole, kept).remove)
            stack.callback(_rotating(parts, wanted).remove)
            for handle in _hiding(parts, hidden[kept], dropped):
                stack.callback(handle.remove)
            return model(**arguments, position_ids=heard).logits[0, -len(new) :]


def left(model: nn.Module, parts: Parts, inputs: Mapping[str, Any], dropped: Dropped) -> Tensor:
    """The columns of the prompt that enter the language model."""
    with torch.no_grad():
        return _left(_assembled(model, parts, inputs, dropped), dropped)


def _left(told: Mapping[str, Any], dropped: Dropped) -> Tensor:
    there = ~told["inputs_embeds"][0].isnan().any(-1)
    if dropped.columns is not None:
        there[dropped.columns] = False
    return there.nonzero().flatten()


def _continued(inputs: Mapping[str, Any], new: list[int], later: Mapping[str, int]) -> dict[str, Any]:
    """The arguments of one pass over the prompt and the new tokens; what has a value per column is 0 for these."""
    ids = inputs["input_ids"]
    more = torch.tensor([new], dtype=torch.long)
    whole = dict(inputs)
    for name, value in inputs.items():
        if _by_column(value, ids.shape[1]):
            fill = more if name == "input_ids" else torch.full_like(more, later.get(name, 0))
            whole[name] = torch.cat([value, fill.to(value)], 1)
    return whole


def _by_column(value: Any, length: int) -> bool:
    return isinstance(value, Tensor) and value.ndim == 2 and value.shape == (1, length)


def _assembled(model: nn.Module, parts: Parts, whole: Mapping[str, Any], dropped: Dropped) -> dict[str, Any]:
    """What the host hands to its language model; rows of dropped tokens are nan."""
    told: dict[str, Any] = {}

    def stop(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        told.update(kwargs)
        raise _Stop

    handle = parts.language_model.register_forward_pre_hook(stop, with_kwargs=True)
    try:
        with _without(parts, dropped.tower):
            model(**whole, use_cache=False)
    except _Stop:
        pass
    finally:
        handle.remove()
    if dropped.merged is not None:
        to, of = dropped.merged
        told["inputs_embeds"] = told["inputs_embeds"].index_copy(1, to, told["inputs_embeds"][:, of])
    return told


def _positions(table: Tensor | None, kept: Tensor, choice: str) -> tuple[Tensor, Tensor]:
    """Positions to rotate by, and what the host may hear: gaps in plain positions are packed sequences to it."""
    counted = torch.arange(len(kept))[None]
    if table is None or table.ndim == 2:
        return (kept[None] if choice == "original" else counted), counted
    wanted = table[..., kept] if choice == "original" else counted.expand(*table.shape[:-1], -1)
    return wanted, wanted


def _extras(parts: Parts, told: Mapping[str, Any], whole: Mapping[str, Any], kept: Tensor) -> Any:
    """A hook that hands the language model what else the host gave it: features that are added in later layers."""
    length = whole["input_ids"].shape[1]
    masks = {n: v[:, kept] for n, v in told.items() if _by_column(v, length) and v.dtype is torch.bool}
    visual = next((v[0] for n, v in told.items() if n in masks), None)
    lists = {n: v for n, v in told.items() if isinstance(v, (list, tuple)) and visual is not None}
    chosen = None if visual is None else torch.isin(visual.nonzero().flatten(), kept)
    added = masks | {n: [level[chosen] for level in levels] for n, levels in lists.items()}

    def hook(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        return args, {**kwargs, **{name: value for name, value in added.items() if kwargs.get(name) is None}}

    return parts.language_model.register_forward_pre_hook(hook, with_kwargs=True)


def _rotating(parts: Parts, positions: Tensor) -> Any:
    """A hook that lets the rotary embedding compute these positions, [1, L] or one row per axis."""

    def hook(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        if "position_ids" in kwargs:
            return args, {**kwargs, "position_ids": _like(positions, kwargs["position_ids"])}
        return (args[0], _like(positions, args[1]), *args[2:]), kwargs

    return parts.language_model.rotary_emb.register_forward_pre_hook(hook, with_kwargs=True)


def _like(positions: Tensor, given: Tensor) -> Tensor:
    """Of as many axes as the host gave; it may have put the text's own in front of the three of a picture."""
    return positions if positions.ndim == 2 else positions[-given.shape[0] :]


# -- the tower --------------------------------------------------------------------------------------------------------


@contextmanager
def _without(parts: Parts, dead: Tensor | None) -> Iterator[None]:
    """The tower with these tokens as nan, which no attention reads."""
    if dead is None:
        yield
        return
    kernels.register(KERNEL, _attention)
    owners = [m.config for m in parts.tower.modules() if hasattr(getattr(m, "config", None), "_attn_implementation")]
    configs = list({id(config): config for config in owners}.values())
    original = [config._attn_implementation for config in configs]
    for config in configs:
        config._attn_implementation = KERNEL
    handle = parts.block.register_forward_pre_hook(_poison(dead), with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()
        for config, name in zip(configs, original, strict=True):
            config._attn_implementation = name


def _poison(dead: Tensor) -> Callable[..., Any]:
    def hook(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        name = "" if args else "hidden_states"
        hidden = args[0] if args else kwargs[name]
        poisoned = hidden.masked_fill(dead.view(*hidden.shape[:-1], 1), float("nan"))
        return ((poisoned, *args[1:]), kwargs) if args else (args, {**kwargs, name: poisoned})

    return hook


def _attention(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Any:
    """Eager attention over the tokens that are left, which are no nan, whatever became of them on the way."""
    gone = key.isnan().any(-1).any(1)[:, None, :, None]
    weights = query @ key.masked_fill(gone, 0).mT * kwargs["scaling"]
    weights = weights.masked_fill(gone.mT, float("-inf")).softmax(-1)
    return (weights @ value.masked_fill(gone, 0)).transpose(1, 2), None


# -- between decoder layers -------------------------------------------------------------------------------------------


def _hiding(parts: Parts, hidden: Tensor, dropped: Dropped) -> list[Any]:
    """Hooks of the layers that hide columns [L] from everybody but themselves."""
    anew = dropped.late_positions == "compact"

    def hook(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        mask, length = kwargs.get("attention_mask"), len(hidden)
        seen = torch.ones(length, length, dtype=torch.bool).tril()[None, None]
        if mask is not None:
            seen = mask if mask.dtype is torch.bool else mask > -1
        seen = seen & (~hidden | torch.eye(length, dtype=torch.bool))
        told = {"attention_mask": torch.where(seen, 0.0, torch.finfo(torch.float32).min)}
        if anew:
            told["position_embeddings"] = _counted(parts, hidden, numbers[id(module)])
        return args, {**kwargs, **told}

    numbers = {id(layer): number for number, layer in enumerate(parts.layers)}
    chosen = [one for one in parts.layers if numbers[id(one)] >= dropped.layer] if bool(hidden.any()) else []
    return [one.register_forward_pre_hook(hook, with_kwargs=True) for one in chosen]


def _counted(parts: Parts, hidden: Tensor, layer: int) -> Any:
    """Rotary tables of a layer that counts from 0 what it sees."""
    rotary, positions = parts.language_model.rotary_emb, ((~hidden).cumsum(0) - 1).clamp(min=0)[None]
    if hasattr(rotary, "mrope_section"):
        positions = positions.expand(3, -1, -1)
    kinds = parts.language_model.config.layer_types[layer : layer + 1] if _takes_kind(rotary) else []
    return rotary.forward(torch.zeros(1), positions, *kinds)


def _takes_kind(rotary: nn.Module) -> bool:
    """Whether a rotary embedding has a table for every kind of layer."""
    return "layer_type" in signature(type(rotary).forward).parameters
