"""Odd configurations by the hundred: an exit code and one sentence, no traceback, nothing half-written.

`python tests/test_fuzz.py 0 4000` tries other seeds and says what it found.
"""

from __future__ import annotations

import contextlib
import io
import os
import sys
import tempfile
import time
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from configurations import Case
from matrix import FULL

from vtp_plugin import cli
from vtp_plugin.compare import sweep

SEEDS = 120 if FULL else 60
SLOW = 5  # seconds, said by the program below


def begins(*_: Any, **__: Any) -> None:
    raise KeyboardInterrupt


def tried(seed: int, folder: Path) -> tuple[list[str], int, str, set[Path]]:
    """The command line, its exit code, what it said on stderr, and the files that it left."""
    folder.mkdir()
    case = Case(seed, folder)
    before, said = set(folder.rglob("*")), io.StringIO()
    os.chdir(folder)
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
        code = cli.run(case.arguments)
    return case.arguments, code, said.getvalue(), set(folder.rglob("*")) - before


def problem(seed: int, folder: Path) -> str:
    """What is wrong with the answer to a configuration; "" if nothing is."""
    arguments, code, said, left = tried(seed, folder)
    drafts = [path.name for path in left if path.name.endswith(".part") or path.name.startswith(".vtp-")]
    wrong = {
        "a traceback": "Traceback" in said or "may be a fault of vtp-plugin" in said,
        "no sentence": code != 0 and not said.strip(),
        "more than a sentence": "vtp: error:" in said and said.strip().count("\n") > 0,
        "a letter that a terminal obeys": "\x1b" in said,
        f"left behind: {drafts}": bool(drafts),
        "files in spite of a refusal": code == 2 and any(path.is_file() and path.name != ".lock" for path in left),
    }
    found = [name for name, is_so in wrong.items() if is_so]
    return f"seed {seed}: {found} in {arguments} -> {code}: {said[-400:]!r}" if found else ""


@pytest.mark.parametrize("first", range(0, SEEDS, 20))
def test_an_odd_configuration_gets_one_sentence(first: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stop(monkeypatch)
    found = [problem(seed, tmp_path / str(seed)) for seed in range(first, first + 20)]
    assert not list(filter(None, found))


def stop(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stop where the work begins: what is decided before it is tried here."""
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.chdir(Path.cwd())  # taken back at the end
    monkeypatch.setattr(sweep._Sweep, "work", begins)
    monkeypatch.setattr(sweep, "check_host", lambda *_: None)
    monkeypatch.setattr(import_module("vtp_plugin.cli.bench"), "_timings", begins)
    monkeypatch.setattr(import_module("vtp_plugin.cli.check"), "conforms", begins)


def main(first: int, last: int) -> None:
    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory() as folder:
        stop(patch)
        codes: dict[str, int] = {}
        for seed in range(first, last):
            began = time.monotonic()
            found = problem(seed, Path(folder) / str(seed))
            if (spent := time.monotonic() - began) > SLOW:
                print(f"seed {seed}: {spent:.0f} s", flush=True)
            codes["wrong" if found else "right"] = codes.get("wrong" if found else "right", 0) + 1
            if found:
                print(found, flush=True)
        print(f"{last - first} configurations: {codes}")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:3]))
