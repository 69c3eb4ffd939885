"""Everything that is done to a model goes through an Undo, so that closing it leaves no trace."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from functools import wraps
from typing import Any

from torch import nn

_MISSING = object()


class Undo(ExitStack):
    """A stack of changes; `close()` takes them back in reverse order."""

    def override(self, owner: Any, name: str, value: Any) -> Any:
        """Set an attribute on the instance and return what it hid; a function takes over the signature."""
        hidden, own = getattr(owner, name), vars(owner).get(name, _MISSING)
        object.__setattr__(owner, name, _signed(hidden, value) if callable(value) else value)
        self.callback(_restore, owner, name, own)
        return hidden

    def before(self, module: nn.Module, hook: Callable) -> None:
        """Call hook(module, args, kwargs) before the module; it may return new (args, kwargs)."""
        self.callback(module.register_forward_pre_hook(hook, with_kwargs=True).remove)

    def after(self, module: nn.Module, hook: Callable) -> None:
        """Call hook(module, args, kwargs, output) after the module, before the host's own hooks; it may replace output.

        transformers captures hidden states with hooks of its own: one that changes the output has to come first.
        """
        handle = module.register_forward_hook(hook, with_kwargs=True, prepend=True)
        self.callback(handle.remove)


def _signed(original: Callable, replacement: Callable) -> Callable:
    """The replacement under the name and signature of the original, which hosts inspect."""

    @wraps(original)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        return replacement(*args, **kwargs)

    return wrapper


def _restore(owner: Any, name: str, own: Any) -> None:
    if own is _MISSING:
        object.__delattr__(owner, name)
    else:
        object.__setattr__(owner, name, own)
