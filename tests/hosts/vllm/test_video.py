"""`evs` and `vidcom2` of this package under transformers against vLLM's own: the same video on the same checkpoint.

vLLM's mask functions are watched while its engine prunes a video by itself (`--video-pruning-rate`). On a Qwen3-VL they
are given the rows of its deepstack beside those that enter the prompt, which ours never see: so what is held against
ours there is what they answer about the latter, and ours are asked about both.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

import numpy as np
import pytest
import torch
from engines import engine, reference, scenes
from served import PICTURE, folder_of
from torch import Tensor

from vtp_plugin import get_strategy, prune
from vtp_plugin.tokens import VisualTokens

RATE = 0.75  # of tokens that vLLM drops: 1 - keep_ratio
FRAMES = 8
WIDTH = 64  # of a row that enters the prompt
NAMES = {"evs": "compute_retention_mask", "vidcom2": "vidcom2_compute_retention_mask"}
MODELS = {"qwen2_5_vl": "Qwen2_5_VLForConditionalGeneration", "qwen3_vl": "Qwen3VLForConditionalGeneration"}
FACTS = {"fps": 2.0, "duration": FRAMES / 2, "total_num_frames": FRAMES, "frames_indices": list(range(FRAMES))}
PROMPT = "<|im_start|>" + PICTURE.replace("image", "video") + "What moves?\nAnswer:"


def video() -> np.ndarray:
    """A picture on which another one moves, [F, H, W, 3] uint8."""
    (ground, _), (thing, _) = scenes(2)
    film = []
    for number in range(FRAMES):
        frame = ground.resize((64, 48))
        frame.paste(thing.resize((16, 16)), (6 * number, 4 * number))
        film.append(np.asarray(frame))
    return np.stack(film)


def theirs(family: str, method: str, patch: pytest.MonkeyPatch) -> tuple[Tensor, tuple[int, ...], Tensor]:
    """What vLLM's own method was given, [N, D] and frames, rows, columns of patches, and its answer, mask [N]."""
    from vllm import SamplingParams
    from vllm.v1.worker.cpu_model_runner import CPUModelRunner

    home, seen = import_module(f"vllm.model_executor.models.{family}"), []
    original, load = getattr(home, NAMES[method]), CPUModelRunner.load_model

    def watched(rows: Tensor, size: Any, **arguments: Any) -> Tensor:
        seen.append((rows.clone(), tuple(map(int, size)), original(rows, size, **arguments)))
        return seen[-1][-1]

    def loaded(self: Any, *args: Any, **kwargs: Any) -> None:
        load(self, *args, **kwargs)
        self.is_multimodal_pruning_enabled = True  # which the runner for GPUs asks, and this one forgets

    def stripped(self: Any, multimodal_embeddings: Any, mrope_positions: Tensor, **kwargs: Any) -> Any:
        """Positions play no part here."""
        wide = WIDTH * (1 + len(getattr(self.config.vision_config, "deepstack_visual_indexes", ())))
        return [part[:, :wide] for part in multimodal_embeddings], mrope_positions, 0

    patch.setattr(home, NAMES[method], watched)
    patch.setattr(getattr(home, MODELS[family]), "recompute_mrope_positions", stripped)
    patch.setattr(CPUModelRunner, "load_model", loaded)
    own = {"video_pruning_rate": RATE, "video_pruning_method": method, "limit_mm_per_prompt": {"video": 1}}
    with engine(None, folder_of(family), **own) as llm:
        seen.clear()
        film = (video(), FACTS | {"video_backend": "opencv", "do_sample_frames": False})
        given = {"prompt": PROMPT, "multi_modal_data": {"video": [film]}}
        llm.generate(given, SamplingParams(temperature=0, max_tokens=2), use_tqdm=False)
    return seen[-1]


def ours(family: str, method: str) -> Tensor:
    """What the transformers path keeps, [K]."""
    model, processor = reference(folder_of(family))
    inputs = processor(videos=[video()], text=PROMPT, return_tensors="pt", do_sample_frames=False)
    with prune(model, method, processor=processor, keep_ratio=1 - RATE) as pruned:
        model.generate(**inputs, max_new_tokens=2, do_sample=False)
        return pruned.events[-1].kept[0].sort().values


def asked(method: str, rows: Tensor, size: tuple[int, ...]) -> Tensor:
    """What our method keeps of rows [N, D], as a mask."""
    frames, down, across = size[0], size[1] // 2, size[2] // 2
    index = torch.arange(len(rows))
    cell = torch.stack([index // across % down, index % across], dim=-1)[None]
    film = {"film": (frames, down, across), "frame": (index // (down * across))[None], "cell": cell}
    seen = VisualTokens(tokens=rows[None], grid=(frames * down, across), index=index[None], signals=film)
    kept = get_strategy(method)(keep_ratio=1 - RATE).decide(seen).sources[0]
    return torch.zeros(len(rows), dtype=torch.bool).index_fill_(0, kept, True)


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl"])
def test_evs_keeps_what_that_of_vllm_keeps(family: str, monkeypatch: pytest.MonkeyPatch):
    from vllm.multimodal.video_prune import evs

    rows, size, mask = theirs(family, "evs", monkeypatch)
    assert torch.equal(asked("evs", rows, size), mask)
    about_prompt = evs.compute_retention_mask(rows[:, :WIDTH], size, 2, RATE)
    assert torch.equal(ours(family, "evs"), about_prompt.nonzero().flatten())
    assert int(mask.sum()) == len(mask) // 4


def test_vidcom2_differs_from_that_of_vllm_in_the_rounding_of_frames_only(monkeypatch: pytest.MonkeyPatch):
    """vLLM rounds every frame, to one at least, and then takes or gives by score; ours has the largest remainders."""
    from vllm.multimodal.video_prune import vidcom2

    rows, size, mask = theirs("qwen3_vl", "vidcom2", monkeypatch)
    about_prompt = vidcom2.compute_retention_mask(rows[:, :WIDTH], size, 2, RATE)
    kept = torch.zeros_like(mask).index_fill_(0, ours("qwen3_vl", "vidcom2"), True)
    for one, other in ((asked("vidcom2", rows, size), mask), (kept, about_prompt)):
        assert one.sum() == other.sum() == len(mask) // 4
        frames = [each.view(size[0], -1) for each in (one, other)]
        counts = torch.stack([frame.sum(1) for frame in frames])
        assert counts.diff(dim=0).abs().max() <= 1
        assert torch.equal((frames[0] & frames[1]).sum(1), counts.amin(0))  # of a frame, the one are among the other
