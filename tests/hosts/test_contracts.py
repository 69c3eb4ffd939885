"""Every touch point with a host holds on the installed release; one that moves is named in one sentence."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from families import FAMILIES as FAMILIES_BUILT
from family_runs import blip2
from models import build_hf
from packaging.version import Version
from paths import ROOT

import vtp_plugin as vtp
from vtp_plugin import contract, plugins
from vtp_plugin.contract import TouchPoint, Window
from vtp_plugin.errors import HostChanged, PruningError
from vtp_plugin.hosts import compatibility
from vtp_plugin.hosts.compatibility import TESTED
from vtp_plugin.hosts.llava import contract as llava
from vtp_plugin.hosts.lmms_eval import contract as lmms_eval
from vtp_plugin.hosts.transformers import contract as transformers


def points_of(family: str) -> tuple[TouchPoint, ...]:
    name = "idefics3" if family == "smolvlm" else family
    return next(tuple(cls.touches) for cls in plugins.adapters() if cls.family == name)


BUILDERS: dict[str, Callable[[], Any]] = {
    **{name: lambda family=family: family.build("sdpa") for name, family in FAMILIES_BUILT.items()},
    "llava_hf": lambda: build_hf("sdpa").model,
    "blip2": blip2,
}
POINTS = [(family, number) for family in sorted(BUILDERS) for number in range(len(points_of(family)))]
WINDOW = Window("torch", "1.0", "2.0")


def named(point: tuple[str, int]) -> str:
    family, number = point
    return f"{family}-{number}-{points_of(family)[number].where}"


# -- as they are ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("point", POINTS, ids=named)
def test_a_touch_point_with_transformers_holds(point: tuple[str, int], built: dict[str, Any]):
    family, number = point
    if family not in built:
        built[family] = BUILDERS[family]()
    assert not points_of(family)[number].missing(built[family])


@pytest.fixture(scope="module")
def built() -> dict[str, Any]:
    """Tiny models by family."""
    return {}


@pytest.mark.parametrize("family", ["clip", "siglip"])
def test_touch_points_of_encoders_hold(family: str):
    pytest.importorskip("transformers")
    assert not list(contract.broken(transformers.FAMILIES[family]))


@pytest.mark.parametrize("point", lmms_eval.EVERY, ids=lambda point: point.where)
def test_a_touch_point_with_lmms_eval_holds(point: TouchPoint):
    pytest.importorskip("lmms_eval.models")
    assert not point.missing()


def test_touch_points_with_the_authors_package_hold():
    pytest.importorskip("llava")
    from models import build_authors

    model = build_authors("sdpa").model
    assert [point.missing(model) for point in llava.ANYRES] == [""] * len(llava.ANYRES)
    assert not list(contract.broken(llava.PICTURES))


def test_every_family_of_the_package_has_touch_points():
    for cls in plugins.adapters():
        if cls.__module__.startswith("vtp_plugin."):
            assert cls.touches or cls.refused, cls


# -- when they move ---------------------------------------------------------------------------------------------------


def test_a_decoder_layer_without_its_cache_is_named_when_it_is_attached_to(monkeypatch: pytest.MonkeyPatch):
    model = FAMILIES_BUILT["llava_next"].build("sdpa")
    layer = type(model.model.language_model.layers[0])

    def forward(self: Any, hidden_states: Any, attention_mask: Any, position_ids: Any, position_embeddings: Any) -> Any:
        """As of a release to come."""

    monkeypatch.setattr(layer, "forward", forward)
    with pytest.raises(HostChanged) as error:
        vtp.prune(model, "fastv")
    said = str(error.value)
    assert "no longer passes `cache` or `past_key_values` to model.language_model.layers.0" in said
    assert said.startswith("transformers ")
    assert f"vtp-plugin {vtp.__version__} was tested with {TESTED['transformers']}" in said
    assert "\n" not in said


def test_the_models_own_forward_has_a_name(monkeypatch: pytest.MonkeyPatch):
    model = FAMILIES_BUILT["llava_next"].build("sdpa")
    monkeypatch.setattr(type(model), "forward", lambda self, input_ids, cache: None)
    with pytest.raises(HostChanged, match=r"`logits_to_keep` to LlavaNextForConditionalGeneration\.forward, needed"):
        vtp.prune(model, "stride")


def test_a_part_that_is_gone_is_named_when_it_is_attached_to(monkeypatch: pytest.MonkeyPatch):
    model = FAMILIES_BUILT["qwen2_5_vl"].build("sdpa")
    monkeypatch.delattr(sys.modules[type(model.model.visual).__module__], "get_vision_window_index")
    with pytest.raises(HostChanged, match=r"no longer has model\.visual@get_vision_window_index"):
        vtp.prune(model, "stride")


MODULE = ModuleType("moved")


def moved(a: int, b: int = 0) -> str:
    return "told_results.json"


@pytest.fixture(autouse=True)
def _module(monkeypatch: pytest.MonkeyPatch):
    MODULE.moved, MODULE.Kept = moved, SimpleNamespace(field=1, rows=[moved], make=lambda: moved)
    monkeypatch.setitem(sys.modules, "moved", MODULE)


@pytest.mark.parametrize(
    ("where", "more", "said"),
    [
        ("moved:moved", {"takes": ("a", "b")}, ""),
        ("moved:moved", {"takes": ("a", "c|b")}, ""),
        ("moved:moved", {"takes": ("a", "c|d")}, "no longer passes `c` or `d` to moved:moved"),
        ("moved:Kept", {"has": ("field",)}, ""),
        ("moved:Kept", {"has": ("field", "gone")}, "no longer has `gone` in moved:Kept"),
        ("moved:Kept.rows.0", {"takes": ("a",)}, ""),
        ("moved:Kept.rows.1", {}, "no longer has moved:Kept.rows.1 (list index out of range)"),
        ("moved:Kept.make()", {"takes": ("b",)}, ""),
        ("moved:moved", {"says": ("_results.json",)}, ""),
        ("moved:moved", {"says": ("_samples_",)}, "no longer says `_samples_` in moved:moved"),
        ("moved:gone", {}, "no longer has moved:gone"),
        ("no_such_module:gone", {}, "no longer has no_such_module:gone (No module named 'no_such_module')"),
        (".gone", {}, "no longer has gone"),
        (".gone", {"since": (99,)}, ""),
    ],
)
def test_what_a_touch_point_says(where: str, more: dict[str, Any], said: str):
    point = TouchPoint(WINDOW, where, "a test", **more)
    missing = point.missing(SimpleNamespace())
    assert missing.startswith(said)
    assert bool(missing) == bool(said)


def test_a_check_costs_a_few_milliseconds():
    from time import perf_counter

    points, model = transformers.FAMILIES["qwen3_vl"], FAMILIES_BUILT["qwen3_vl"].build("sdpa")
    contract.check(points, model)
    started = perf_counter()
    for _ in range(10):
        contract.check(points, model)
    assert (perf_counter() - started) / 10 < 0.02


# -- releases ---------------------------------------------------------------------------------------------------------


def declared(package: str) -> list[str]:
    """The bounds of a requirement in pyproject.toml, floor first."""
    text = (ROOT / "pyproject.toml").read_text()
    (bounds,) = set(re.findall(rf'"{package}([<>=][^"]*)"', text))
    return sorted(bounds.split(","), reverse=True)


@pytest.mark.parametrize("package", ["transformers", "lmms-eval", "vllm"])
def test_declared_bounds_are_the_tested_window(package: str):
    """From the oldest that was tested up to the first minor release that was not."""
    oldest, newest = (Version(v) for v in (TESTED[package].oldest, TESTED[package].newest))
    assert declared(package) == [f">={oldest}", f"<{newest.major}.{newest.minor + 1}"]


@pytest.mark.parametrize("package", ["filelock", "sentencepiece"])
def test_declared_bounds_leave_out_what_is_known_broken(package: str):
    (pair,) = [pair for pair in compatibility.KNOWN_BROKEN if pair.package == package]
    floor, ceiling = declared(package)
    assert ceiling == f"<{pair.releases.removeprefix('>=')}"
    assert pair.remedy == f'pip install "{package}{floor},{ceiling}"'


PAIRS = [
    ({"filelock": "4.3.1", "lmms-eval": "0.7.3"}, 'pip install "filelock>=3.12,<4"'),
    ({"filelock": "3.20.0", "lmms-eval": "0.7.3"}, ""),
    ({"filelock": "4.3.1"}, ""),
    ({"sentencepiece": "0.2.3", "protobuf": "6.33.0"}, 'pip install "sentencepiece>=0.2,<0.2.2"'),
    ({"sentencepiece": "0.2.1", "protobuf": "6.33.0"}, ""),
    ({"sentencepiece": "0.2.3", "protobuf": "7.34.0"}, ""),
    ({"torch": "2.13.0+cpu", "torchvision": "0.28.0"}, "pip install --force-reinstall"),
    ({"torch": "2.13.0+cpu", "torchvision": "0.28.0+cpu"}, ""),
    ({"torch": "2.13.0", "torchvision": "0.28.0"}, ""),
    ({"torch": "2.13.0+cu130", "torchvision": "0.28.0+cu130"}, ""),
    ({"transformers": "5.16.2"}, 'pip install "transformers>=5.17'),
    ({"transformers": "5.17.0"}, ""),
    ({"llava": "1.7.0.dev0"}, "pip install --no-deps llava-torch==1.2.2.post1"),
    ({"llava": "1.2.2.post1"}, ""),
]


@pytest.mark.parametrize(("installed", "remedy"), PAIRS, ids=lambda value: str(value)[:50])
def test_pairs_that_are_known_not_to_work(installed: dict[str, str], remedy: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(compatibility, "_installed", lambda package: installed.get(package, ""))
    found = [str(pair) for pair in compatibility.known_broken()]
    assert bool(found) == bool(remedy)
    if remedy:
        assert remedy in found[0]
        with pytest.raises(PruningError, match="To mend it"):
            compatibility.refuse_broken("llava")


def test_one_that_concerns_another_model_is_let_through(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(compatibility, "_installed", {"llava": "1.7.0"}.get)
    compatibility.refuse_broken("qwen2_5_vl")


@pytest.mark.parametrize(
    ("release", "said"),
    [
        ("5.16.9", "older"),
        ("5.17.0", ""),
        ("5.24.3", ""),
        ("5.25.0", "newer"),
        ("6.0", "newer"),
        ("5.17.0.dev1", "older"),
    ],
)
def test_how_a_release_lies_to_what_was_tested(release: str, said: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(contract, "_version", lambda package: release)
    assert compatibility.outside(Window("transformers", "5.17", "5.24")).startswith(said)
    assert bool(compatibility.outside(Window("transformers", "5.17", "5.24"))) == bool(said)
