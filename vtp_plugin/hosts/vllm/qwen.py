"""A Qwen-VL inside vLLM: attaches the strategies, and serves what they leave at its positions. No family itself.

Positions are those of the transformers path. vLLM asks for them before the tower runs, so text gets its own then, from
the sizes of the images. Where a kept token was in its image is known behind the tower only: its row and column travel
behind its features, in channels that vLLM hands back for every part of a prompt that it computes
(`SupportsMultiModalPruning`, which it made for videos), and complete the table before the decoder reads it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from vllm.model_executor.models.utils import StageMissingLayer
from vllm.platforms import current_platform
from vllm.transformers_utils.processor import cached_image_processor_from_config

from vtp_plugin.errors import PruningError
from vtp_plugin.hosts.vllm.processing import KEEP
from vtp_plugin.hosts.vllm.qwen_requests import plan_of
from vtp_plugin.hosts.vllm.qwen_tower import CHANNELS, PackedParts, places_of
from vtp_plugin.hosts.vllm.worker import Around, Served
from vtp_plugin.hosts.wrapping import wrap
from vtp_plugin.surgery.positions import Choice


class AroundQwen(Around):
    """Mixed into a Qwen-VL of vLLM: attaches the strategies, and serves what they leave at its positions."""

    parts: type[PackedParts]
    supports_multimodal_pruning = True  # vLLM asks, where it calls `recompute_mrope_positions`

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        models, parallel = vllm_config.model_config, vllm_config.parallel_config
        models.get_multimodal_config().video_pruning_rate = 0.5  # takes no videos, but only so vLLM reads channels
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        if current_platform.is_cpu():
            _let_cpu_read_channels()
        plan = plan_of(self.config)
        self.compact = Choice.of(plan.strategies, PackedParts).prompt == "compact"
        if parallel.pipeline_parallel_size > 1 and not self.compact:
            raise PruningError(
                "positions=original is not possible with pipeline parallelism: only the first workers learn which "
                "tokens were kept; say positions=compact"
            )
        if parallel.tensor_parallel_size > 1 and self.use_data_parallel:
            raise PruningError("--mm-encoder-tp-mode data is not possible with pruning: workers must decide alike")
        if not isinstance(self.visual, StageMissingLayer):  # as after --limit-mm-per-prompt image=0
            parts = self.parts(self, cached_image_processor_from_config(models))
            self.vtp = Served(self, parts, plan, vllm_config.scheduler_config.max_num_batched_tokens)

    # -- features -------------------------------------------------------------------------------------------------

    def embed_multimodal(self, **kwargs: Any) -> Any:
        keep = kwargs.pop(KEEP, None)
        if kwargs.get("pixel_values") is None:
            return super().embed_multimodal(**kwargs)
        grids = kwargs["image_grid_thw"]
        inputs = {"pixel_values": kwargs["pixel_values"].split(grids.prod(-1).tolist()), "image_grid_thw": grids}
        return self.vtp.embed(super().embed_multimodal, inputs, keep)

    def _postprocess_image_embeds_evs(self, image_embeds_split: Any, image_input: Any) -> Any:
        """The channels come with the rows that are kept."""
        return image_embeds_split

    # -- positions ------------------------------------------------------------------------------------------------

    def get_mrope_input_positions(self, input_tokens: list[int], mm_features: list[Any]) -> tuple[Tensor, int]:
        """[3, L], and what new tokens are ahead of their columns; kept tokens get their rows and columns later."""
        whole, keep = self._unpruned(len(input_tokens), mm_features)
        dropped = len(keep) - len(input_tokens)
        if dropped and self.compact:
            return torch.arange(len(input_tokens)).repeat(3, 1), 0
        table, ahead = super().get_mrope_input_positions([0] * len(keep), whole)
        return table[:, keep], ahead + dropped

    def _unpruned(self, length: int, features: Sequence[Any]) -> tuple[list[Any], Tensor]:
        """The images of a prompt with all of their columns, and which of its columns [L'] stay: the first ones."""
        whole, gaps, dropped = [], [], 0
        for feature in sorted(features, key=lambda feature: feature.mm_position.offset):
            place = feature.mm_position
            total = int(feature.data["image_grid_thw"].data.prod()) // self.config.vision_config.spatial_merge_size**2
            first = place.offset + dropped
            whole.append(replace(feature, mm_position=replace(place, offset=first, length=total)))
            gaps.append(torch.arange(first + place.length, first + total))
            dropped += total - place.length
        keep = torch.ones(length + dropped, dtype=torch.bool)
        return whole, keep.index_fill_(0, torch.cat(gaps), False) if gaps else keep

    def recompute_mrope_positions(
        self,
        input_ids: Any,
        multimodal_embeddings: Sequence[Tensor],
        mrope_positions: Tensor,
        num_computed_tokens: int,
    ) -> tuple[list[Tensor], Tensor, int]:
        """Take the channels off parts of images [k, L + CHANNELS] that stand in columns from `num_computed_tokens` on.

        The first axis of `mrope_positions` [3, L] is the position of the image itself, and stays so.
        """
        rows, positions = [part[:, :-CHANNELS] for part in multimodal_embeddings], mrope_positions
        if rows and not self.compact:
            places = torch.cat([part[:, -CHANNELS:] for part in multimodal_embeddings]).to(positions)
            columns = (torch.as_tensor(input_ids, device=positions.device) == self.config.image_token_id).nonzero()
            columns = columns[columns >= num_computed_tokens][: len(places)]
            positions = positions.clone()
            positions[1:, columns] = positions[0, columns] + places_of(places)
        return rows, positions, int(positions[0, -1]) + 1 - positions.shape[1]


def _let_cpu_read_channels() -> None:
    """`CPUModelRunner.load_model` forgets what `GPUModelRunner.load_model` asks: whether the model sends positions."""
    from vllm.v1.worker.cpu_model_runner import CPUModelRunner

    if not hasattr(CPUModelRunner._gather_mm_embeddings, "_vtp"):
        wrap(CPUModelRunner, "_gather_mm_embeddings", _gathering)


def _gathering(original: Callable, runner: Any, *args: Any, **kwargs: Any) -> Any:
    runner.is_multimodal_pruning_enabled |= isinstance(runner.get_model(), AroundQwen)
    return original(runner, *args, **kwargs)
