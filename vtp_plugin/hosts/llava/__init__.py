"""The authors' `llava` package: what a model of it needs to run under current releases, and on a CPU."""

from __future__ import annotations

from torch import nn

from vtp_plugin.hosts.llava import cpu, frozen
from vtp_plugin.surgery.undo import Undo


def is_authors(model: nn.Module) -> bool:
    """Whether this is a model of the package."""
    return hasattr(model, "prepare_inputs_labels_for_multimodal")


def make_ready(model: nn.Module) -> None:
    """Let a model that a host has just loaded run here, pruned or not; for as long as it lives."""
    frozen.serve(model, Undo())
    if cpu.needs_care(model):
        cpu.run_on_cpu(model)
