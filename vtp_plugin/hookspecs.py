"""The plugin surface: six hooks of the pluggy project `vtp`. Built-ins use the same ones as strangers.

A package joins with an entry point in the group `vtp` that names a module (or object) with `hookimpl` functions.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pluggy

hookspec = pluggy.HookspecMarker("vtp")
hookimpl = pluggy.HookimplMarker("vtp")


@hookspec
def vtp_register_strategies(register: Callable[[type], None]) -> None:
    """Call `register(cls)` for every PruningStrategy class that you bring."""


@hookspec
def vtp_register_adapters(register: Callable[[type], None]) -> None:
    """Call `register(cls)` for every Adapter class that you bring; the last one registered is asked first."""


@hookspec(firstresult=True)
def vtp_model_loaded(lm: Any, model: Any, processor: Any, config: list[Any]) -> Any:
    """A host has built a model and pruning was asked for: attach it and return the handle.

    `lm` is the host's wrapper, `model` the torch module, `processor` what turns images into pixels (or None), `config`
    the strategies. The built-in implementation calls `prune`; the first answer that is not None counts.
    """


@hookspec
def vtp_images_processed(processor: Any, images: Any, outputs: Any) -> None:
    """An image processor of a pruned model has run. `outputs["pixel_values"]` has its full precision here."""


@hookspec
def vtp_tokens_pruned(event: Any) -> None:
    """A cut was made; see `vtp_plugin.pruning.PruningEvent`."""


@hookspec
def vtp_register_commands(cli: Any) -> None:
    """Add commands to the `vtp` program, a `typer.Typer`."""
