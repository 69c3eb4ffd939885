"""Every family that is served has a module, touch points that hold, and a row in `vtp list --models`."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path

import pytest
from vllm.model_executor.models import ModelRegistry

from vtp_plugin import contract, plugins
from vtp_plugin.cli.list import families
from vtp_plugin.hosts.vllm import families as home
from vtp_plugin.hosts.vllm.contract import FAMILIES
from vtp_plugin.stages import Stage


def test_modules_and_rows_belong_together():
    modules = {file.stem for file in Path(home.__path__[0]).glob("*.py")} - {"__init__"}
    assert modules == {family.module for family in FAMILIES.values()}
    assert {family.adapter for family in FAMILIES.values()} <= {cls.family for cls in plugins.adapters()}
    assert set(FAMILIES) <= set(ModelRegistry.get_supported_archs())


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_is_a_subclass_of_what_vllm_builds(name: str):
    model = import_module(f"{home.__name__}.{FAMILIES[name].module}").Pruned
    assert issubclass(model, ModelRegistry._try_load_model_cls(name))
    assert not list(contract.broken(FAMILIES[name].touches))


def test_the_list_says_what_is_served():
    said = {row[0]: row[-1] for row in families().rows}
    assert said["internvl"] == said["internvl_chat"] == said["qwen2_vl"] == "pixels, vit, projector"
    assert said["llava_next"] == Stage.PROJECTOR.value
    assert said["blip2"] == "no"
