"""vLLM: the strategies inside its engine, on one machine or many. docs/serving.md is the user's side.

vLLM calls `register` as an entry point of the group `vllm.general_plugins` in every process, in some of them more than
once. The configuration is the field `vtp_pruning` of the model's configuration (`--hf-overrides`), which reaches every
worker, wherever it runs. Where it is, vLLM builds a subclass of its own model class; where it is not, nothing of this
package runs but the question whether it is.

* `plan`: what the strategies mean before any image is seen: refusals, token counts, decisions about raw pixels;
* `processing`: the multi-modal processor, in the process that takes requests: fewer placeholders, one per token kept;
* `worker`: the cuts around the vision tower, by the code that also serves transformers;
* `families`: one module per model family, which puts these together, and its row in `contract`; `qwen`,
  `qwen_requests` and `qwen_tower` are what the Qwen-VLs share.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

from vtp_plugin.contract import check
from vtp_plugin.errors import PruningError
from vtp_plugin.hosts.vllm import orphans
from vtp_plugin.hosts.vllm.contract import FAMILIES
from vtp_plugin.hosts.wrapping import wrap

PROGRAMS = ("vllm", "api_server")  # vLLM's own
OURS = "Vtp"  # in front of an architecture: our class for it


class Refused(RuntimeError):
    """A configuration that cannot be served. No ValueError: pydantic would bury that in a report of its own."""


def register() -> None:
    """Entry point of the group `vllm.general_plugins`. Harmless when repeated."""
    from vllm.model_executor.models import ModelRegistry

    orphans.watch()
    if hasattr(ModelRegistry.inspect_model_cls, "_vtp"):
        return
    for name, family in FAMILIES.items():
        ModelRegistry.register_model(OURS + name, f"{__name__}.families.{family.module}:Pruned")
    wrap(ModelRegistry, "inspect_model_cls", _inspecting)
    if Path(sys.argv[0]).stem in PROGRAMS:
        wrap(sys, "excepthook", _in_one_sentence)


def _inspecting(original: Callable, architectures: str | list[str], model_config: Any) -> Any:
    """What vLLM asks about a model first, before it loads anything: refuse a configuration here, or choose our class.

    Our class can do what vLLM's can, so the answer is the one for vLLM's. The name in the configuration is what every
    process builds the model from.
    """
    from vtp_plugin.hosts.vllm.plan import KEY

    if getattr(model_config.hf_config, KEY, None) is None:
        return original(architectures, model_config)
    names = [architectures] if isinstance(architectures, str) else architectures
    info, name = original([name.removeprefix(OURS) for name in names], model_config)
    try:
        _agree(name, model_config.hf_config)
    except PruningError as error:
        raise Refused(f"{KEY}: {error}") from None
    model_config.hf_config.architectures = [OURS + name]
    return info, name


def _agree(name: str, config: Any) -> None:
    """PruningError if this architecture or its configuration cannot be served."""
    if name not in FAMILIES:
        raise PruningError(f"{name} cannot be pruned inside vLLM. Supported: {', '.join(FAMILIES)}")
    check(FAMILIES[name].touches)
    import_module(f"{__name__}.families.{FAMILIES[name].module}").plan_of(config)


def _in_one_sentence(original: Callable, kind: type, error: BaseException, trace: Any) -> None:
    """vLLM's own programs end with the sentence instead of a stack of frames."""
    if isinstance(error, Refused):
        print(f"vllm: error: {error}", file=sys.stderr)
    else:
        original(kind, error, trace)
