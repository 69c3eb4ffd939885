"""From model arguments to a pruned model of the host. Arguments that say nothing of pruning never come here."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from contextlib import nullcontext
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from vtp_plugin import contract, plugins
from vtp_plugin.errors import PruningError, unknown
from vtp_plugin.hosts import compatibility, llava
from vtp_plugin.hosts.lmms_eval import generic, settings
from vtp_plugin.hosts.lmms_eval.contract import EVALUATION, MODELS
from vtp_plugin.hosts.lmms_eval.evaluation import Run
from vtp_plugin.hosts.transformers.checkpoints import refuse_checkpoint
from vtp_plugin.hosts.transformers.quiet import without_report
from vtp_plugin.pruning import Pruned
from vtp_plugin.strategy import PruningStrategy
from vtp_plugin.tiny import checkpoint

TINY_LAYOUTS = {  # by model class, the layout of an embedded model that it reads
    "vtp-tiny": {"llava": "llava", "llava_hf": "hf"},
    "vtp-tiny-video": dict.fromkeys(generic.NAMES, "hf"),
    "vtp-tiny-qwen": dict.fromkeys(("qwen2_vl", *generic.NAMES), "hf"),
}
VLLM = ("vllm", "vllm_generate")  # models that live in the processes of an engine: hooks do not reach them
CPU_ARGUMENTS = {"llava": {"device": "cpu", "device_map": "auto"}}  # what a class needs beside a CUDA-only default
CPU_DEFAULT = {"device": "cpu", "device_map": "cpu"}


def build(host: type, arguments: Mapping[str, Any]) -> Any:
    """The host's model from its arguments, pruned if they say so."""
    strategies, rest, model_id = settings.strategies_of(arguments), settings.others(arguments), id_of(host)
    if strategies is not None:
        compatibility.refuse_broken(model_id)
        contract.check((*MODELS, *EVALUATION))
        refuse_checkpoint(strategies, _checkpoint(host, model_id, rest))
    if model_id in VLLM:
        return _served(host, strategies, arguments, rest)
    tiny = rest.get("pretrained") in checkpoint.NAMES
    if strategies is None and not tiny:
        return host(**rest)
    if tiny:
        rest = _with_size(host, rest) | {"pretrained": str(_tiny(rest["pretrained"], model_id))}
    with without_report() if tiny else nullcontext():
        with generic.building(host, model_id):
            lm = host(**_with_device(host, model_id, rest))
        generic.make_ready(lm, model_id)
        _prune(lm, model_id, strategies, arguments)
    return lm


def _checkpoint(host: type, model_id: str, arguments: Mapping[str, Any]) -> str:
    """The name or folder of the weights, as given or as the class has it by default; "" where it has none."""
    for name in ("pretrained", "model"):
        parameter = inspect.signature(host.__init__).parameters.get(name)
        if parameter is not None or name in arguments:
            said = arguments.get(name, getattr(parameter, "default", ""))
            tiny = said in checkpoint.NAMES
            return str(checkpoint.resolve(said, TINY_LAYOUTS[said].get(model_id, "hf")) if tiny else said or "")
    return ""


def _served(
    host: type, strategies: list[PruningStrategy] | None, arguments: Mapping[str, Any], rest: dict[str, Any]
) -> Any:
    described = {"strategy": arguments.get(settings.KEY), **settings.settings_of(arguments)}
    served = import_module("vtp_plugin.hosts.lmms_eval.served")
    return served.build(host, strategies, described, rest, settings.perturbation_of(arguments))


def _prune(lm: Any, model_id: str, strategies: list[PruningStrategy] | None, arguments: Mapping[str, Any]) -> None:
    """Attach to a model that the host has built, and follow its evaluation."""
    if not isinstance(getattr(lm, "model", None), torch.nn.Module):
        raise PruningError(f"{model_id} has no model in this process that could be pruned")
    if llava.is_authors(lm.model):
        llava.make_ready(lm.model)
    if strategies is not None:
        Run(lm, attach(lm, strategies), strategies, settings.perturbation_of(arguments)).install()


def id_of(host: type) -> str:
    """The name under which the host's registry knows a model class; the class's own name if it does not."""
    from lmms_eval.models import MODEL_REGISTRY_V2

    path = f"{host.__module__}.{host.__qualname__}"
    manifests = map(MODEL_REGISTRY_V2.get_manifest, MODEL_REGISTRY_V2.list_canonical_model_ids())
    known = (m.model_id for m in manifests if path in (m.simple_class_path, m.chat_class_path))
    return next(known, host.__name__)


def attach(lm: Any, strategies: list[PruningStrategy]) -> Pruned:
    """Ask the plugins to attach the strategies to a host's model."""
    return plugins.manager().hook.vtp_model_loaded(lm=lm, model=lm.model, processor=_processor(lm), config=strategies)


def _processor(lm: Any) -> Any:
    """The host's processor, or its image processor and tokenizer side by side."""
    names = ("processor", "_processor", "_image_processor")
    found = [p for name in names if (p := getattr(lm, name, None)) is not None]
    whole = [p for p in found if hasattr(p, "image_processor")]
    if whole:
        return whole[0]
    return SimpleNamespace(image_processor=found[0] if found else None, tokenizer=getattr(lm, "_tokenizer", None))


def _tiny(name: str, model_id: str) -> Path:
    """An embedded model in the layout that this model class reads."""
    if model_id not in TINY_LAYOUTS[name]:
        raise unknown(f"model for {name}", model_id, TINY_LAYOUTS[name])
    return checkpoint.resolve(name, TINY_LAYOUTS[name][model_id])


def _with_size(host: type, arguments: dict[str, Any]) -> dict[str, Any]:
    """With the size of pictures that the embedded model knows, where the class chooses one and the user did not."""
    if arguments["pretrained"] != checkpoint.QWEN_NAME:
        return arguments
    from vtp_plugin.tiny.qwen.folder import PIXELS

    known = inspect.signature(host.__init__).parameters
    return {name: PIXELS**2 for name in ("min_pixels", "max_pixels") if name in known} | arguments


def _with_device(host: type, model_id: str, arguments: dict[str, Any]) -> dict[str, Any]:
    """On a machine without CUDA, the device arguments that the class needs and the user did not give."""
    from loguru import logger

    if torch.cuda.is_available():
        return arguments
    known = inspect.signature(host.__init__).parameters
    wanted = CPU_ARGUMENTS.get(model_id, CPU_DEFAULT)
    added = {k: v for k, v in wanted.items() if k in known and k not in arguments}
    if added:
        said = ", ".join(f"{k}={v}" for k, v in added.items())
        logger.info(f"vtp-plugin: no CUDA device, adding {said} to the arguments of {model_id}")
    return {**arguments, **added}
