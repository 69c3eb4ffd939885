"""Everything that is done to a model goes through an Undo, so that closing it leaves no trace.

What others put on top of ours while it is there (accelerate, `Accelerator.prepare`) stays when ours goes, and finds the
host's own underneath. What is copied or saved with a model is inert: see `surgery.copies`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from contextlib import ExitStack
from functools import update_wrapper
from types import MethodType
from typing import Any

from torch import nn

MISSING = object()


class Override:
    """A function of ours in the place of an owner's own; without `replacement` it passes through to what it hid."""

    def __init__(self, owner: Any, name: str, replacement: Callable | None) -> None:
        self.owner, self.name, self.replacement = owner, name, replacement
        self.hidden: Callable = getattr(owner, name)
        self.own = vars(owner).get(name, MISSING)  # what the instance had under that name
        update_wrapper(self, self.hidden, updated=())  # hosts inspect name and signature, torch.export the code
        self.__code__ = getattr(inspect.unwrap(self.hidden), "__code__", None)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if args and args[0] is self.owner:  # bound once more, by who takes this for a function of the class
            args = args[1:]
        return (self.replacement or self.hidden)(*args, **kwargs)

    def take_back(self) -> None:
        """The owner as it was, or, where somebody has wrapped this since, a link that does nothing."""
        self.replacement = None
        if vars(self.owner).get(self.name) is self:
            put_back(self.owner, self.name, self.own)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        from copy import deepcopy

        owner = memo.get(id(self.owner), self.owner)
        if self.own is not MISSING:
            return deepcopy(self.own, memo)
        return MethodType(getattr(type(owner), self.name), owner)

    def __reduce__(self) -> Any:
        if self.own is not MISSING:
            return _itself, (self.own,)
        return MethodType, (getattr(type(self.owner), self.name), self.owner)


class Hook:
    """A hook of ours; a copy of it does nothing."""

    def __init__(self, function: Callable) -> None:
        self.function = function

    def __call__(self, *args: Any) -> Any:
        return self.function(*args)

    def __deepcopy__(self, memo: dict[int, Any]) -> Callable[..., None]:
        return nothing

    def __reduce__(self) -> Any:
        return _itself, (nothing,)


def nothing(*args: Any) -> None:
    """What becomes of a hook in a copy of its module."""


def _itself(value: Any) -> Any:
    return value


class Undo(ExitStack):
    """A stack of changes; `close()` takes them back in reverse order."""

    def __init__(self) -> None:
        super().__init__()
        self.modules: list[nn.Module] = []  # that were changed

    def override(self, owner: Any, name: str, value: Any) -> Any:
        """Set an attribute on the instance and return what it hid; a function takes over the signature."""
        if callable(value):
            override = Override(owner, name, value)
            object.__setattr__(owner, name, override)
            self.modules += [owner] if isinstance(owner, nn.Module) else []
            self.callback(override.take_back)
            return override.hidden
        hidden, own = getattr(owner, name), vars(owner).get(name, MISSING)
        object.__setattr__(owner, name, value)
        self.callback(put_back, owner, name, own)
        return hidden

    def before(self, module: nn.Module, hook: Callable) -> None:
        """Call hook(module, args, kwargs) before the module; it may return new (args, kwargs)."""
        self.modules.append(module)
        self.callback(module.register_forward_pre_hook(Hook(hook), with_kwargs=True).remove)

    def after(self, module: nn.Module, hook: Callable) -> None:
        """Call hook(module, args, kwargs, output) after the module, before the host's own hooks; it may replace output.

        transformers captures hidden states with hooks of its own: one that changes the output has to come first.
        """
        self.modules.append(module)
        handle = module.register_forward_hook(Hook(hook), with_kwargs=True, prepend=True)
        self.callback(handle.remove)


def put_back(owner: Any, name: str, own: Any) -> None:
    """What the instance had under a name, MISSING for nothing."""
    if own is MISSING:
        object.__delattr__(owner, name)
    else:
        object.__setattr__(owner, name, own)
