"""One training loop for every stage: warm-up and cosine, clipped gradients, checkpoints, a progress bar, a log."""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable, Container, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor, nn

Metrics = dict[str, float]
Step = Callable[[int], tuple[Tensor, Metrics]]
CHECKPOINT_SECONDS, LOG_STEPS = 60, 50


@dataclass
class Run:
    """Where a training run keeps its checkpoints, its log and its numbers."""

    path: Path
    device: str = "cpu"
    console: Console = field(default_factory=Console)

    def __post_init__(self) -> None:
        self.path.mkdir(parents=True, exist_ok=True)

    def say(self, line: str) -> None:
        """One line on the screen and in log.txt."""
        self.console.print(line, highlight=False, markup=False, soft_wrap=True)
        with open(self.path / "log.txt", "a") as log:
            log.write(line + "\n")

    def record(self, name: str, value: object) -> None:
        """One entry of log.json."""
        file = self.path / "log.json"
        numbers = json.loads(file.read_text()) if file.exists() else {}
        file.write_text(json.dumps(numbers | {name: value}, indent=1) + "\n")

    def save(self, name: str, state: dict[str, object]) -> None:
        temporary = self.path / f"{name}.tmp"
        torch.save(state, temporary)
        temporary.rename(self.path / f"{name}.pt")

    def load(self, name: str) -> dict | None:
        file = self.path / f"{name}.pt"
        return torch.load(file, map_location=self.device, weights_only=True) if file.exists() else None


@dataclass(frozen=True)
class Plan:
    """How long and how fast a stage learns."""

    steps: int
    rate: float
    batch: int
    warmup: int = 100
    decay: float = 0.05

    def rate_at(self, step: int) -> float:
        if step < self.warmup:
            return self.rate * (step + 1) / self.warmup
        turn = (step - self.warmup) / max(1, self.steps - self.warmup)
        return self.rate * (0.02 + 0.98 * (1 + math.cos(math.pi * min(1.0, turn))) / 2)


def fit(run: Run, stage: str, modules: nn.ModuleDict, plan: Plan, step_of: Step) -> None:
    """Train until the plan's last step; a killed run goes on from its checkpoint."""
    optimizer = torch.optim.AdamW(parameter_groups(modules, plan.decay), plan.rate, betas=(0.9, 0.98))
    start, spent = restore(run, stage, modules, optimizer)
    began, seconds, recent = time.monotonic(), spent, []
    saved = began
    with progress(run.console) as bar:
        task = bar.add_task(stage, total=plan.steps, completed=start)
        for step in range(start, plan.steps):
            recent.append(update(modules, optimizer, plan.rate_at(step), partial(step_of, step)))
            bar.update(task, advance=1, description=f"{stage} loss {recent[-1]['loss']:.3f}")
            seconds = spent + time.monotonic() - began
            if (step + 1) % LOG_STEPS == 0 or step + 1 == plan.steps:
                run.say(f"{stage:<8}{step + 1:>5}/{plan.steps}{seconds:7.0f} s  {summary(recent)}")
                recent.clear()
            if time.monotonic() - saved > CHECKPOINT_SECONDS:
                saved = checkpoint(run, stage, modules, optimizer, step + 1, seconds)
    checkpoint(run, stage, modules, optimizer, plan.steps, seconds)
    run.record(stage, {**asdict(plan), "seconds": round(seconds)})


def summary(recent: list[Metrics]) -> str:
    """Means over the last steps; not every step tells everything."""
    names = dict.fromkeys(name for row in recent for name in row)
    told = {name: [row[name] for row in recent if name in row] for name in names}
    return "  ".join(f"{name} {sum(values) / len(values):.3f}" for name, values in told.items())


def parameter_groups(modules: nn.ModuleDict, decay: float) -> list[dict]:
    """Matrices decay, vectors do not; frozen parameters stay out."""
    learned = [parameter for parameter in modules.parameters() if parameter.requires_grad]
    return [
        {"params": [p for p in learned if p.ndim > 1], "weight_decay": decay},
        {"params": [p for p in learned if p.ndim <= 1], "weight_decay": 0.0},
    ]


def update(modules: nn.ModuleDict, optimizer, rate: float, loss_of: Callable[[], tuple[Tensor, Metrics]]) -> Metrics:
    """One optimizer step."""
    for group in optimizer.param_groups:
        group["lr"] = rate
    loss, metrics = loss_of()
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    nn.utils.clip_grad_norm_(modules.parameters(), 1.0)
    optimizer.step()
    return {"loss": loss.item(), **metrics}


def restore(run: Run, stage: str, modules: nn.ModuleDict, optimizer) -> tuple[int, float]:
    """The step to go on from and the seconds spent so far."""
    state = run.load(stage)
    if state is None:
        return 0, 0.0
    modules.load_state_dict(state["modules"])
    optimizer.load_state_dict(state["optimizer"])
    return state["step"], state["seconds"]


def checkpoint(run: Run, stage: str, modules: nn.ModuleDict, optimizer, step: int, seconds: float) -> float:
    state = {"modules": modules.state_dict(), "optimizer": optimizer.state_dict(), "step": step, "seconds": seconds}
    run.save(stage, state)
    return time.monotonic()


def progress(console: Console) -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    return Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=console)


def options(module: str, said: str, stages: Iterable[str]) -> argparse.ArgumentParser:
    """The command line of a recipe: `said` is its module's docstring."""
    parser = argparse.ArgumentParser(prog=f"python -m vtp_plugin.tiny.{module}", description=said.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for checkpoints, log.txt and log.json")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--stage", choices=stages, action="append", help="only these stages (default: all, in order)")
    parser.add_argument("--steps", type=int, help="steps of each trained stage, instead of the recipe's")
    return parser


def go_through(
    run: Run, chosen: argparse.Namespace, stages: Mapping[str, Callable[..., None]], trained: Container[str]
) -> None:
    """The chosen stages, or all in their order; those that train are told how many steps."""
    for name in chosen.stage or stages:
        stages[name](run, **({"steps": chosen.steps} if name in trained else {}))
