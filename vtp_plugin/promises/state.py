"""Everything that pruning could leave behind on a model: its state before is compared with its state after."""

from __future__ import annotations

from typing import Any

from torch import nn

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_forward_hooks_with_kwargs")
HOOKS += ("_forward_pre_hooks_with_kwargs", "_forward_hooks_always_called")
WRITTEN = "rope_deltas"  # by the host itself, in every prefill


def state(model: nn.Module, image_processor: Any = None) -> dict[str, Any]:
    """Every attribute and hook of every module, of the configuration and of the image processor."""
    found: dict[str, Any] = {}
    for name, module in model.named_modules():
        found |= {f"{name}.{key}": id(value) for key, value in vars(module).items() if key not in (*HOOKS, WRITTEN)}
        found |= {f"{name}.{key}": list(getattr(module, key).items()) for key in HOOKS}
    for owner in filter(None, (model.config, getattr(model, "generation_config", None))):
        found |= {f"{type(owner).__name__}.{key}": repr(value) for key, value in vars(owner).items()}
    if image_processor is not None:
        found |= {f"processor.{key}": id(value) for key, value in vars(image_processor).items()}
    return found
