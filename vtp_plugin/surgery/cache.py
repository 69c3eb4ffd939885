"""The argument that carries the KV cache: `cache` since transformers 5.24, `past_key_values` before."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vtp_plugin.errors import HostChanged

NAMES = ("cache", "past_key_values")


def name_in(arguments: Mapping[str, Any]) -> str | None:
    """Under which name these arguments carry the cache; None if they have no place for one."""
    return next((name for name in NAMES if name in arguments), None)


def given(arguments: Mapping[str, Any]) -> Any:
    """The cache that a caller hands in, or None."""
    name = name_in(arguments)
    return None if name is None else arguments[name]


def of_layer(arguments: Mapping[str, Any]) -> Any:
    """The cache that a decoder layer or its attention was called with; None where nothing is cached.

    HostChanged if it has no such argument: a decoding step would look like a prefill.
    """
    if name_in(arguments) is None:
        raise HostChanged(f"decoder layers are called with {', '.join(arguments)}, but not with {' or '.join(NAMES)}")
    return given(arguments)


def of_output(output: Any) -> Any:
    """The cache in an output of `forward` or `generate`, or None."""
    name = next((name for name in NAMES if name in output.keys()), None)  # noqa: SIM118
    return None if name is None else output[name]
