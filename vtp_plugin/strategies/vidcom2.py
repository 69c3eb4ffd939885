"""VidCom2: frames that are unlike the rest of a video get more tokens, and keep those that are unlike the others.

Source: arXiv 2505.14454 (EMNLP 2025) and the authors' code, over projected tokens:
1. the half of the channels with the lowest variance over the video, tokens scaled to unit length;
2. similarity of a token to the video's mean and to its frame's mean, each as the sum of exp(-d^2 / (2 b)) over the
   bandwidths b = 2^-3 ... 2^1, d the distance;
3. a frame's share of its tokens is r (1 + p - mean p), p the softmax over the frames of - (mean similarity of its
   tokens to the video's mean) / `temperature` (0.01). r -> `keep_ratio`;
4. in each frame the tokens survive whose two similarities add up to the least.
Positions are the original ones.

Ours: exactly K tokens, K = int(r N): shares are rounded down, no frame gets more than it has, and what is left over
goes one by one to the largest remainders (the code rounds every frame by itself). A frame may be left with nothing. A
still picture is a video of one frame: its tokens that are the least like its mean survive.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import normalize

from vtp_plugin.film import Film, VideoStrategy
from vtp_plugin.selectors import apportioned
from vtp_plugin.stages import Stage
from vtp_plugin.tokens import Selection, VisualTokens, true_columns

BANDWIDTHS = tuple(2.0**power for power in range(-3, 2))


@dataclass(kw_only=True)
class VidCom2(VideoStrategy):
    """Divide the budget among frames by how distinct they are, and keep their most distinct tokens."""

    name = "vidcom2"
    stage = Stage.PROJECTOR
    paper = "VidCom2: Video Compression Commander, https://arxiv.org/abs/2505.14454"
    default_keep_ratio = 0.25

    channels: float = 0.5  # share of the channels, those of the lowest variance
    temperature: float = 0.01  # of the softmax over frames

    def validate(self) -> None:
        super().validate()
        self.check_number("channels", 0, 1)
        self.check("channels", self.channels > 0, "must be more than 0")
        self.check_number("temperature", 1e-6)

    def select(self, visual: VisualTokens) -> Selection:
        k = self.wanted(visual)
        judged = [self._judged(x, film, k) for x, film in self.images(visual)]
        columns, scores = (torch.stack(part) for part in zip(*judged, strict=True))
        return Selection.of(columns, scores.shape[1], scores=scores)

    def _judged(self, x: Tensor, film: Film, k: int) -> tuple[Tensor, Tensor]:
        """Of one video [N, D]: the columns of the k that survive, and how distinct every token is, [N]."""
        calm = x.var(0, correction=0).sort(stable=True).indices[: max(1, int(self.channels * x.shape[1]))]
        unit, there = normalize(x[:, calm], dim=-1), film.there
        count = there.sum(1)  # [F]
        frame_mean = film.laid(unit).sum(1) / count.clamp(min=1)[:, None]
        to_video = _similarity(unit - unit.mean(0))
        to_frame = _similarity(unit - frame_mean[film.slot // film.places])
        distinct = -film.laid(to_video).sum(1) / count.clamp(min=1)
        exact = k * self._shares(distinct, count)
        quotas = apportioned(exact[None], count[None], k)[0]
        table = film.laid(to_video + to_frame, empty=float("inf"))
        place = table.sort(dim=1, stable=True).indices.argsort(dim=1)  # of every token among those of its frame
        return true_columns(film.read(place < quotas[:, None]), k), -(to_video + to_frame)

    def _shares(self, distinct: Tensor, count: Tensor) -> Tensor:
        """What every frame gets of the whole, [F] fp64, of frames with `count` tokens [F]."""
        some = count > 0
        p = (distinct.double() / self.temperature).masked_fill(~some, float("-inf")).softmax(0)
        share = (1 + p - p.sum() / some.sum()) * count
        return share / share.sum()


def _similarity(difference: Tensor) -> Tensor:
    """The sum of Gaussians of differences [N, C], [N]."""
    squared = difference.square().sum(-1)
    return torch.stack([(squared / (-2 * bandwidth)).exp() for bandwidth in BANDWIDTHS]).sum(0)
