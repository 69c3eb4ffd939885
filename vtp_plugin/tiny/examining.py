"""How many questions a trained model answers, whole or with a random part of its visual tokens."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from . import testset
from .fitting import Metrics
from .language import examine, write_lesson
from .missing import PATTERNS, Sight, renumber
from .modeling import normalize
from .prompts import Layout
from .questions import TASKS
from .scenes import Scene
from .vision import look


def score(
    nets: nn.ModuleDict,
    layout: Layout,
    images: np.ndarray,
    scenes: list[tuple[int, Scene]],
    keep: float = 1.0,
    device: str = "cpu",
) -> Metrics:
    """Accuracy per task and over all; with a random share of the tokens, at their original positions."""
    asked = [list(testset.ask(index, seed, scene).values()) for index, (seed, scene) in enumerate(scenes)]
    lessons = [write_lesson(layout, asked[start : start + 25]).to(device) for start in range(0, len(asked), 25)]
    rng = np.random.default_rng(0)

    def see(part: slice) -> Sight:
        pixels = normalize(torch.from_numpy(np.array(images[part])).to(device))
        tokens = nets["projector"](look(nets["clip"], pixels).patches)
        noise = PATTERNS["random"](tokens, tokens, tokens, rng)
        index = noise.topk(round(keep * tokens.shape[1]), 1).indices.sort(1).values
        left = tokens.gather(1, index[..., None].expand(-1, -1, tokens.shape[-1]))
        return renumber(left, index, tokens.shape[1], original=True)

    accuracy = examine(nets["llama"], see, lessons)
    return accuracy | {"all": sum(accuracy.values()) / len(accuracy)}


def table(scores: dict[str, Metrics]) -> str:
    """Rows of percentages, for log.txt."""
    columns = [*TASKS, "all"]
    lines = [f"{'accuracy, %':<20}" + "".join(f"{name:>11}" for name in columns)]
    for name, row in scores.items():
        values = (f"{100 * row[task]:11.1f}" if task in row else f"{'':>11}" for task in columns)
        lines.append(f"{name:<20}" + "".join(values))
    return "\n".join(lines)
