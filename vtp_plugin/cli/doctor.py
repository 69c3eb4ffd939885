"""What is installed and was it tested, what is known not to work, which touch points hold, whether the model runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from importlib import import_module
from importlib.metadata import entry_points
from importlib.util import find_spec

import typer
from rich.console import Console
from rich.markup import escape

from vtp_plugin import contract
from vtp_plugin.contract import TouchPoint
from vtp_plugin.errors import HostChanged, PruningError
from vtp_plugin.hosts import compatibility
from vtp_plugin.reporting.record import PACKAGES, versions


def command() -> None:
    console = Console(highlight=False, soft_wrap=True)
    for line in _packages():
        console.print(line)
    healthy = [_report(console, check) for check in CHECKS]
    if not all(healthy):
        raise typer.Exit(1)


def _packages() -> Iterator[str]:
    """Every package with its release, and how that lies to the tested window."""
    found = versions()
    for package in ("python", *PACKAGES):
        window = compatibility.TESTED.get(package)
        tested = f"tested: {window}" if window else ""
        strange = compatibility.outside(window) if window else ""
        here = f"{found.get(package, 'not installed'):<24}"
        here = here if package in found else f"[yellow]{here}[/]"
        yield f"  {package:<14} {here} {tested}{f'  [yellow]{strange}[/]' if strange else ''}".rstrip()


def _report(console: Console, check: Callable[[], str]) -> bool:
    """Run one check; its answer, or the reason why it failed."""
    try:
        console.print(f"[green]ok[/]      {check.__doc__}: {escape(check())}")
    except Exception as error:
        said = str(error) if isinstance(error, PruningError) else f"{type(error).__name__}: {error}"
        console.print(f"[red]failed[/]  {check.__doc__}: {escape(said)}")
        return False
    return True


def _device() -> str:
    """device"""
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU only (no CUDA device)"


def _pairs() -> str:
    """releases that do not work together"""
    if found := [str(pair) for pair in compatibility.known_broken()]:
        raise PruningError("\n          ".join(found))
    return "none of those that are known"


def _catalogues() -> str:
    """catalogues"""
    from vtp_plugin import plugins

    families = [cls for cls in plugins.adapters() if not cls.refused]
    found = f"{len(plugins.strategies())} strategies, {len(families)} model families"
    return "; ".join([found, *(f"left out: {name}: {why}" for name, why in plugins.left_out.items())])


def _entry_point() -> str:
    """lmms-eval loads the plugin"""
    if not any(ep.value.startswith("vtp_plugin.") for ep in entry_points(group="lmms_eval.models")):
        raise RuntimeError("the entry point lmms_eval.models is missing; install the package (pip install)")
    import_module("lmms_eval.models")  # loads the entry points
    from vtp_plugin.hosts.lmms_eval import plugin

    if not plugin.registered():
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


def _lmms_eval() -> str:
    """lmms-eval is as the plugin knows it"""
    from vtp_plugin.hosts.lmms_eval.contract import EVERY

    import_module("lmms_eval.models")
    return _held(EVERY)


def _vllm() -> str:
    """vLLM is as the plugin knows it"""
    if find_spec("vllm") is None:
        return "not installed"
    from vtp_plugin.hosts.vllm.contract import FAMILIES

    return _held(dict.fromkeys(point for family in FAMILIES.values() for point in family.touches))


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
        held = _held(pruned.adapter.touches, model)
        answer(model, processor, Image.new("RGB", (168, 168)), "is there a circle")
    event = pruned.events[-1]
    return f"{event.before[0]} -> {event.after[0]} visual tokens; {held} in transformers"


def _held(points: dict[TouchPoint, None] | tuple[TouchPoint, ...], root: object = None) -> str:
    """How many touch points hold; HostChanged with all that do not."""
    if moved := list(contract.broken(points, root)):
        raise HostChanged("\n          ".join(moved))
    return f"{len(points)} touch points hold"


CHECKS = (_device, _pairs, _catalogues, _lmms_eval, _entry_point, _tasks, _llava, _vllm, _embedded)
