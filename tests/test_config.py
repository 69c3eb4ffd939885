"""Everything that a user can misspell is refused in one sentence: what was asked, what was found, what exists."""

from __future__ import annotations

import math
import textwrap
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
from paths import ROOT

from vtp_plugin import PruningStrategy, get_strategy, list_strategies
from vtp_plugin.config import build, describe, fingerprint, parse_pairs, resolve
from vtp_plugin.errors import PruningError

SETTINGS = ROOT / "plugin_configs" / "strategies"


def refusal(spec: Any, args: dict[str, Any] | None = None) -> str:
    with pytest.raises(PruningError) as error:
        resolve(spec, args)
    message = str(error.value)
    assert "\n" not in message
    return message


@pytest.fixture
def written(tmp_path: Path):
    def write(text: str) -> str:
        path = tmp_path / "run.yaml"
        path.write_text(textwrap.dedent(text))
        return str(path)

    return write


# -- names and values -------------------------------------------------------------------------------------------------


def test_a_misspelt_strategy():
    message = refusal("visonzip")
    assert message.startswith("unknown strategy 'visonzip'. Did you mean 'visionzip'? Available: atp, ")
    assert all(name in message for name in list_strategies())


def test_a_strategy_that_resembles_nothing_gets_no_suggestion():
    assert "Did you mean" not in refusal("qqqqqq")


@pytest.mark.parametrize("spec", ["", " ", "+", "atp+", "atp fastv", "ATP"])
def test_what_is_no_name_is_an_unknown_strategy(spec: Any):
    assert "unknown strategy" in refusal(spec)


@pytest.mark.parametrize(("args", "hint"), [({"keep_radio": 0.5}, "keep_ratio"), ({"alhpa": 1}, "alpha")])
def test_a_misspelt_field(args: dict[str, Any], hint: str):
    (key,) = args
    message = refusal("atp", args)
    assert f"unknown field '{key}' for 'atp'. Did you mean '{hint}'? Fields: alpha, " in message


def test_a_misspelt_field_behind_a_prefix():
    assert "unknown field 'keep_radio' for strategy 'fastv'. Did you mean" in refusal("fastv", {"fastv.keep_radio": 1})


@pytest.mark.parametrize(
    ("name", "field", "value", "rule"),
    [
        ("fastv", "keep_ratio", 2, "must be in (0, 1]"),
        ("fastv", "keep_ratio", 0, "must be in (0, 1]"),
        ("fastv", "keep_ratio", -0.1, "must be in (0, 1]"),
        ("fastv", "keep_ratio", math.nan, "must be in (0, 1]"),
        ("fastv", "keep_ratio", "half", "must be in (0, 1]"),
        ("fastv", "keep_ratio", True, "must be in (0, 1]"),
        ("l2", "keep_tokens", 0, "must be a whole number >= 1"),
        ("l2", "keep_tokens", 2.5, "must be a whole number >= 1"),
        ("l2", "center", "yes", "must be one of True, False"),
        ("fastv", "layer", 0, "must be a whole number >= 1"),
        ("atp", "alpha", 1.5, "must be a number in [0, 1]"),
        ("atp", "alpha", "high", "must be a number in [0, 1]"),
        ("atp", "layer", "last", "must be a whole number"),
        ("atp", "relevance_sign", 0, "must be one of 1, -1"),
        ("atp", "normalization", "softmax", "must be one of minmax, zscore"),
        ("vprune", "group", 1, "must be a whole number >= 2"),
        ("vprune", "bins", 257, "must be at most 256"),
        ("vprune", "chi2_threshold", -1, "must be a number in [0, inf]"),
        ("vprune", "cosine_threshold", 2, "must be a number in [-1, 1]"),
        ("vprune", "color_space", "lab", "must be one of rgb, hsv"),
        ("random", "seed", -1, "must be a whole number >= 0"),
        ("stride", "at", "pixels", "must be one of vit, projector, llm"),
    ],
)
def test_a_value_out_of_range(name: str, field: str, value: Any, rule: str):
    assert refusal(name, {field: value}) == f"{name}: {field} {rule}, got {value!r}"


def test_both_budgets():
    both = {"keep_ratio": 0.5, "keep_tokens": 64}
    assert refusal("l2", both) == "l2: give keep_ratio or keep_tokens, not both"
    assert "not both" in refusal("visionzip", {"keep_tokens": 64, "dominant": 54, "contextual": 10})
    assert "give both dominant and contextual" in refusal("visionzip", {"dominant": 54})


# -- which strategy a key belongs to ----------------------------------------------------------------------------------


def test_a_prefix_of_a_strategy_that_does_not_run():
    message = refusal("atp+fastv", {"vprune.bins": 4})
    assert message == "'vprune.bins' names no strategy of this run. Strategies: atp, fastv"


def test_a_bare_key_of_several_strategies():
    message = refusal("atp+fastv", {"layer": 2})
    assert message == "'layer' is a field of several strategies; say atp.layer or fastv.layer"


def test_bare_and_prefixed_keys_reach_their_strategy():
    atp, fastv = resolve("fastv+atp", {"alpha": 0.25, "fastv.layer": 3, "atp.keep-ratio": 0.9})
    assert (atp.alpha, atp.keep_ratio, atp.layer) == (0.25, 0.9, -1)
    assert (fastv.layer, fastv.keep_ratio) == (3, 0.5)


def test_hyphens_are_underscores():
    assert parse_pairs("keep-ratio=0.6, fastv.keep-ratio = 0.5") == {"keep_ratio": 0.6, "fastv.keep_ratio": 0.5}
    assert resolve("l2", {"keep-ratio": 0.6})[0].keep_ratio == 0.6


def test_pairs_are_read_as_yaml_reads_them():
    text = "a=1,b=0.5,c=true,d=hsv,e=-1,f=null,g=/tmp/x=y,"
    expected = {"a": 1, "b": 0.5, "c": True, "d": "hsv", "e": -1, "f": None, "g": "/tmp/x=y"}
    assert parse_pairs(text) == expected
    assert parse_pairs("") == {}
    with pytest.raises(PruningError, match="no pruning argument in ', ,'"):
        parse_pairs(", ,")


@pytest.mark.parametrize("text", ["keep_ratio", "=1", "keep_ratio=", "a=1,b", "a=[1", "a={", "a='"])
def test_pairs_that_cannot_be_read(text: str):
    with pytest.raises(PruningError, match=r"cannot read .*Expected key=value"):
        parse_pairs(text)


@pytest.mark.parametrize("value", ["1e-3", "5e0"])
def test_numbers_in_scientific_notation_are_numbers(value: str):
    assert resolve("vprune", parse_pairs(f"chi2_threshold={value}"))[0].chi2_threshold == float(value)


# -- several strategies -----------------------------------------------------------------------------------------------


def test_strategies_run_in_the_order_of_the_stages():
    names = [s.name for s in resolve("fastv+random+visionzip+l2+vprune", {"random.at": "projector"})]
    assert names == ["vprune", "l2", "random", "visionzip", "fastv"]
    deep = resolve("fastv+random", {"random.at": "llm", "random.layer": 1})
    assert [s.name for s in deep] == ["random", "fastv"]


def test_none_is_no_strategy_and_stands_alone():
    assert resolve("none") == resolve(["none"]) == []
    assert "'none' cannot be combined" in refusal("none+atp")
    assert "unknown field 'keep_ratio' for 'none'" in refusal("none", {"keep_ratio": 0.5})


def test_a_strategy_named_twice():
    assert refusal("atp+fastv+atp") == "a strategy is named twice in 'atp+fastv+atp'"


def test_objects_bring_their_own_hyper_parameters():
    l2 = get_strategy("l2")(keep_tokens=7)
    assert resolve(l2) == resolve([l2]) == [l2]
    assert [s.name for s in resolve(["fastv", l2])] == ["l2", "fastv"]
    assert "belong into the strategy objects, got layer" in refusal([l2], {"layer": 2})


# -- files ------------------------------------------------------------------------------------------------------------


def test_a_file_with_one_strategy_and_arguments_on_top(written):
    path = written("strategy: atp\nkeep-ratio: 0.3\nalpha: 0.1\n")
    (plain,), (changed,) = resolve(path), resolve(Path(path), {"alpha": 0.9, "atp.layer": -2})
    assert (plain.keep_ratio, plain.alpha, plain.layer) == (0.3, 0.1, -1)
    assert (changed.keep_ratio, changed.alpha, changed.layer) == (0.3, 0.9, -2)


def test_a_file_with_several_strategies(written):
    path = written(
        """
        strategies:
          - {strategy: fastv, layer: 3}
          - {strategy: l2, keep_tokens: 100}
        """
    )
    l2, fastv = resolve(path)
    assert (l2.keep_tokens, fastv.layer) == (100, 3)


def test_a_missing_file():
    assert refusal("runs/nowhere.yaml") == "pruning file not found: runs/nowhere.yaml"


def test_a_misspelt_key_in_a_file_names_the_file(written):
    path = written("strategy: fastv\nkeep_radio: 0.5\n")
    start = f"{path}: unknown field 'keep_radio' for strategy 'fastv'. Did you mean 'keep_ratio'? Fields: "
    assert refusal(path).startswith(start)


def test_a_misspelt_strategy_in_a_file_suggests_the_right_one(written):
    assert "unknown strategy 'fastw'. Did you mean 'fastv'?" in refusal(written("strategy: fastw\n"))


def test_a_bad_value_in_a_file_names_the_file(written):
    path = written("strategy: fastv\nkeep_ratio: 2\n")
    assert refusal(path) == f"{path}: fastv: keep_ratio must be in (0, 1], got 2"


@pytest.mark.parametrize(
    "text",
    ["", "3", "text", "[]", "stratgy: atp", "strategies: atp", "strategies:", "- atp", "strategies: [{layer: 2}]"],
)
def test_a_file_of_another_shape(written, text: str):
    path = written(text)
    assert refusal(path).startswith(f"{path}: expected 'strategy: NAME' and its fields, or a list of such entries")


def test_a_file_that_is_no_yaml(written):
    assert "not valid YAML" in refusal(written("strategy: [atp\n"))


@pytest.mark.parametrize("text", ["strategy: 5", "strategy: [atp]", "strategy:", "strategy: atp\n5: 3"])
def test_a_file_whose_names_are_no_text(written, text: str):
    assert refusal(written(text))


def test_a_key_beside_a_list_of_strategies_is_not_overlooked(written):
    assert "keep_ratio" in refusal(written("keep_ratio: 0.2\nstrategies: [{strategy: atp}]\n"))


def test_a_strategy_named_twice_in_a_file(written):
    path = written("- {strategy: fastv, layer: 2}\n- {strategy: fastv, layer: 3}\n")
    assert "twice" in refusal(path)


def test_a_file_may_ask_for_no_pruning(written):
    assert resolve(written("strategy: none\n")) == []


@pytest.mark.parametrize("path", sorted(SETTINGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_the_settings_that_come_with_the_project_can_be_read(path: Path):
    assert resolve(path)


# -- records ----------------------------------------------------------------------------------------------------------


def test_the_record_holds_every_value():
    (entry,) = describe(resolve("atp", {"alpha": 0.1}))
    assert entry["name"] == "atp"
    assert entry["stage"] == "projector"
    assert set(entry["config"]) == set(get_strategy("atp").fields())
    assert (entry["config"]["alpha"], entry["config"]["keep_ratio"]) == (0.1, 0.6)


@pytest.mark.parametrize("name", list_strategies())
def test_a_strategy_is_built_again_from_its_record(name: str):
    (entry,) = describe(resolve(name))
    given = {k: v for k, v in entry["config"].items() if name != "visionzip" or k in ("dominant", "contextual")}
    assert build(name, given) == resolve(name)[0]


POOL = (0.3, 0.9, 1, 2, 3, -1, True, False, "1 2", "vit", "llm", "elsewhere", "hsv", "or", "asymmetric", "mean", "all")
POOL += (
    "projector",
    "3 7 16",
    "zscore",
    "total",
    "bilinear",
    "mae",
    "raster",
    "previous",
    "none",
    "original",
    "additive",
)
POOL += ("attention", "strips", "black", "before")
ONLY = {("dart", "judge"): {"at": "projector"}, ("l2", "judge"): {"at": "projector"}}  # where a field has another value


def other(name: str, field: str) -> PruningStrategy:
    """The strategy with another value in one field: the first of the pool that it accepts."""
    default = getattr(get_strategy(name)(), field)
    beside = ONLY.get((name, field), {})
    for value in (v for v in POOL if v != default):
        try:
            changed = get_strategy(name)(**beside, **{field: value})
        except PruningError:
            continue
        if getattr(changed, field) != default:
            return changed
    raise AssertionError(f"no other value for {name}.{field}")


@pytest.mark.parametrize("name", sorted({*list_strategies()} - {"visionzip"}))
def test_every_value_is_part_of_the_fingerprint(name: str):
    cls = get_strategy(name)
    texts = [fingerprint([cls()], "1"), fingerprint([cls()], "2"), fingerprint([], "1")]
    texts += [
        fingerprint([other(name, field)], "1") for field in cls.fields() if field not in ("keep_tokens", "budget")
    ]
    assert len(set(texts)) == len(texts)


def test_a_new_default_changes_the_fingerprint(monkeypatch: pytest.MonkeyPatch):
    before = fingerprint(resolve("atp"), "1")
    assert before == fingerprint(resolve("atp"), "1") == fingerprint(resolve("atp", {"alpha": 0.5}), "1")
    monkeypatch.setattr(get_strategy("atp"), "default_keep_ratio", 0.7)
    assert fingerprint(resolve("atp"), "1") != before


def test_every_default_is_a_value_that_is_accepted():
    for name in list_strategies():
        strategy = get_strategy(name)()
        assert {f.name for f in fields(strategy)} >= set(strategy.fields())
        assert name == "visionzip" or replace(strategy) == strategy
