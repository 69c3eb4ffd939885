"""Copies of an attached model: each is an unpruned model of its own, whether deep-copied, pickled or saved.

A deep copy of any part keeps no live hook and no link to the original's weights (`Override`, `Hook`); of the whole
model it is swept clean. What is pickled is the model as it would be detached, so that loading needs no plugin.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from typing import Any

from torch import nn

from vtp_plugin.surgery.undo import MISSING, Hook, Override, Undo, nothing

HOOKS = ("_forward_pre_hooks", "_forward_hooks")
OPTIONS = ("_with_kwargs", "_always_called")  # tables beside each of them, by the same keys


def make_copyable(model: nn.Module, mark: str, undo: Undo) -> None:
    """Let copies of the model be unpruned; `mark` is the attribute that says that it is attached."""

    def deepcopy(memo: dict[int, Any]) -> nn.Module:
        asked = inspect.currentframe().f_back.f_locals.get("x", model)  # by `copy.deepcopy`
        if asked is not model:  # a wrapper that hands attributes on, this one too: PEFT, a compiled model
            return _of_wrapper(asked, memo)
        twin = memo[id(model)] = type(model).__new__(type(model))
        state = {name: value for name, value in vars(model).items() if name not in ours}
        vars(twin).update(copy.deepcopy(state, memo))
        _sweep(twin)
        return twin

    def reduce(protocol: int) -> Any:
        twin = _detached(model, {}, ours)
        return type(model).__reduce_ex__(twin, protocol)

    ours = {mark, "__deepcopy__", "__reduce_ex__"}
    for name, function in (("__deepcopy__", deepcopy), ("__reduce_ex__", reduce)):
        _set(model, name, function, undo)


def _of_wrapper(wrapper: nn.Module, memo: dict[int, Any]) -> nn.Module:
    """What `copy.deepcopy` makes of a module that has no way of its own."""
    make, arguments, *state = wrapper.__reduce_ex__(4)
    twin = memo[id(wrapper)] = make(*copy.deepcopy(arguments, memo))
    if state:
        twin.__setstate__(copy.deepcopy(state[0], memo))
    return twin


def _set(model: nn.Module, name: str, function: Callable, undo: Undo) -> None:
    object.__setattr__(model, name, function)
    undo.callback(object.__delattr__, model, name)


def _sweep(model: nn.Module) -> None:
    """Take what is inert out of a deep copy."""
    for module in model.modules():
        for name, value in list(vars(module).items()):
            own = getattr(value, "__func__", None)
            if own is not None and getattr(type(module), name, None) is own and value.__self__ is module:
                object.__delattr__(module, name)
        _without(module, lambda hook: hook is nothing)


def _detached(module: nn.Module, seen: dict[int, nn.Module], ours: set[str]) -> nn.Module:
    """The same module without what is ours: new objects around the same tensors."""
    if id(module) in seen:
        return seen[id(module)]
    twin = seen[id(module)] = type(module).__new__(type(module))
    for name, value in vars(module).items():
        while isinstance(value, Override):
            value = value.own
        if name not in ours and value is not MISSING:
            vars(twin)[name] = value
    for table in HOOKS:
        for name in (table, *(table + option for option in OPTIONS)):
            if name in vars(twin):
                vars(twin)[name] = copy.copy(vars(twin)[name])
    _without(twin, lambda hook: isinstance(hook, Hook))
    vars(twin)["_modules"] = {name: child and _detached(child, seen, ours) for name, child in module._modules.items()}
    return twin


def _without(module: nn.Module, ours: Callable[[Any], bool]) -> None:
    """Drop hooks, and what is noted beside them."""
    for table in HOOKS:
        hooks = vars(module).get(table, {})
        for key in [key for key, hook in hooks.items() if ours(hook)]:
            for name in (table, *(table + option for option in OPTIONS)):
                vars(module).get(name, {}).pop(key, None)
