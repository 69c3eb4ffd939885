"""Who may import whom, what must be documented, and what two plugins of one name get to hear."""

from __future__ import annotations

import ast
import inspect
import re
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pluggy
import pytest
from paths import TESTS

import vtp_plugin
from vtp_plugin import PruningStrategy, Stage, get_strategy, hookimpl, hookspecs, list_strategies, plugins, signals
from vtp_plugin.errors import PruningError

PACKAGE = Path(vtp_plugin.__file__).parent
DOCS = PACKAGE.parent / "docs"
STRATEGIES = sorted(p for p in (PACKAGE / "strategies").glob("*.py") if p.stem != "__init__")
CORE = ("surgery", "adapters", "signals", "facts", "metrics", "strategies")  # and the files beside these rooms
HOSTS = {"transformers", "llava", "lmms_eval", "accelerate", "vllm"}


def imports(path: Path, package: Path = PACKAGE) -> set[str]:
    """Every module that a file of the package imports, wherever in the file."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(["vtp_plugin", *path.relative_to(package).parts[: -node.level]]) if node.level else ""
            found.add(".".join(filter(None, [base, node.module])))
    return found


def own(names: set[str]) -> set[str]:
    return {name for name in names if name.split(".")[0] == "vtp_plugin"}


def foreign(names: set[str]) -> set[str]:
    return {root for name in names if (root := name.split(".")[0]) not in sys.stdlib_module_names} - {"vtp_plugin"}


def test_tests_lie_where_the_code_does_and_share_helpers_only():
    """A folder of tests is one of the package or the lanes'; what tests share is a module directly in tests/."""
    found = [path for path in TESTS.rglob("*.py") if path.name.startswith("test_")]
    folders = {path.parent.relative_to(TESTS) for path in found}
    assert {folder for folder in folders if not (PACKAGE / folder).is_dir()} == {Path("lanes")}
    shared = {path.stem for path in TESTS.glob("*.py")}
    beside = {path.stem for path in TESTS.rglob("*.py") if path.parent != TESTS}
    for path in TESTS.rglob("*.py"):
        names = {name.split(".")[0] for name in foreign(imports(path, TESTS))}
        assert not {name for name in names if name.startswith("test_")}, path
        assert not names & (beside - shared - {"lmms_eval"}), path


@pytest.mark.parametrize("path", STRATEGIES, ids=lambda path: path.stem)
def test_a_strategy_imports_torch_and_public_names_only(path: Path):
    names = ("strategy", "film", "tokens", "stages", "errors", "selectors", "replay")
    allowed = {f"vtp_plugin.{name}" for name in names} | {"vtp_plugin"}
    assert foreign(imports(path)) <= {"torch"}
    assert own(imports(path)) <= allowed


@pytest.mark.parametrize("path", sorted((PACKAGE / "surgery").glob("*.py")), ids=lambda path: path.stem)
def test_surgery_knows_no_host_no_method_and_no_family(path: Path):
    assert foreign(imports(path)) <= {"torch"}
    forbidden = ("strategies", "adapters", "hosts", "compare", "bench", "studies", "reporting", "cli", "tiny")
    assert not [name for name in own(imports(path)) if name.split(".")[1:2] and name.split(".")[1] in forbidden]
    code = code_only(path)
    names = [name for name in list_strategies() if name not in ("random", "stride")]
    families = [cls.family for cls in plugins.adapters()]
    assert not [name for name in names + families if re.search(rf"""["']{name}["']""", code)]


def code_only(path: Path) -> str:
    """The source without docstrings and comments."""
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef, ast.Module)) and ast.get_docstring(node):
            node.body = node.body[1:] or [ast.Pass()]
    return ast.unparse(tree)


@pytest.mark.parametrize("path", sorted((PACKAGE / "adapters").glob("*.py")), ids=lambda path: path.stem)
def test_an_adapter_knows_no_method(path: Path):
    assert not [name for name in own(imports(path)) if name.startswith("vtp_plugin.strategies")]
    code = code_only(path)
    assert not [name for name in list_strategies() if re.search(rf"""["']{name}["']""", code)]


@pytest.mark.parametrize("path", sorted(PACKAGE.glob("*.py")), ids=lambda path: path.stem)
def test_the_core_knows_no_host(path: Path):
    assert not foreign(imports(path)) & (HOSTS | {"matplotlib", "PIL", "typer", "rich"})


def test_only_hosts_adapters_and_the_embedded_model_know_a_host():
    knowing = {p.relative_to(PACKAGE).parts[0] for p in PACKAGE.rglob("*.py") if foreign(imports(p)) & HOSTS}
    assert knowing <= {"hosts", "adapters", "tiny", "cli", "bench"}


# -- who imports whom -------------------------------------------------------------------------------------------------


def modules() -> dict[str, Path]:
    """Every module of the package by its dotted name."""
    names = {path: [*path.relative_to(PACKAGE.parent).with_suffix("").parts] for path in PACKAGE.rglob("*.py")}
    return {".".join(parts[:-1] if parts[-1] == "__init__" else parts): path for path, parts in names.items()}


def graph() -> dict[str, set[str]]:
    """What every module imports of the package, wherever in the file, imports for types included."""
    known, found = modules(), {}
    for name, path in known.items():
        edges = set()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                edges |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                full = [f"{node.module}.{alias.name}" for alias in node.names]
                edges |= {one if one in known else node.module for one in full}
        found[name] = {edge for edge in edges if edge in known} - {name}
    return found


def test_no_module_imports_itself_around_a_corner():
    assert list(TopologicalSorter(graph()).static_order())


def test_the_rooms_of_the_core_lie_above_each_other():
    rooms: dict[str, set[str]] = {}
    for name, edges in graph().items():
        for edge in edges:
            above, below = (module.split(".")[1] if "." in module else module for module in (name, edge))
            if above != below and "vtp_plugin" not in (above, below):
                rooms.setdefault(above, set()).add(below)
    core = {"pruning", "adapter", "metrics", "surgery", "signals", "facts", "strategy", "tokens", "clock", "stages"}
    assert list(
        TopologicalSorter({above: below & core for above, below in rooms.items() if above in core}).static_order()
    )


@pytest.mark.parametrize(
    "path", [*PACKAGE.glob("*.py"), *(p for room in CORE for p in (PACKAGE / room).glob("*.py"))], ids=lambda p: p.stem
)
def test_a_file_of_the_core_is_short_and_so_are_its_functions(path: Path):
    text = path.read_text()
    assert len(text.splitlines()) <= 300
    functions = [n for n in ast.walk(ast.parse(text)) if isinstance(n, (ast.FunctionDef, ast.AsyncFunctionDef))]
    assert [f.name for f in functions if f.end_lineno - f.lineno >= 60] == []


def test_importing_the_package_imports_no_host():
    heavy = ["transformers", "lmms_eval", "llava", "matplotlib", "PIL", "datasets", "torchvision", "triton"]
    code = f"import sys, vtp_plugin; vtp_plugin.prune; print(sorted(set({heavy}) & set(sys.modules)))"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "[]"


def test_listing_the_strategies_imports_no_host_and_no_triton():
    heavy = {*HOSTS, "triton"}
    code = f"import sys, vtp_plugin; vtp_plugin.list_strategies(); print(sorted({heavy} & set(sys.modules)))"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "[]"


# -- documentation ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", STRATEGIES, ids=lambda path: path.stem)
def test_a_strategy_file_says_where_it_comes_from(path: Path):
    docstring = ast.get_docstring(ast.parse(path.read_text()))
    assert docstring
    module = f"vtp_plugin.strategies.{path.stem}"
    variants = {c.name: c for c in map(get_strategy, list_strategies()) if c.__module__ == module}
    assert path.stem in variants
    for cls in variants.values():
        assert cls.__doc__
        assert cls.paper
        if cls.paper != "control":
            assert re.search(r"^Source: ", docstring, re.MULTILINE)
        for link in re.findall(r"(?:abs/|doi\.org/)(\S+)", cls.paper):
            assert link in docstring


@pytest.mark.parametrize("name", list_strategies())
def test_every_hyper_parameter_is_explained_where_it_stands(name: str):
    """By a comment behind the field, or by its name in the docstring of its file."""
    cls = get_strategy(name)
    source = inspect.getsource(cls)
    docstring = sys.modules[cls.__module__].__doc__
    for field in cls.fields():
        line = re.search(rf"^    {field}: .*$", source, re.MULTILINE)
        assert line is None or "#" in line.group() or re.search(rf"\b{field}\b", docstring), field


@pytest.mark.parametrize("name", list_strategies())
def test_a_strategy_belongs_to_a_stage_and_needs_signals_that_exist(name: str):
    strategy = get_strategy(name)()
    assert strategy.stage in Stage
    inside = strategy.stage is Stage.VIT and bool(strategy.cut_blocks(4))
    assert signals.wrong(strategy, inside=inside) == ""


def hooks() -> list[str]:
    return [name for name in vars(hookspecs) if name.startswith("vtp_")]


@pytest.mark.parametrize("name", hooks())
def test_every_hook_is_documented(name: str):
    assert inspect.getdoc(getattr(hookspecs, name))
    assert f"`{name}" in (DOCS / "hooks.md").read_text()


def test_the_public_names_exist_and_say_what_they_are():
    for name in vtp_plugin.__all__:
        assert hasattr(vtp_plugin, name)
        assert name.startswith("__") or inspect.getdoc(getattr(vtp_plugin, name))


# -- the catalogue ----------------------------------------------------------------------------------------------------


@pytest.fixture
def manager(monkeypatch: pytest.MonkeyPatch) -> pluggy.PluginManager:
    """A manager of its own, with the built-ins."""
    fresh = pluggy.PluginManager("vtp")
    fresh.add_hookspecs(hookspecs)
    for name in plugins.BUILT_IN:
        fresh.register(sys.modules[name], name=name)
    monkeypatch.setattr(plugins, "manager", lambda: fresh)
    plugins.strategies.cache_clear()
    plugins.adapters.cache_clear()
    yield fresh
    plugins.strategies.cache_clear()
    plugins.adapters.cache_clear()


class Bringing:
    """A plugin with one strategy."""

    def __init__(self, cls: type) -> None:
        self.cls = cls

    @hookimpl
    def vtp_register_strategies(self, register) -> None:
        register(self.cls)


def test_a_stranger_joins_through_the_same_door(manager: pluggy.PluginManager):
    class Mine(PruningStrategy):
        name, stage, paper = "mine", Stage.PROJECTOR, "none"

    manager.register(Bringing(Mine))
    assert "mine" in list_strategies()
    assert get_strategy("mine") is Mine


def test_two_strategies_of_one_name_are_both_named(manager: pluggy.PluginManager):
    class Other(PruningStrategy):
        name, stage, paper = "atp", Stage.PROJECTOR, "none"

    manager.register(Bringing(Other))
    with pytest.raises(PruningError) as error:
        list_strategies()
    message = str(error.value)
    assert message.startswith("two strategies are named 'atp': ")
    assert "vtp_plugin.strategies.atp.ATP" in message
    assert "test_architecture" in message
    assert "Other" in message


def test_two_adapters_of_one_family_are_both_named(manager: pluggy.PluginManager):
    class Twin(plugins.adapters()[0]):
        pass

    class Plugin:
        @hookimpl
        def vtp_register_adapters(self, register) -> None:
            register(Twin)

    plugins.adapters.cache_clear()
    manager.register(Plugin())
    with pytest.raises(PruningError, match=rf"two adapters are named '{Twin.family}': .*vtp_plugin.*Twin|Twin.*vtp_"):
        plugins.adapters()


def test_a_misspelt_hook_is_refused(manager: pluggy.PluginManager):
    class Plugin:
        @hookimpl
        def vtp_register_strategy(self, register) -> None: ...

    manager.register(Plugin())
    with pytest.raises(pluggy.PluginValidationError, match="unknown hook 'vtp_register_strategy'"):
        manager.check_pending()


def test_a_strategy_without_score_or_select_says_so():
    import torch

    class Empty(PruningStrategy):
        name, stage, paper = "empty", Stage.PROJECTOR, "none"

    visual = vtp_plugin.VisualTokens(tokens=torch.rand(1, 4, 2), grid=(2, 2), index=torch.arange(4)[None])
    with pytest.raises(NotImplementedError, match=r"Empty implements neither score\(\) nor select\(\)"):
        Empty().decide(visual)
