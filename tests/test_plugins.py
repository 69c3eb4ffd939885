"""Packages that want to join and cannot: one warning, and nobody else is disturbed."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest

from vtp_plugin import plugins
from vtp_plugin.errors import PruningError

STRATEGY = """
from vtp_plugin import PruningStrategy, Stage, hookimpl
from dataclasses import dataclass

@dataclass
class Guest(PruningStrategy):
    name, stage, paper = "{name}", Stage.PROJECTOR, "none"

    def score(self, visual):
        return visual.tokens.norm(dim=-1)

@hookimpl
def vtp_register_strategies(register):
    register({register})
"""
GOOD = STRATEGY.format(name="guest", register="Guest")
KINDS = {  # source of the module, what the entry point names, what the warning says
    "does not import": ("import no_such_module", "guest", "No module named 'no_such_module'"),
    "does not parse": ("def broken(:", "guest", "SyntaxError"),
    "leaves while imported": ("raise SystemExit(3)", "guest", "SystemExit: 3"),
    "a hook raises": (GOOD.replace("register(Guest)", "1 / 0"), "guest", "ZeroDivisionError"),
    "a hook that is none": (GOOD.replace("_strategies(", "_strategy("), "guest", "vtp_register_strategy"),
    "wrong argument": (GOOD.replace("(register):", "(registrar):"), "guest", "registrar"),
    "name of a built-in": (STRATEGY.format(name="atp", register="Guest"), "guest", "two strategies are named 'atp'"),
    "no class": (STRATEGY.format(name="guest", register="Guest()"), "guest", "is no PruningStrategy class"),
    "another class": (STRATEGY.format(name="guest", register="dict"), "guest", "is no PruningStrategy class"),
    "without a name": (GOOD.replace('name, stage, paper = "guest", ', "stage, paper = "), "guest", "has no name"),
    "nothing in it": ("answer = 42", "guest:answer", "no function that is marked with hookimpl"),
    "not there": ("answer = 42", "guest:question", "question"),
}


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    caches = (plugins.manager, plugins.strategies, plugins.adapters)
    for cache in caches:
        cache.cache_clear()
    yield
    sys.modules.pop("guest", None)
    for cache in caches:
        cache.cache_clear()
    plugins.left_out.clear()
    plugins.disputed.clear()


def install(folder: Path, source: str, value: str = "guest", name: str = "guest") -> None:
    """As pip would."""
    (folder / f"{value.partition(':')[0]}.py").write_text(source)
    info = folder / f"{name}-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1\n")
    (info / "entry_points.txt").write_text(f"[vtp]\n{name} = {value}\n")


@pytest.mark.parametrize("kind", KINDS)
def test_a_broken_plugin_is_named_once_and_left_out(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    source, value, reason = KINDS[kind]
    install(tmp_path, source, value)
    monkeypatch.syspath_prepend(tmp_path)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        assert "fastv" in plugins.list_strategies()
        assert plugins.adapters()
        plugins.get_strategy("fastv")
    (warning,) = [w for w in said if issubclass(w.category, RuntimeWarning)]
    assert "the vtp plugin guest" in str(warning.message)
    assert reason in str(warning.message)
    with pytest.raises(PruningError, match="guest"):  # what it may have offered
        plugins.get_strategy("guests")


def test_a_name_that_two_want_is_refused_when_it_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    install(tmp_path, *KINDS["name of a built-in"][:2])
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.warns(RuntimeWarning, match="left out"):
        plugins.get_strategy("l2")
    with pytest.raises(PruningError, match=r"two strategies are named 'atp': vtp_plugin\.\S+ and guest\.Guest"):
        plugins.get_strategy("atp")


def test_a_good_plugin_joins_beside_a_broken_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    install(tmp_path, GOOD)
    install(tmp_path, "1 / 0", "trouble", "trouble")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.warns(RuntimeWarning, match="trouble"):
        assert plugins.get_strategy("guest").__module__ == "guest"


def test_commands_of_a_broken_plugin_are_left_out(tmp_path: Path):
    source = "from vtp_plugin import hookimpl\n@hookimpl\ndef vtp_register_commands(cli):\n    1 / 0\n"
    install(tmp_path, source)
    path = os.pathsep.join(filter(None, [str(tmp_path), os.environ.get("PYTHONPATH")]))
    command = [sys.executable, "-c", "from vtp_plugin.cli import main; main()", "list"]
    ran = subprocess.run(command, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    assert ran.stderr.count("is left out: ZeroDivisionError") == 1
    assert "fastv" in ran.stdout
