"""docs/example-plugin is a package that works: found through its entry point, listed, checked, usable by name."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import entry_points
from pathlib import Path

import pytest
import slow
import torch

from vtp_plugin import plugins
from vtp_plugin.conformance import conforms

EXAMPLE = Path(__file__).parent.parent / "docs" / "example-plugin"


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The package on the path with the metadata that an installation would write."""
    tomllib = pytest.importorskip("tomllib")
    project = tomllib.loads((EXAMPLE / "pyproject.toml").read_text())["project"]
    info = tmp_path / "vtp_example-0.1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n")
    points = project["entry-points"]["vtp"].items()
    (info / "entry_points.txt").write_text("[vtp]\n" + "".join(f"{name} = {value}\n" for name, value in points))
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.syspath_prepend(str(EXAMPLE / "src"))
    caches = (plugins.manager, plugins.strategies, plugins.adapters)
    for cached in caches:
        cached.cache_clear()
    yield
    for cached in caches:
        cached.cache_clear()
    for name in [name for name in sys.modules if name.startswith("vtp_example")]:
        del sys.modules[name]


@pytest.mark.usefixtures("installed")
def test_the_package_is_found_by_its_entry_point():
    assert "vtp_example" in {point.name for point in entry_points(group="vtp")}
    assert "center" in plugins.list_strategies()
    assert plugins.get_strategy("center").__module__ == "vtp_example.plugin"


@pytest.mark.usefixtures("installed")
def test_its_strategy_keeps_the_middle():
    seen = slow.visual(torch.zeros(1, 25, 3), grid=(5, 5))
    assert slow.columns(plugins.get_strategy("center")(keep_tokens=5).decide(seen)) == [[7, 11, 12, 13, 17]]


@pytest.mark.usefixtures("installed")
def test_its_strategy_conforms():
    assert [outcome for outcome in conforms(plugins.get_strategy("center")) if not outcome.passed] == []


def test_without_the_package_it_is_unknown():
    assert "center" not in plugins.list_strategies()


def test_vtp_check_reads_it_from_a_file():
    path = EXAMPLE / "src" / "vtp_example" / "plugin.py"
    run = subprocess.run(
        [sys.executable, "-c", "from vtp_plugin.cli import main; main()", "check", "center", "--module", str(path)],
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    assert "center: all checks passed" in run.stdout
