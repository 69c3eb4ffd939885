"""Everything that a GPU is asked, in one command and less than nine minutes: `make gpu`.

Random weights in real shapes at full depth, the tests marked `gpu`, a minute of training, and vLLM where it is
installed; no network, no lmms-eval. The work is ordered so that a run that is cut off leaves what matters most, every
part has its share of the time, rows are written as they are measured, and the same command goes on where it was.
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import json
import re
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from vtp_plugin import config, files
from vtp_plugin.bench import gpu_page, rounds
from vtp_plugin.bench.journal import Journal, machine, say
from vtp_plugin.errors import PruningError, sentence, unknown
from vtp_plugin.hosts.transformers.architectures import Shape
from vtp_plugin.hosts.transformers.shapes import shape_of
from vtp_plugin.plugins import get_strategy
from vtp_plugin.strategy import PruningStrategy

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "docs" / "results" / "gpu"
TOTAL = 520.0  # seconds; under nine minutes with what a process needs to begin and end
ROW = 6.0  # seconds that the rounds of one row may take
REPEATS, REHEARSED = 5, 1  # rounds; with small shapes
SMALL = ("small", "small-next", "small-qwen", "small-qwen3")
KEEPS, BATCHES = (0.25, 0.11, 0.5), (8, 1)
STRATEGIES: dict[str, dict[str, Any]] = {
    "l2": {},
    "fastv": {},
    "visionzip": {},
    "atp": {"alpha": 0.0},  # its other half reads the question through a text tower, which random weights lack
    "divprune": {},
    "vtp": {},
    "vprune": {},
}
MORE: dict[str, dict[str, Any]] = {"atp": {"alpha": 0.0, "keep_ratio": 0.4}}  # at the paper's 60 %, on the first shape
ENCODED: dict[str, dict[str, Any]] = {"l2": {"keep_ratio": 0.5}}  # towers by themselves, at the poster's budget
ENCODED_BATCHES = (64, 8)


@dataclass(frozen=True)
class Part:
    """Something that is measured: until when, counted in seconds from the beginning, its turn lasts."""

    name: str
    until: float
    work: Callable[[Options, float], None]


@dataclass(frozen=True)
class Options:
    """Where, on what, and how large."""

    folder: Path
    device: torch.device
    dtype: str
    small: bool  # shapes to try the command with
    again: bool = False
    only: tuple[str, ...] = ()  # the names of the parts that are run; none: all

    @property
    def repeats(self) -> int:
        return REHEARSED if self.small else REPEATS

    @property
    def row(self) -> float:
        """Seconds that the rounds of one row may take."""
        return 0.0 if self.small else ROW


# -- shapes -----------------------------------------------------------------------------------------------------------


def bench(name: str, options: Options, until: float) -> None:
    """One shape: every strategy at every budget and batch size, the most telling first."""
    shape = shape_of(name)
    facts = {"shape": name, "layers": 0, "attention": "sdpa", "dtype": options.dtype}
    facts |= {"repeats": options.repeats, "timed": rounds.TIMED}
    journal = _journal(options, name, facts)
    held: list[Any] = []

    def model() -> Any:
        if not held:
            say(f"{name}: building")
            held.append(rounds.built(shape, facts, options.device))
        return held[0]

    wanted = [(strategies(shape, keep, budgeted_only=keep != KEEPS[0]), BATCHES) for keep in KEEPS]
    if not shape.decodes:
        wanted = [(named(ENCODED), ENCODED_BATCHES)]
    elif name in (gpu_page.SHAPES[0], SMALL[0]):
        wanted.insert(1, (named(MORE), BATCHES))
    for chosen, batches in wanted:
        journal.fill(rounds.items(shape, model, chosen, batches, options.repeats, options.row), until, forgiving=True)
    held.clear()
    gc.collect()
    if options.device.type == "cuda":
        torch.cuda.empty_cache()


def _journal(options: Options, name: str, facts: dict[str, Any]) -> Journal:
    """The record of a shape; one of another device, of other releases or of another bench is begun anew."""
    path = options.folder / f"{name}.json"
    try:
        return Journal(path, facts, options.device, options.again)
    except PruningError as other:
        say(f"{name}: begun anew, {sentence(other)}")
        return Journal(path, facts, options.device, again=True)


def named(fields: dict[str, dict[str, Any]]) -> list[PruningStrategy]:
    """Strategies by name with these fields."""
    return [config.build(name, own) for name, own in fields.items()]


def encoders(options: Options, until: float) -> None:
    """Towers by themselves."""
    for name in ("clip-vit-small",) if options.small else gpu_page.ENCODERS:
        bench(name, options, until)


def strategies(shape: Shape, keep: float, budgeted_only: bool) -> list[PruningStrategy]:
    """The strategies of the run at one budget; a layer to cut at is the first that the shape allows behind its own."""
    found = []
    for name, fields in STRATEGIES.items():
        cls = get_strategy(name)
        if cls.budgeted:
            cut = {"layer": max(2, shape.first_cut)} if name == "fastv" else {}
            found.append(config.build(name, {"keep_ratio": keep, **fields, **cut}))
        elif not budgeted_only:
            found.append(config.build(name, fields))
    return found


# -- tests, training, vLLM --------------------------------------------------------------------------------------------


def tests(options: Options, until: float) -> None:
    """The tests marked gpu; with small shapes, a few of those that run anywhere."""
    chosen = ["-k", "tiny and budgets"] if options.small else ["-m", "gpu"]
    if importlib.util.find_spec("xdist") and not options.small:  # what a test prepares on the host takes longest
        chosen += ["-n", "5", "--dist", "loadgroup"]
    command = [sys.executable, "-m", "pytest", "tests/test_gpu.py", *chosen]
    ran = _process(command, until)
    counts = {word: int(n) for n, word in re.findall(r"(\d+) (passed|failed|skipped|errors?)", ran["said"])}
    _write(options, "tests", command, {**ran, **counts})


def training(options: Options, until: float) -> None:
    """A minute of training, less where less is left."""
    seconds = 2.0 if options.small else max(5.0, min(60.0, until - time.monotonic() - 20))
    command = [sys.executable, "-m", "vtp_plugin.bench.training", "--device", options.device.type]
    ran = _process([*command, "--seconds", f"{seconds:.0f}"], until + 20)
    if ran["code"] == 0:
        ran |= json.loads(ran.pop("said").strip().splitlines()[-1])
    _write(options, "training", command, ran)


def vllm(options: Options, until: float) -> None:
    """Requests per second of a server, where vLLM is installed."""
    if importlib.util.find_spec("vllm") is None:
        say("vllm: not installed")
        return
    target = options.folder / "vllm.json"
    command = [sys.executable, "-c", "from vtp_plugin.cli import main; main()", "serve-bench", "--model", "vtp-tiny"]
    ran = _process([*command, "-o", str(target)], until)
    say(f"vllm: exit code {ran['code']}")


def _process(command: Sequence[str], until: float) -> dict[str, Any]:
    """A command in a process of its own, ended when its time is over: exit code, seconds, the end of what it said."""
    began = time.monotonic()
    try:
        ran = subprocess.run(
            command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=max(1.0, until - began)
        )
        code, said = ran.returncode, ran.stdout if ran.returncode == 0 else ran.stdout + ran.stderr
    except subprocess.TimeoutExpired as late:
        code, said = None, (late.stdout or b"").decode(errors="replace") + "\nended: its time was over"
    return {"code": code, "seconds": time.monotonic() - began, "said": said[-2000:]}


def _write(options: Options, name: str, command: Sequence[str], found: dict[str, Any]) -> None:
    shown = ["python", *command[1:]]
    content = {"command": " ".join(shown), **machine(options.device), **found}
    files.write_json(options.folder / f"{name}.json", content)
    say(f"{name}: " + ("done" if found["code"] == 0 else f"exit code {found['code']}, see {name}.json"))


# -- all of it --------------------------------------------------------------------------------------------------------


def parts(small: bool) -> list[Part]:
    """In the order of what matters most; the shares add up to the whole."""
    names = SMALL if small else gpu_page.SHAPES
    ends = dict(zip(names, (0.27, 0.68, 0.82, 0.94), strict=True))
    benches = [
        Part(name, end, lambda options, until, name=name: bench(name, options, until)) for name, end in ends.items()
    ]
    return [
        benches[0],
        Part("encoders", 0.31, encoders),
        Part("tests", 0.45, tests),
        *benches[1:],
        Part("training", 0.98, training),
        Part("vllm", 1.00, vllm),
    ]


def run(options: Options, seconds: float) -> None:
    """Every part in its turn; one that fails does not stop the others."""
    options.folder.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    for part in parts(options.small):
        if options.only and part.name not in options.only:
            continue
        if _whole(options, part.name):
            say(f"{part.name}: measured already")
            continue
        say(f"{part.name}: {time.monotonic() - began:.0f} s of {seconds:.0f} s")
        try:
            part.work(options, began + part.until * seconds)
        except Exception as error:
            say(f"{part.name}: {sentence(error)}")
        files.write(options.folder / "README.md", gpu_page.page(options.folder))
    say(f"done after {time.monotonic() - began:.0f} s: {options.folder}")


def _whole(options: Options, name: str) -> bool:
    """Whether a part that has no rows of its own was done."""
    path = options.folder / f"{name}.json"
    if options.again or not path.exists() or name not in ("tests", "training", "vllm"):
        return False
    found, here = files.read_json(path), machine(options.device)
    return found.get("code", 0) == 0 and all(
        found.get(fact, here[fact]) == here[fact] for fact in ("device", "versions")
    )


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m vtp_plugin.bench.gpu", description=__doc__.splitlines()[0])
    parser.add_argument("-o", "--output", type=Path, default=FOLDER, help="folder for the records")
    parser.add_argument("--seconds", type=float, default=TOTAL, help="for all of it")
    parser.add_argument("--small", action="store_true", help="small shapes, to try the command on any machine")
    parser.add_argument("--only", nargs="+", default=[], metavar="PART", help="shapes, encoders, tests, training, vllm")
    parser.add_argument("--again", action="store_true", help="measure anew what the folder has already")
    chosen = parser.parse_args(arguments)
    cuda = torch.cuda.is_available()
    try:
        if not cuda and not chosen.small:
            raise PruningError("there is no CUDA device here; --small tries the command with small shapes on the CPU")
        names = [part.name for part in parts(chosen.small)]
        if strange := [name for name in chosen.only if name not in names]:
            raise unknown("part", strange[0], names)
        device = torch.device("cuda" if cuda else "cpu")
        run(
            Options(
                chosen.output, device, "bfloat16" if cuda else "float32", chosen.small, chosen.again, tuple(chosen.only)
            ),
            chosen.seconds,
        )
    except PruningError as error:
        say(f"error: {sentence(error)}")
        raise SystemExit(2) from None


if __name__ == "__main__":
    main()
