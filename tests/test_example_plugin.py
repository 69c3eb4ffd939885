"""docs/example-plugin is a package that works: installed by pip, listed, checked, usable by name like a built-in."""

from __future__ import annotations

import ast
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from importlib.metadata import distributions, entry_points
from pathlib import Path

import families
import pytest
import slow
import torch
from example import EXAMPLE, on_the_path
from family_runs import SHALLOW
from paths import ROOT, TESTS

from vtp_plugin import plugins, prune
from vtp_plugin.conformance import conforms
from vtp_plugin.errors import PruningError
from vtp_plugin.promises import promises

REFUSED = {  # on its family
    **dict.fromkeys(("atp", "cdpruner"), "has no CLIP text encoder"),
    **dict.fromkeys(("prumerge", "prumerge_plus"), "it needs a class token"),
    **dict.fromkeys(("evs", "flashvid", "vidcom2"), "it compares the frames of a video"),
    "mmtok": "this strategy reads the question",
    "tome": "merging inside the blocks is not possible",
}


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
    caches = (plugins.manager, plugins.strategies, plugins.adapters)
    for cached in caches:
        cached.cache_clear()
    with on_the_path(monkeypatch):
        yield
    for cached in caches:
        cached.cache_clear()


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
@pytest.mark.parametrize("name", ["center", "quiet"])
def test_its_strategies_conform(name: str):
    assert [outcome for outcome in conforms(plugins.get_strategy(name)) if not outcome.passed] == []


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize("family", ["llava_next", "qwen2_5_vl"])
@torch.no_grad()
def test_its_own_signal_reaches_its_strategy(family: str):
    one, model = families.FAMILIES[family], families.FAMILIES[family].build("sdpa")
    with prune(model, plugins.get_strategy("quiet")()) as pruned:
        model(**one.batch([one.sample(0, 1)]))
    assert [event.strategy for event in pruned.events] == ["quiet"]
    assert pruned.events[0].after[0] < pruned.events[0].before[0]


@pytest.mark.usefixtures("installed")
def test_its_family_keeps_its_promises():
    from vtp_example import small

    assert [outcome for outcome in promises(small.build()) if not outcome.passed] == []


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize("name", [*plugins.list_strategies(), "center", "quiet"])
@torch.no_grad()
def test_every_strategy_runs_on_its_family_or_is_refused(name: str):
    from vtp_example import small

    case = small.build()
    strategy = plugins.get_strategy(name)(**SHALLOW.get(name, {}))
    with pytest.raises(PruningError, match=REFUSED[name]) if name in REFUSED else nullcontext():
        with prune(case.model, strategy, processor=case.processor) as pruned:
            case.model(**case.batch)
        assert {event.strategy for event in pruned.events} == {name}


def lines(path: str, name: str) -> int:
    """Lines of code of a class or function, or of a file without a name: no blank lines, no docstrings."""
    tree = ast.parse((EXAMPLE / "src" / "vtp_example" / path).read_text())
    nodes = [n for n in tree.body if not name or name in (getattr(n, "name", ""),)]
    assert nodes
    code = [node for top in nodes for node in ast.walk(top)]
    told = [n.value for n in code if isinstance(n, ast.Expr) and isinstance(n.value, ast.Constant)]
    silent = {line for doc in told for line in range(doc.lineno, doc.end_lineno + 1)}
    first = lambda n: min([n.lineno, *(d.lineno for d in getattr(n, "decorator_list", []))])  # noqa: E731
    text = (EXAMPLE / "src" / "vtp_example" / path).read_text().splitlines()
    spans = {line for node in nodes for line in range(first(node), node.end_lineno + 1)} - silent
    return sum(bool(text[line - 1].strip()) for line in spans)


def test_its_page_says_how_many_lines_it_took():
    page = (EXAMPLE / "README.md").read_text()
    counted = [
        ("a signal, `key_lengths`", "plugin.py", lines("plugin.py", "key_lengths")),
        ("a strategy that reads it, `quiet`", "plugin.py", lines("plugin.py", "Quiet")),
        ("a strategy that reads nothing, `center`", "plugin.py", lines("plugin.py", "Center")),
        ("a family, `deepseek_vl`", "deepseek_vl.py", lines("deepseek_vl.py", "")),
        (
            "how all of them join",
            "plugin.py",
            lines("plugin.py", "vtp_register_strategies") + lines("plugin.py", "vtp_register_adapters"),
        ),
    ]
    for what, path, count in counted:
        assert f"| {what} | `{path}` | {count} |" in page, count


def test_the_worked_example_of_a_family_is_its_file():
    family = (EXAMPLE / "src" / "vtp_example" / "deepseek_vl.py").read_text()
    assert f"```python\n{family}```" in (ROOT / "docs" / "add-a-model.md").read_text()


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


# -- installed for real -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder into which pip has installed the package, offline."""
    if {"pip", "setuptools"} - {distribution.name for distribution in distributions()}:
        pytest.skip("needs pip and setuptools to build the package offline")
    folder = tmp_path_factory.mktemp("installed")
    source = shutil.copytree(EXAMPLE, folder / "source")  # builds leave traces
    options = ["--no-deps", "--no-build-isolation", "--no-index", "--quiet", "--target", str(folder / "site")]
    done = subprocess.run(
        [sys.executable, "-m", "pip", "install", *options, str(source)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return folder / "site"


def python(site: Path, code: str, *args: str) -> subprocess.CompletedProcess[str]:
    """A fresh interpreter that has the package installed and is not near its source."""
    path = os.pathsep.join([str(site), str(ROOT), os.environ.get("PYTHONPATH", "")])
    return subprocess.run(
        [sys.executable, "-c", code, *args],
        capture_output=True,
        text=True,
        cwd=site.parent,
        env={**os.environ, "PYTHONPATH": path, "COLUMNS": "200"},
    )


HOST = "from lmms_eval.__main__ import cli_evaluate; cli_evaluate()"
LIST_AND_CHECK = """
from vtp_plugin.cli import run
if run(["list"]) or run(["check", "center"]):
    raise SystemExit("listed or checked with an error")
"""
PROMISES = """
import sys
sys.path.insert(0, sys.argv[1])
import promises as shared
from models import N, prompts, tiny

import torch
import vtp_plugin as vtp

assert vtp.get_strategy("center").__module__ == "vtp_example.plugin"
host = tiny("llava_hf")
for kind in ("single", "batch"):
    rows = prompts(kind)
    with torch.no_grad():
        before = host.forward(rows).logits
        with host.prune("center", keep_ratio=1.0):
            assert host.forward(rows).logits.equal(before)
        with host.prune("center", keep_tokens=9) as pruned, shared.Lengths(host.decoder.layers) as lengths:
            together = host.generate(rows)
            found = shared.kept(pruned.events)["center"]
        assert host.forward(rows).logits.equal(before)
    assert all(len(index) == 9 for index in found.values())
    images = [len(numbers) for numbers in host.numbers(rows)]
    words = [sum(not isinstance(part, torch.Tensor) for part in row) for row in rows]
    assert lengths == [max(w + 9 * i for w, i in zip(words, images))] * 4
    for number, row in enumerate(rows):
        with host.prune("center", keep_tokens=9):
            alone = host.generate([row])
        for one, all_ in zip(alone.logits, together.logits):
            torch.testing.assert_close(one[0], all_[number], atol=2e-4, rtol=1e-4)
with host.prune("center+fastv", keep_ratio=0.25) as pruned:
    host.generate(prompts("single"))
assert [event.strategy for event in pruned.events] == ["center", "fastv"]
print("kept")
"""


@pytest.fixture(scope="module")
def told(site: Path) -> subprocess.CompletedProcess[str]:
    """One interpreter that lists, checks, and holds it to the promises."""
    return python(site, LIST_AND_CHECK + PROMISES, str(TESTS))


@pytest.mark.slow
def test_installed_it_is_listed_and_checked(told: subprocess.CompletedProcess[str]):
    listed, checked = told.stdout.split("\nquiet", 1)
    assert "\ncenter" in listed
    assert "center: all checks passed" in checked


@pytest.mark.slow
def test_installed_it_keeps_the_shared_promises(told: subprocess.CompletedProcess[str]):
    assert told.returncode == 0, told.stdout + told.stderr
    assert told.stdout.strip().endswith("kept"), told.stderr


@pytest.mark.slow
def test_installed_it_runs_through_lmms_eval(site: Path, tmp_path: Path):
    pytest.importorskip("lmms_eval")
    told = {"model": "llava_hf", "model_args": "pretrained=vtp-tiny", "tasks": "vtp_scenes_presence", "limit": 1}
    told |= {"pruning": "center", "output_path": tmp_path / "out"}
    done = python(site, HOST, *(f"--{name}={value}" for name, value in told.items()))
    assert done.returncode == 0, done.stderr
    (results,) = (tmp_path / "out").rglob("*_results.json")
    assert [s["name"] for s in json.loads(results.read_text())["pruning"]["strategies"]] == ["center"]
