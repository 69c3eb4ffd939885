"""What is installed, which routes into lmms-eval are live, and whether the embedded model runs."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from importlib import import_module
from importlib.metadata import entry_points

import typer
from rich.console import Console

from vtp_plugin.reporting.record import PACKAGES, versions


def command() -> None:
    console = Console(highlight=False)
    found = versions()
    for package in ("python", *PACKAGES):
        console.print(f"  {package:<14} {found.get(package, '[yellow]not installed[/]')}")
    healthy = [_report(console, check) for check in CHECKS]
    if not all(healthy):
        raise typer.Exit(1)


def _report(console: Console, check: Callable[[], str]) -> bool:
    """Run one check; its answer, or the reason why it failed."""
    try:
        console.print(f"[green]ok[/]      {check.__doc__}: {check()}")
    except Exception as error:
        console.print(f"[red]failed[/]  {check.__doc__}: {type(error).__name__}: {error}")
        return False
    return True


def _device() -> str:
    """device"""
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU only (no CUDA device)"


def _catalogues() -> str:
    """catalogues"""
    from vtp_plugin import plugins

    return f"{len(plugins.strategies())} strategies, {len(plugins.adapters())} model families"


def _entry_point() -> str:
    """lmms-eval loads the plugin"""
    if not any(ep.value.startswith("vtp_plugin.") for ep in entry_points(group="lmms_eval.models")):
        raise RuntimeError("the entry point lmms_eval.models is missing; install the package (pip install)")
    import_module("lmms_eval.models")  # loads the entry points
    if not hasattr(argparse.ArgumentParser.parse_known_args, "_vtp"):
        raise RuntimeError("lmms-eval did not call it; another plugin may have failed before it")
    return "--pruning, --config keys, model_args and simple_evaluate(model_args=...)"


def _tasks() -> str:
    """embedded tasks"""
    import_module("lmms_eval.models")  # loads the entry points
    from lmms_eval.tasks import TaskManager

    ours = [task for task in TaskManager("ERROR").all_tasks if task.startswith("vtp_")]
    if not ours:
        raise RuntimeError("the task manager does not find them")
    return ", ".join(ours)


def _llava() -> str:
    """authors' llava package"""
    import inspect

    from llava.model.llava_arch import LlavaMetaForCausalLM

    if "modalities" in inspect.signature(LlavaMetaForCausalLM.prepare_inputs_labels_for_multimodal).parameters:
        raise RuntimeError("this is LLaVA-NeXT's package of the same name; install llava-torch")
    return "llava-torch"


def _embedded() -> str:
    """embedded model, pruned"""
    from PIL import Image

    from vtp_plugin.pruning import prune
    from vtp_plugin.tiny.inference import answer, load

    model, processor = load()
    with prune(model, "stride", keep_ratio=0.25, processor=processor) as pruned:
        answer(model, processor, Image.new("RGB", (168, 168)), "is there a circle")
    event = pruned.events[-1]
    return f"{event.before[0]} -> {event.after[0]} visual tokens"


CHECKS = (_device, _catalogues, _entry_point, _tasks, _llava, _embedded)
