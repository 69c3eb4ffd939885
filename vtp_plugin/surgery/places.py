"""Whether what was hooked still stands where it did: PEFT, quantisers and others put modules of theirs in its place.

A hook on a linear layer inside of a LoRA layer sees half of what the model computes, one on a copy sees nothing.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from vtp_plugin.errors import PruningError

INSIDE = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")  # of wrappers that call what they hold


class Places:
    """Where some modules of a model are, and everything above them."""

    def __init__(self, model: nn.Module, modules: Iterable[nn.Module]) -> None:
        every = dict(model.named_modules())
        names = {module: name for name, module in every.items()}
        paths = {names[module] for module in modules if names.get(module)}
        above = {path.rsplit(".", count)[0] for path in paths for count in range(path.count(".") + 1)}
        self.children = [(path, every[path.rpartition(".")[0]], every[path]) for path in sorted(above)]

    def check(self) -> None:
        """PruningError, which names it, if one was replaced."""
        for path, parent, child in self.children:
            there = parent._modules.get(path.rpartition(".")[2])
            if there is not child and _held(there) is not child:
                raise PruningError(
                    f"{path} was replaced by {_named(there)} after the model was pruned: detach, and prune it again "
                    f"as it is now"
                )


def _held(module: nn.Module | None) -> nn.Module | None:
    """The module inside of transparent wrappers."""
    inner = next((name for name in INSIDE if name in getattr(module, "_modules", {})), None)
    return module if inner is None else _held(module._modules[inner])


def _named(module: nn.Module | None) -> str:
    return "nothing" if module is None else f"{type(module).__module__.partition('.')[0]}'s {type(module).__name__}"
