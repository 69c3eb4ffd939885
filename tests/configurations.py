"""Bad and odd configurations by a seed: command lines, pruning files, sweep files, run folders."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import runfolder
import yaml

from vtp_plugin import get_strategy, list_strategies

TEXTS = (
    "", " ", "x", "[red]", "[/bold]", "[/]", ":smile:", "bob's", "a\"b", "a,b", "a\nb", "\x1b[31m", "\u202e", "\xfc",
    "\xb2", "..", "/", "~nobody", "none", "atp", "fastv", "atp+fastv", "fastv:k2_r50", "fastv:nope", ":", "+", "all",
    "-1", "0x10", "1e3", "5e-1", "x" * 300, "a\x00b", "1" * 400, "nan", ".inf", "-.inf", "null", "true", "2024-01-01",
    "1:30", "{a", "[1",
)  # fmt: skip
NUMBERS = (
    0, 1, -1, 2, 3, 0.5, 0.25, 1.5, -0.1, 10**6, 10**19, 10**400, 1e+300, float("inf"), float("nan"), True, False,
)  # fmt: skip
RAW = (
    "strategy: !!python/object/apply:os.system [true]", "strategy: atp\nstrategy: l2", "{", "a: [", "- [" * 40,
    "[" * 3000, "a: &a [*a]", "&a {x: *a}", "strategy: atp\nalpha: 1" + "0" * 400, "strategy: atp\nalpha: 5e-1",
    "? [a]\n: b", "strategy: atp\nalpha: !!float x", "strategy: 2024-01-01", "strategy: atp\n1: 2", "\x00",
    "strategy: \x07", "a: &a [1,1]\nb: &b [*a,*a]\nc: &c [*b,*b]\nstrategy: atp", "strategy: atp\nalpha: 010",
    "--- a\n--- b", "%YAML 9", "\t- a", "strategy: atp\nkeep-ratio: 0.5\nkeep_ratio: 0.6", "!!set {a}",
    "strategy: atp\nalpha: !!binary aGk=", "<<: 3", "<<: {a: 1}",
)  # fmt: skip
FIELDS = (
    "model", "model_args", "tasks", "limit", "options", "launch", "jobs", "environment", "gallery", "pruning", "keep",
    "seeds", "cells", "without", "schema", "modle", "[red]",
)  # fmt: skip
SWEEP = {"model": "llava", "model_args": "pretrained=vtp-tiny", "tasks": "vtp_scenes", "pruning": "l2", "keep": 0.5}


class Case:
    """One command line, and the files that it needs, in a folder of its own."""

    def __init__(self, seed: int, folder: Path) -> None:
        self.draw, self.folder = random.Random(seed), folder
        makers = (self._pairs, self._pruning_file, self._sweep_file, self._run_folder, self._command)
        self.arguments: list[str] = self.draw.choice(makers)()

    def value(self, depth: int = 0) -> Any:
        """Any value."""
        kinds: list[Callable[[], Any]] = [
            lambda: self.draw.choice(TEXTS),
            lambda: self.draw.choice(NUMBERS),
            lambda: None,
        ]
        if depth < 3:
            kinds.append(lambda: [self.value(depth + 1) for _ in range(self.draw.randrange(3))])
            kinds.append(
                lambda: {self.draw.choice(TEXTS): self.value(depth + 1) for _ in range(self.draw.randrange(3))}
            )
        return self.draw.choice(kinds)()

    def written(self, name: str, content: Any) -> str:
        """A file: a value as YAML, text or bytes."""
        path = self.folder / name
        if not isinstance(content, (str, bytes)):
            content = yaml.safe_dump(content, allow_unicode=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8", "surrogatepass"))
        return str(path)

    def raw(self) -> str | bytes:
        """Text that is no plain YAML, or no text."""
        return self.draw.choice([*RAW, b"\xff\xfestrategy", b"strategy: \xe9", b"\xef\xbb\xbfstrategy: atp"])

    def _fields(self) -> tuple[str, dict[str, Any]]:
        name = self.draw.choice(list_strategies())
        known = [*get_strategy(name).fields(), "keep_radio", "[red]", "strategy"]
        return name, {self.draw.choice(known): self.value() for _ in range(self.draw.randrange(1, 4))}

    def _pairs(self) -> list[str]:
        name, fields = self._fields()
        spec = self.draw.choice([name, name, f"{name}+atp", self.draw.choice(TEXTS).replace("\0", "")])
        text = ",".join(f"{key}={value}" for key, value in fields.items()).replace("\0", "")
        return ["show", "nowhere.png", "--question", "x", f"--pruning={spec}", f"--pruning-args={text}"]

    def _pruning_file(self) -> list[str]:
        name, fields = self._fields()
        contents = [
            {"strategy": name, **fields},
            {"strategies": [{"strategy": name, **fields}, self.value()]},
            self.value(),
        ]
        path = self.written("p.yaml", self.draw.choice([*contents, self.raw(), self.raw()]))
        return ["show", "nowhere.png", "--question", "x", "--pruning", path]

    def _sweep_file(self) -> list[str]:
        said = {**SWEEP, **{self.draw.choice(FIELDS): self.value() for _ in range(self.draw.randrange(1, 3))}}
        if self.draw.random() < 0.3:
            cell = {
                "pruning": "l2",
                self.draw.choice(("id", "label", "pruning", "pruning_args", "seed", "keep", "x")): self.value(),
            }
            said["cells"] = [cell, self.value()]
        return [
            "compare",
            self.written("s.yaml", self.draw.choice([said, said, said, self.raw()])),
            "-o",
            self._output(),
        ]

    def _output(self) -> str:
        (self.folder / "file").write_text("mine")
        names = ("run", "bob's", "a,b", "a\nb", "file", "file/run", "x" * 300, "[red]", "ü")
        return str(self.folder / self.draw.choice(names))

    def _run_folder(self) -> list[str]:
        made = runfolder.write(self.folder / "run", {"none": ["a", "b"], "l2-0.5": ["a", "a"]}, ["a", "b"])
        path = self.draw.choice([path for path in sorted(made.rglob("*")) if path.is_file()])
        self._harm(path)
        output = ["-o", str(self.folder / self.draw.choice(("page.html", "nowhere/page.html", "run", "x" * 300)))]
        return ["report", str(made), *(output if self.draw.random() < 0.3 else [])]

    def _harm(self, path: Path) -> None:
        """One value somewhere in a file is another one, or the file is something else."""
        if self.draw.random() < 0.25:
            raw = self.raw()
            path.write_bytes(raw if isinstance(raw, bytes) else raw.encode())
        elif path.suffix == ".jsonl":
            lines = [json.loads(line) for line in path.read_text().splitlines()]
            lines[self.draw.randrange(len(lines))] = self._changed(lines[0])
            path.write_text("".join(json.dumps(line) + "\n" for line in lines))
        else:
            read, write = (json.loads, json.dumps) if path.suffix == ".json" else (yaml.safe_load, yaml.safe_dump)
            path.write_text(write(self._changed(read(path.read_text()))))

    def _changed(self, content: Any) -> Any:
        if not isinstance(content, (dict, list)) or not content or self.draw.random() < 0.2:
            return self.value()
        changed = dict(content) if isinstance(content, dict) else list(content)
        key = self.draw.choice(list(content) if isinstance(content, dict) else range(len(content)))
        changed[key] = self._changed(content[key])
        return changed

    def _command(self) -> list[str]:
        """A command with odd values of its options."""
        text = self.draw.choice(TEXTS).replace("\0", "")
        number = str(self.draw.choice(NUMBERS[:13]))[:60]
        tune = ["tune", "--pruning=atp", "--tasks=x", "-o", self._output()]
        missing = str(self.folder / "nowhere")
        return self.draw.choice(
            [
                ["calibrate", "vprune", missing, f"--target={number}", f"--size={number}"],
                ["calibrate", "vprune", str(self.folder), "--target=0.2", f"--patch={number}"],
                ["calibrate", "fitprune", missing, f"--target={number}"],
                ["demo", f"--limit={self.draw.choice((0, -5))}", "-o", self._output()],
                ["demo", f"--keep-ratio={self.draw.choice((0, 2, -1, 'nan', 'inf', text))}", "-o", self._output()],
                [*tune, f"--max-drop={text}"],
                [*tune, "--max-drop=1%", f"--step={self.draw.choice((0, -1, 9, 'nan'))}"],
                ["bench", f"--keep={text}", "--layers=1"],
                ["bench", f"--batch={self.draw.choice((0, -1, text))}", "--layers=1", f"--shape={text}"],
                ["bench", f"--layers={self.draw.choice((-1, 999))}", f"--repeats={self.draw.choice((0, -1))}"],
                ["bench", "--repeats=0", "-o", self._output() + ".json"],
                ["bench", f"--pruning={text}", "--repeats=0", f"--device={text}"],
                ["show", missing, "--question", text, "-o", self._output()],
                ["show", self.written("p.png", self.raw()), "--question", text],
                ["report", missing, f"--samples={number}"],
                ["list", text or "x", "--models"],
                ["study", text or "x", f"--set={text}"],
                ["study", "poster-l2", f"--set={text}={text}", "-o", str(self.folder / "file" / "x")],
                ["check", text or "x"],
                ["leaderboard", missing, "-o", self._output() + ".html"],
                ["leaderboard", self.written("r.json", self.raw()), "-o", str(self.folder / "page.html")],
                ["reproduce", text or "x", "--dry-run"],
                ["reproduce", "llava-1.5-7b", f"--pruning={text}", f"--tokens={text}", "--dry-run"],
                ["reproduce", self.written("t.yaml", self.raw()), "--dry-run"],
                ["plan", f"--pruning={text}", f"--kept={number}", f"--rate={text}"],
                ["plan", f"--model={text}", f"--device={text}"],
                ["plan", f"--model={self.written('config.json', self.raw())}"],
                ["plan", f"--device={self.written('card.yaml', self.raw())}", f"--price={number}"],
                ["plan", f"--pictures={self.draw.choice((0, -1))}", f"--text={self.draw.choice((0, -5))}"],
                ["plan", f"--check={self.written('bench.json', self.raw())}"],
                ["plan", f"--layers={self.draw.choice((-1, 999))}", f"--save-device={self._output()}"],
                [text or "x"],
            ]
        )  # fmt: skip

    def clean(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)
