"""The catalogue is complete: every strategy has a configuration, a section on its fidelity, and a docstring."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest
from paths import ROOT

from vtp_plugin import config, get_strategy, list_strategies

FILES = sorted((ROOT / "plugin_configs" / "strategies").glob("*.yaml"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_configuration_resolves_and_names_its_source(path: Path):
    (strategy,) = config.resolve(str(path))
    assert path.stem.startswith(strategy.name)
    assert path.read_text().startswith("# ")
    assert all(len(line) <= 120 for line in path.read_text().splitlines())


@pytest.mark.parametrize("name", list_strategies())
def test_a_strategy_is_documented(name: str):
    assert any(config.resolve(str(path))[0].name == name for path in FILES), "no configuration"
    assert f"`{name}`" in (ROOT / "docs" / "fidelity.md").read_text()
    assert importlib.import_module(get_strategy(name).__module__).__doc__


@pytest.mark.parametrize(
    ("name", "tokens"),
    [
        ("sparsevlm_192", 300),
        ("dart_128", 128),
        ("divprune", 56),
        ("hired", 115),
        ("pyramiddrop", 72),
    ],
)
def test_the_settings_are_the_papers(name: str, tokens: int):
    (strategy,) = config.resolve(str(ROOT / "plugin_configs" / "strategies" / f"{name}.yaml"))
    if name.startswith("sparsevlm"):
        assert strategy.keep_tokens == 192
    else:
        assert strategy.count(576) == tokens
