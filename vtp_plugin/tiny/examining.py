"""How many questions a model with the embedded one's networks answers, whole or with some of its visual tokens."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from vtp_plugin.tokens import at

from . import testset
from .fitting import Metrics
from .language import examine, write_lesson
from .missing import PATTERNS, Sight, renumber
from .modeling import build, normalize
from .prompts import Layout, layouts, load_llama_tokenizer
from .questions import TASKS
from .scenes import Scene
from .store import WEIGHTS, load_weights
from .tokenizers import load_clip_tokenizer
from .vision import look


def shipped() -> tuple[nn.ModuleDict, Layout]:
    """The package's own networks, fp32, and the prompts of the authors' layout."""
    tokenizer, weights = load_llama_tokenizer(WEIGHTS), load_weights("clip", "projector", "llama", prefixed=True)
    networks = nn.ModuleDict(build(len(load_clip_tokenizer(WEIGHTS / "clip")), len(tokenizer)))
    networks.load_state_dict(weights)
    return networks.float().eval().requires_grad_(False), layouts(tokenizer)["llava"]


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

    def see(part: slice) -> Sight:
        view = look(nets["clip"], normalize(torch.from_numpy(np.array(images[part])).to(device)))
        tokens = nets["projector"](view.patches)
        index = at_random(keep, tokens)
        left = at(tokens, index)
        return renumber(left, index, tokens.shape[1], original=True)

    right = examine(nets["llama"], see, lessons)
    accuracy = {task: sum(values) / len(values) for task, values in right.items()}
    return accuracy | {"all": sum(accuracy.values()) / len(accuracy)}


def at_random(keep: float, tokens: Tensor) -> Tensor:
    """A share of the tokens, of every batch the same."""
    noise = PATTERNS["random"](tokens, tokens, tokens, np.random.default_rng(0))
    return noise.topk(round(keep * tokens.shape[1]), 1).indices.sort(1).values


def table(scores: dict[str, Metrics]) -> str:
    """Rows of percentages, for log.txt."""
    columns = [*TASKS, "all"]
    lines = [f"{'accuracy, %':<20}" + "".join(f"{name:>11}" for name in columns)]
    for name, row in scores.items():
        values = (f"{100 * row[task]:11.1f}" if task in row else f"{'':>11}" for task in columns)
        lines.append(f"{name:<20}" + "".join(values))
    return "\n".join(lines)
