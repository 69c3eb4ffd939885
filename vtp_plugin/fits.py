"""Whether settings fit a model, asked of its configuration before any weight is loaded.

A host's folder of weights has a config.json; what it does not say is left to the check when strategies are attached.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vtp_plugin import files
from vtp_plugin.stages import Stage
from vtp_plugin.strategy import PruningStrategy

TEXT, VISION = ("text_config", "llm_config", "language_config"), ("vision_config",)
DEPTH = ("num_hidden_layers", "depth", "n_layer")


def refuse_checkpoint(strategies: Sequence[PruningStrategy], folder: str | Path) -> None:
    """PruningError for a setting that the model in a folder cannot have; nothing where there is no config.json."""
    path = Path(folder) / "config.json"
    if path.is_file():
        refuse(strategies, files.read_json(path))


def refuse(strategies: Sequence[PruningStrategy], config: Mapping[str, Any]) -> None:
    """PruningError for a layer that a model of this configuration (as a dictionary) does not have."""
    decoder, tower = _depth(config, TEXT) or _own_depth(config), _depth(config, VISION)
    for strategy in strategies:
        if strategy.stage is Stage.LLM and decoder:
            for layer in strategy.cut_layers(decoder):
                why = f"its language model has {decoder} layers"
                strategy.check_layer(strategy.cut_field, layer, 1, decoder - 1, why)
        for name, layer in (("layer", strategy.tower_layer), ("shallow", strategy.shallow_layer)):
            if layer is not None and tower:
                strategy.check_layer(name, layer, -tower, tower - 1, f"its vision tower has {tower} blocks")


def _depth(config: Mapping[str, Any], parts: Sequence[str]) -> int | None:
    """The number of layers of the first of these parts that says it."""
    found = (_own_depth(config[part]) for part in parts if isinstance(config.get(part), Mapping))
    return next((depth for depth in found if depth), None)


def _own_depth(config: Mapping[str, Any]) -> int | None:
    return next((config[name] for name in DEPTH if type(config.get(name)) is int), None)
