"""transformers' own unit tests of a family's models, plain and with a strategy attached that keeps every token.

    python tests/upstream.py FOLDER [--families llava qwen2_vl] [--cases l2 stride fastv] [-k EXPRESSION] [-o FILE]

FOLDER is a checkout of transformers at the installed release (its `tests` and `utils`). Every model with a language
model that a test makes is attached to. What differs is printed: refusals of ours by sentence, the rest test by test;
the exit code is 1 if there is a rest. `-o` writes all outcomes as JSON. The file is pytest's plugin, too.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from functools import wraps
from pathlib import Path
from typing import Any

FAMILIES = ("llava", "llava_next", "llava_onevision", "qwen2_vl", "qwen2_5_vl", "internvl", "gemma3", "mistral3")
CASES = {"l2": {}, "stride": {}, "fastv": {"layer": 1}}  # in the tower, in front of the prompt, in the language model
CASE, REPORT = "VTP_UPSTREAM_CASE", "VTP_UPSTREAM_REPORT"
OURS = "vtp_plugin.errors."
SHOWN = 300  # letters of a failure


# -- pytest's plugin --------------------------------------------------------------------------------------------------

attached: Counter[str] = Counter()  # what became of the models of one test


def attach(model: Any, case: str) -> None:
    """Attach the case to a model of a test, unless its weights are still to come or it is attached to already."""
    from vtp_plugin import prune
    from vtp_plugin.errors import PruningError
    from vtp_plugin.pruning import MARK

    if vars(model).get(MARK) is not None or any(weight.is_meta for weight in model.parameters()):
        return
    try:
        prune(model, case, keep_ratio=1.0, **CASES[case])
        attached["attached"] += 1
    except PruningError as error:
        attached[str(error)] += 1


def attaching(made: Callable, case: str) -> Callable:
    """A constructor, or a class method that makes a model, followed by `attach`."""

    @wraps(made)
    def wrapper(first: Any, *args: Any, **kwargs: Any) -> Any:
        answer = made(first, *args, **kwargs)
        model = first if answer is None else answer[0] if isinstance(answer, tuple) else answer
        if type(model).__name__.endswith("ForConditionalGeneration"):
            attach(model, case)
        return answer

    return wrapper


def pytest_collection_finish(session: Any) -> None:
    """Once the tests are there, their model classes attach to what they make."""
    case = os.environ[CASE]
    if not case:
        return
    from transformers import PreTrainedModel

    for cls in models_of(session):
        cls.__init__ = attaching(cls.__init__, case)
    for name in ("from_pretrained", "_from_config"):
        made = vars(PreTrainedModel)[name].__func__
        setattr(PreTrainedModel, name, classmethod(attaching(made, case)))


def models_of(session: Any) -> set[type]:
    """The classes with a language model that the collected tests are about."""
    tested = {cls for item in session.items for cls in getattr(item.cls, "all_model_classes", None) or ()}
    return {cls for cls in tested if cls.__name__.endswith("ForConditionalGeneration")}


def pytest_runtest_logreport(report: Any) -> None:
    """One line of JSON per phase of a test or subtest that says something."""
    if report.when != "call" and report.outcome == "passed":
        return
    part = getattr(getattr(report, "context", None), "kwargs", None) or getattr(
        getattr(report, "context", None), "msg", None
    )
    outcome = "xfailed" if hasattr(report, "wasxfail") and report.outcome == "skipped" else report.outcome
    entry = {"test": report.nodeid, "part": str(part or ""), "outcome": outcome, "models": dict(attached)}
    if report.outcome == "failed":
        crash = getattr(report.longrepr, "reprcrash", None)
        entry["said"] = crash.message if crash else str(report.longrepr)[-SHOWN:]
        entry["ours"] = OURS in str(report.longrepr)
    if not part:
        attached.clear()
    with Path(os.environ[REPORT]).open("a") as file:
        file.write(json.dumps(entry) + "\n")


# -- the program ------------------------------------------------------------------------------------------------------


def outcomes(folder: Path, family: str, case: str, more: list[str]) -> list[dict[str, Any]]:
    """What every test of a family said; `case` is "" for the host alone."""
    with tempfile.TemporaryDirectory() as aside:
        report = Path(aside) / "report"
        report.touch()
        environment = {**os.environ, CASE: case, REPORT: str(report), "HF_HUB_OFFLINE": "1"}
        environment["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
        command = [sys.executable, "-m", "pytest", "-q", "-p", "upstream", "-p", "no:cacheprovider", "-W", "ignore"]
        tests = f"tests/models/{family}/test_modeling_{family}.py"
        subprocess.run([*command, "--tb=short", tests, *more], cwd=folder, env=environment, check=False)
        return [json.loads(line) for line in report.read_text().splitlines()]


def key(entry: dict[str, Any]) -> str:
    return " ".join(filter(None, [entry["test"].rpartition("/")[2], entry["part"]]))


def differences(plain: list[dict[str, Any]], pruned: list[dict[str, Any]]) -> Iterator[tuple[str, str, str]]:
    """Tests whose outcome differs: name, our refusal or "", what was said."""
    before, after = ({key(entry): entry for entry in entries} for entries in (plain, pruned))
    for name in sorted(before.keys() | after.keys()):
        one, other = before.get(name, {}), after.get(name, {})
        if one.get("outcome") != other.get("outcome") and "failed" in (one.get("outcome"), other.get("outcome")):
            said = other.get("said") or f"{one.get('outcome')}, now {other.get('outcome')}"
            yield name, said if other.get("ours") else "", said


def compared(folder: Path, family: str, case: str, plain: list[dict[str, Any]], more: list[str]) -> dict[str, Any]:
    """One family and case: how much was compared, and what differs."""
    pruned = outcomes(folder, family, case, more)
    found = list(differences(plain, pruned))
    return {
        "family": family,
        "case": case,
        "tests": len({entry["test"] for entry in pruned if entry["outcome"] != "skipped"}),
        "attached": sum(entry["models"].get("attached", 0) for entry in pruned if not entry["part"]),
        "not attached": sorted({m for entry in pruned for m in entry["models"] if m != "attached"}),
        "refused": {name: said[:SHOWN] for name, ours, said in found if ours},
        "different": {name: said[:SHOWN] for name, ours, said in found if not ours},
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--families", nargs="+", default=FAMILIES)
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=list(CASES))
    parser.add_argument("-o", "--output", type=Path)
    said, more = parser.parse_known_args()
    results = []
    for family in said.families:
        plain = outcomes(said.folder, family, "", more)
        for case in said.cases:
            result = compared(said.folder, family, case, plain, more)
            results.append(result)
            if said.output:
                said.output.write_text(json.dumps(results, indent=1) + "\n")
            print(json.dumps(result, indent=1), flush=True)
    different = sum(len(result["different"]) for result in results)
    refused = Counter(sentence for result in results for sentence in result["refused"].values())
    total = sum(result["tests"] for result in results)
    print(f"{total} tests compared, {sum(refused.values())} refused, {different} different")
    for sentence, count in refused.most_common():
        print(f"  {count} x {sentence}")
    return 1 if different else 0


if __name__ == "__main__":
    sys.exit(main())
