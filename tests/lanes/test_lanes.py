"""Pins, lanes and the page that is made from their records."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from types import ModuleType
from xml.etree import ElementTree

import pytest
from paths import ROOT

CONSTRAINTS = sorted(ROOT.glob("constraints*.txt"))
RECORDS = ROOT / "docs" / "results" / "lanes"


def tool(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"lanes_{name}", ROOT / "tests" / "lanes" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("file", CONSTRAINTS, ids=lambda file: file.name)
def test_pins_are_names_and_public_versions(file: Path) -> None:
    lines = file.read_text().splitlines()
    assert len(lines) > 100
    assert all(re.fullmatch(r"[a-z0-9-]+==[0-9][0-9a-z.]*", line) for line in lines)
    names = [line.partition("==")[0] for line in lines]
    assert names == sorted(set(names))
    assert "vtp-plugin" not in names


@pytest.mark.parametrize("file", CONSTRAINTS, ids=lambda file: file.name)
def test_pins_lie_inside_the_declared_bounds(file: Path) -> None:
    from packaging.requirements import Requirement

    tomllib = pytest.importorskip("tomllib")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    asked = [*project["dependencies"], *(line for extra in project["optional-dependencies"].values() for line in extra)]
    pinned = dict(line.split("==") for line in file.read_text().splitlines())
    for wanted in map(Requirement, asked):
        if wanted.name in pinned:
            assert wanted.specifier.contains(pinned[wanted.name]), f"{wanted}: {pinned[wanted.name]}"


def test_there_are_pins_for_every_environment() -> None:
    assert {file.name for file in CONSTRAINTS} == {"constraints.txt", "constraints-oldest.txt", "constraints-vllm.txt"}
    makefile = (ROOT / "Makefile").read_text()
    assert all(file.name in makefile for file in CONSTRAINTS)


REPORT = """<testsuites><testsuite>
<testcase classname="tests.hosts.test_contracts" name="test_a[x]" time="1.5"/>
<testcase classname="tests.hosts.test_contracts" name="test_b" time="0.5">
<failure message="it moved&#10;more"/></testcase>
<testcase classname="tests.surgery.test_promises" name="test_cached_generation_equals_the_slow_reference[l2]" time="1"/>
<testcase classname="tests.hosts.vllm.test_llava" name="test_c" time="1"><skipped message="no"/></testcase>
</testsuite></testsuites>"""


def test_a_record_counts_what_ran_and_names_what_failed() -> None:
    lane = tool("lane")
    made = lane.record("oldest", 1, list(ElementTree.fromstring(REPORT).iter("testcase")))
    assert made["held"]["contracts"] == {"passed": 1, "failed": 1, "left_out": 0, "seconds": 2}
    assert made["held"]["every family and stage against the slow reference"]["passed"] == 1
    assert made["failures"][0] == "test_b: it moved"
    assert "nothing ran that shows: beam search" in made["failures"]
    assert not made["green"]
    assert "lane oldest: NOT GREEN" in lane.said(made, advisory=False)


def test_a_lane_in_which_nothing_ran_is_not_green() -> None:
    lane = tool("lane")
    assert not lane.record("pinned", 0, [])["green"]
    skipped = [case for case in ElementTree.fromstring(REPORT).iter("testcase") if case.find("skipped") is not None]
    assert not lane.record("vllm", 0, skipped)["green"]


def test_a_lane_names_tests_that_exist() -> None:
    lane = tool("lane")
    for test in (one for tests in lane.GROUPS.values() for one in tests):
        file, _, function = test.partition("::")
        assert not function or f"def {function}(" in (ROOT / file).read_text(), test


def test_the_page_is_what_the_records_say() -> None:
    pytest.importorskip("tomllib")
    page = (ROOT / "docs" / "compatibility.md").read_text()
    assert page == tool("compatibility").page(RECORDS), "run `make compatibility`"


def test_oldest_and_pinned_were_green_when_their_records_were_made() -> None:
    found = {record["lane"]: record for record in tool("compatibility").records(RECORDS)}
    assert found["oldest"]["green"]
    assert found["pinned"]["green"]


def test_what_lies_between_is_the_last_patch_of_every_minor_release() -> None:
    between = tool("between")
    published = ["5.20.1", "5.17.0", "5.18.0", "5.20.10", "5.20.2", "5.21.0rc1", "5.24.0", "5.17.1", "6.0.0"]
    oldest, newest = between.pinned("constraints-oldest.txt"), between.pinned("constraints.txt")
    assert oldest < newest
    assert between.between(published, between.Version("5.17.0"), between.Version("5.24.0")) == ["5.18.0", "5.20.10"]


def test_every_release_that_a_record_is_of_was_green() -> None:
    found = [record for record in tool("compatibility").records(RECORDS) if record["lane"].startswith("transformers ")]
    assert all(record["lane"] == f"transformers {record['releases']['transformers']}" for record in found)
    assert all(record["green"] for record in found)
    assert {record["releases"]["transformers"].rpartition(".")[0] for record in found} == {
        f"5.{minor}" for minor in range(18, 24)
    }
