"""A checkpoint's configuration, asked before its weights are loaded: whether settings fit the model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import AutoConfig

from vtp_plugin import files, fits
from vtp_plugin.strategy import PruningStrategy

TOWER = "mm_vision_tower"  # the authors' LLaVA: where its tower's own configuration is


def refuse_checkpoint(strategies: Sequence[PruningStrategy], name: str | Path) -> None:
    """PruningError for a setting that the model of this name, or in this folder, cannot have.

    Nothing where there is no configuration to be had: the host says that better.
    """
    if strategies and name and (config := configuration(name)) is not None:
        fits.refuse(strategies, config)


def configuration(name: str | Path) -> dict[str, Any] | None:
    """The configuration of a checkpoint, with the defaults of its class written out where transformers knows it."""
    path = Path(name) / "config.json"
    try:
        config = AutoConfig.from_pretrained(str(name), trust_remote_code=False).to_dict()
    except Exception:  # no checkpoint, not reachable, a class of its own, damaged: the last in one sentence
        if not path.is_file():
            return None
        config = files.read_json(path)
    tower = config.get(TOWER)
    if isinstance(tower, str) and fits.VISION[0] not in config and (found := configuration(tower)) is not None:
        config[fits.VISION[0]] = found.get(fits.VISION[0], found)
    return config
