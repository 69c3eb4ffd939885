"""Pictures as the authors' package prepares them: padded, in tiles or cropped, as the checkpoint says."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any

from vtp_plugin.contract import check
from vtp_plugin.hosts.llava.contract import PICTURES


def processing(processor: Any, config: Mapping[str, Any]) -> Callable[[Any], dict[str, Any]]:
    """What makes pixel values of a PIL picture, with a tower's image processor and a model's configuration."""
    check(PICTURES)
    from llava.mm_utils import process_images

    said = SimpleNamespace(**config)
    return lambda picture: {"pixel_values": process_images([picture], processor, said)}
