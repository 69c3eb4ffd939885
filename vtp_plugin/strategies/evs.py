"""EVS: of a video, what is not where it was one frame earlier.

Source: arXiv 2510.14624; in vLLM, SGLang and transformers' Nemotron Omni. With x(t, i) the projected token at place i
of frame t:
1. d(t, i) = 1 - cos(x(t, i), x(t-1, i)), larger than any in the first frame;
2. the K = max(P, int(r N)) tokens of the video with the largest d survive, P the places of a frame, so that the first
   frame always does. r -> `keep_ratio`.
Positions are the original ones. The budget is that of the whole video; a frame without news keeps nothing.

A still picture is a video of one frame, which EVS leaves whole: a run that shows nothing else cuts nothing, and fails.

Ours: where a token's predecessor was dropped before, in the tower, it counts as new, like those of the first frame. On
towers that merge two frames into one token (Qwen-VL) a frame is such a pair.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import normalize

from vtp_plugin.film import Film, VideoStrategy
from vtp_plugin.stages import Stage
from vtp_plugin.tokens import VisualTokens

NEW = 3.0  # more than any 1 - cos


@dataclass(kw_only=True)
class EVS(VideoStrategy):
    """Keep what differs from the same place one frame earlier, and the first frame."""

    name = "evs"
    stage = Stage.PROJECTOR
    paper = "Efficient Video Sampling, https://arxiv.org/abs/2510.14624"
    nominal = True  # never less than a frame
    default_keep_ratio = 0.3

    def wanted(self, visual: VisualTokens) -> int:
        n, (_, rows, columns) = visual.tokens.shape[1], visual.film
        return min(n, max(rows * columns, self.count(n)))

    def score(self, visual: VisualTokens) -> Tensor:
        return torch.stack([_changes(x, film) for x, film in self.images(visual)])


def _changes(x: Tensor, film: Film) -> Tensor:
    """d of every token, [N]."""
    table, there = film.laid(normalize(x, dim=-1)), film.there
    before = torch.nn.functional.pad(there[:-1], (0, 0, 1, 0))
    alike = torch.nn.functional.pad((table[1:] * table[:-1]).sum(-1), (0, 0, 1, 0))
    return film.read(torch.where(before, 1 - alike, NEW))
