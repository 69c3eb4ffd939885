"""Whether settings fit a model, asked of its configuration before any weight is loaded.

What a configuration does not say is left to the check when strategies are attached. Where images have unequal numbers
of tokens (tiles, dynamic resolution), no number of kept tokens is too large for the model: it may be for an image.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from vtp_plugin import plugins
from vtp_plugin.stages import Stage
from vtp_plugin.strategy import PruningStrategy

TEXT, VISION = ("text_config", "llm_config", "language_config"), ("vision_config",)
DEPTH = ("num_hidden_layers", "depth", "n_layer")


def refuse(strategies: Sequence[PruningStrategy], config: Mapping[str, Any]) -> None:
    """PruningError for what a model of this configuration (as a dictionary) does not have: a layer, so many tokens."""
    decoder, tower = _depth(config, TEXT) or _own_depth(config), _depth(config, VISION)
    for strategy in strategies:
        if strategy.stage is Stage.LLM and decoder:
            for layer in strategy.cut_layers(decoder):
                why = f"its language model has {decoder} layers"
                strategy.check_layer(strategy.cut_field, layer, 1, decoder - 1, why)
        for name, layer in (("layer", strategy.tower_layer), ("shallow", strategy.shallow_layer)):
            if layer is not None and tower:
                strategy.check_layer(name, layer, -tower, tower - 1, f"its vision tower has {tower} blocks")
    refuse_budgets(strategies, _tokens(config))


def refuse_budgets(strategies: Sequence[PruningStrategy], tokens: int | None) -> None:
    """PruningError for more kept tokens than an image has; None: images have unequal numbers."""
    for strategy in strategies:
        kept = strategy.keep_tokens
        if tokens is not None and kept is not None and kept > tokens and strategy.budget != "total":
            raise strategy.error(f"keep_tokens must be at most {tokens}, the tokens of an image here, got {kept}")


def _tokens(config: Mapping[str, Any]) -> int | None:
    """The tokens of every image in a model of this configuration, where the family knows it."""
    names = config.get("architectures")
    name = names[0] if isinstance(names, list) and names else None
    families = (cls for cls in reversed(plugins.adapters()) if name in cls.names)
    return next((cls.tokens_in(config) for cls in families), None)


def _depth(config: Mapping[str, Any], parts: Sequence[str]) -> int | None:
    """The number of layers of the first of these parts that says it."""
    found = (_own_depth(config[part]) for part in parts if isinstance(config.get(part), Mapping))
    return next((depth for depth in found if depth), None)


def _own_depth(config: Mapping[str, Any]) -> int | None:
    return next((config[name] for name in DEPTH if type(config.get(name)) is int), None)
