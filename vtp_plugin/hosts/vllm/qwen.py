"""What the Qwen families share inside vLLM: packed tower, images of any size, M-RoPE. No family itself.

Positions are those of the transformers path. vLLM asks for them before the tower runs, so text gets its own then, from
the sizes of the images. Where a kept token was in its image is known behind the tower only: its row and column travel
behind its features, in channels that vLLM hands back for every part of a prompt that it computes
(`SupportsMultiModalPruning`, which it made for videos), and complete the table before the decoder reads it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn
from vllm.distributed import tensor_model_parallel_all_gather
from vllm.model_executor.models.utils import StageMissingLayer
from vllm.multimodal.processing import PromptReplacement
from vllm.platforms import current_platform
from vllm.transformers_utils.processor import cached_image_processor_from_config

from vtp_plugin.adapters.qwen import QwenVL
from vtp_plugin.adapters.qwen2_5_vl import Qwen25VL
from vtp_plugin.adapters.qwen3_vl import Qwen3VL
from vtp_plugin.adapters.qwen_tower import (
    back_to_raster,
    begin,
    every_patch,
    frames,
    identify,
    levels_of,
    packed_tower,
)
from vtp_plugin.errors import PruningError
from vtp_plugin.hosts.vllm.plan import KEY, Plan, planned
from vtp_plugin.hosts.vllm.processing import CountsKept, Decides
from vtp_plugin.hosts.vllm.worker import Parts, Served
from vtp_plugin.hosts.wrapping import wrap
from vtp_plugin.signals import BlockView
from vtp_plugin.stages import Stage
from vtp_plugin.surgery.call import Call, Image
from vtp_plugin.surgery.layout import Block, Layout, sequences_view
from vtp_plugin.surgery.passes import TowerPass
from vtp_plugin.surgery.positions import Choice
from vtp_plugin.surgery.rows import RowsLate
from vtp_plugin.surgery.undo import Undo
from vtp_plugin.surgery.vision import Cutting

GRID = (24, 24)  # of an image, until one is seen
CHANNELS, BASE = 4, 128  # row and column as digits, which bf16 holds exactly
ABSENT = {"text", "aligned", "class_query"}  # signals of towers that CLIP trained
MODELS = {family.family: family.models for family in (Qwen25VL, Qwen3VL)}  # what users know them as


def plan_of(config: Any) -> Plan:
    """The plan in a model configuration; PruningError if it cannot be served."""
    vision, models = config.vision_config, MODELS[config.model_type]
    chosen = planned(getattr(config, KEY), GRID, vision.patch_size, vision.depth, True)
    for strategy in chosen.strategies:
        if strategy.stage is not Stage.PROJECTOR:
            raise strategy.error(
                f"of {models} inside vLLM only the projector stage is served: the tower computes its tables for whole "
                f"images"
            )
        if ABSENT & set(strategy.needs):
            raise strategy.error(
                f"{models} has no CLIP text encoder and no class token, and text_encoder=llm is not possible inside "
                f"vLLM: use a strategy that reads neither"
            )
    Choice.of(chosen.strategies, PackedParts)
    return chosen


# -- the process that takes requests -----------------------------------------------------------------------------------


class CountsMerged(CountsKept):
    """Mixed into a family's processing info: how many tokens an image has."""

    @cached_property
    def plan(self) -> Plan:
        return plan_of(self.get_hf_config())

    def get_supported_mm_limits(self) -> Mapping[str, int | None]:
        return {"image": None, "video": 0}

    def validate_num_items(self, modality: str, num_items: int) -> None:
        if modality == "video" and num_items:
            models = MODELS[self.get_hf_config().model_type]
            raise PruningError(f"a pruned {models} takes no videos inside vLLM: send frames as images")
        super().validate_num_items(modality, num_items)

    def get_num_image_tokens(self, **picture: Any) -> int:
        size, _ = self._get_vision_info(modality="image", **picture)
        vision = self.get_hf_config().vision_config
        return self.kept(1, size.height // vision.patch_size, size.width // vision.patch_size)

    def kept(self, frames: int, rows: int, columns: int) -> int:
        """How many tokens an image of frames x rows x columns patches has in the prompt."""
        merge = self.get_hf_config().vision_config.spatial_merge_size
        plan = self.plan.at((frames * rows // merge, columns // merge))
        return plan.count(plan.whole)


class DecidesMerged(Decides):
    """Mixed into a family's multi-modal processor: from pictures to pixel values and placeholders."""

    def apply(self, inputs: Any, timing_ctx: Any) -> Any:
        if inputs.mm_data_items.get("image") and inputs.prompt[-1] == self.info.get_hf_config().image_token_id:
            raise PruningError("the prompt ends with a picture, but new tokens are numbered behind text: add some")
        return super().apply(inputs, timing_ctx)

    def _get_prompt_updates(self, mm_items: Any, hf_processor_mm_kwargs: Any, out_mm_kwargs: Any) -> Sequence[Any]:
        token = self.info.get_hf_config().image_token_id

        def placeholders(number: int) -> list[int]:
            return [token] * self.info.kept(*out_mm_kwargs["image"][number]["image_grid_thw"].data.tolist())

        return [PromptReplacement(modality="image", target=[token], replacement=placeholders)]


class TextBehind:
    """Mixed into what vLLM tries before it serves: text behind the pictures."""

    def get_dummy_text(self, mm_counts: Mapping[str, int]) -> str:
        return super().get_dummy_text(mm_counts) + "."


# -- the workers -------------------------------------------------------------------------------------------------------


class WholeTower(Cutting):
    """vLLM's tower runs on whole images; what is read in its blocks is put back into raster order."""

    def install(self, undo: Undo) -> None:
        self.forward = undo.override(self.tower.module, "forward", self._tower)

    def _tower(self, x: Tensor, grid_thw: Any, **kwargs: Any) -> Tensor:
        """The tower's `forward` on patches [S, C] of images [B, 3]."""
        passing, unit = self.passing, self.tower.block**2
        if passing is None:
            return self.forward(x, grid_thw, **kwargs)
        begin(passing, torch.as_tensor(grid_thw), unit)
        identify(self, levels_of(self, passing.values), unit)
        output = self.forward(x, grid_thw, **kwargs)
        back_to_raster(passing, self.family.order(passing).to(output.device), unit)
        return output


class PackedParts(Parts):
    """A Qwen-VL inside vLLM: where its parts are."""

    default_positions = "original"
    tiled = True
    arrange, _image = QwenVL.arrange, QwenVL._image

    def __init__(self, model: nn.Module, processor: Any) -> None:
        visual = model.visual
        self.merge, self.tokens = visual.spatial_merge_size, {"image": model.config.image_token_id}
        tower = packed_tower(visual, visual.patch_size)
        super().__init__(model, tower, visual.merger, processor)
        self.layout = Layout(WholeTower, RowsLate, self.read_block, every_patch, frames)

    def read_block(self, block: Block, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> BlockView:
        """A block of vLLM's tower, called with normed hidden states [S, 1, D]."""
        tables = kwargs["rotary_pos_emb_cos"], kwargs["rotary_pos_emb_sin"]
        key, value, query, turned = _heads(block.attention, args[0], *tables)
        whole = partial(_of_all_workers, block.attention)
        keys, lengths = whole(key), self.lengths(block.passing, block.number)
        factor = keys.shape[-1] ** -0.5
        return sequences_view(whole(query), whole(turned), keys, lengths, factor, values=partial(whole, value))

    def order(self, passing: TowerPass) -> Tensor:
        """The units of the images in the tower [U], in the order in which its blocks see them."""
        return torch.arange(passing.offsets[-1])

    def lengths(self, passing: TowerPass, number: int) -> list[int]:
        """Of the sequences that attend to themselves in a block, in patches."""
        return [rows * columns for frames, rows, columns in passing.grid.tolist() for _ in range(frames)]

    def images(self, inputs: Mapping[str, Any]) -> list[Image]:
        grids = inputs["image_grid_thw"].tolist()
        return [self._image("image", *grid, inputs["pixel_values"][0].device) for grid in grids]

    def encode(self, call: Call, encode: Callable[..., Any], inputs: Mapping[str, list[Tensor]]) -> Iterator[Tensor]:
        """Encode and merge whole images as vLLM does, then take rows out; each with its place, [K, L + CHANNELS]."""
        values, grids = torch.cat(inputs["pixel_values"]), torch.stack(inputs["image_grid_thw"])
        raw = values.dtype is torch.uint8  # vLLM may leave scaling and normalising to the worker
        passing = call.tower
        passing.inputs, passing.values = {"image_grid_thw": grids}, values / 255 if raw else values
        merged = encode(pixel_values=values, image_grid_thw=grids)
        width = self.model.config.vision_config.out_hidden_size  # deepstack lies behind
        kept = self.pruned.vision.rows([rows[:, :width] for rows in merged])
        for (rows, left), whole, grid in zip(kept, merged, grids.tolist(), strict=True):
            deepstack = whole[left.source.clamp(min=0), width:]  # of a merged token, that of the one it is built on
            yield torch.cat([rows, deepstack, channels(left.source, grid[2] // self.merge).to(rows)], dim=1)


class AroundQwen:
    """Mixed into a Qwen-VL of vLLM: attaches the strategies, and serves what they leave at its positions."""

    parts: type[PackedParts] = PackedParts
    supports_tower_connector_lora = False  # its bookkeeping takes the tower's length from the prompt

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
        if kwargs.get("pixel_values") is None:
            return super().embed_multimodal(**kwargs)
        grids = kwargs["image_grid_thw"]
        inputs = {"pixel_values": kwargs["pixel_values"].split(grids.prod(-1).tolist()), "image_grid_thw": grids}
        return self.vtp.embed(super().embed_multimodal, inputs)

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


def channels(source: Tensor, columns: int) -> Tensor:
    """Row and column of units [K] of an image with so many columns, as digits [K, CHANNELS]; -1 counts as the first."""
    first = source.clamp(min=0)
    row, column = first // columns, first % columns
    return torch.stack([row // BASE, row % BASE, column // BASE, column % BASE], dim=1)


def places_of(digits: Tensor) -> Tensor:
    """The way back, [K, CHANNELS] -> [2, K]."""
    return digits[:, 0::2].T * BASE + digits[:, 1::2].T


def _heads(module: nn.Module, hidden: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, ...]:
    """Of attention on [S, 1, D]: keys and values, queries and keys rotated; the heads [S, H, d] of this worker."""
    fused = module.qkv(hidden)[0][:, 0].unflatten(-1, (3, -1, module.hidden_size_per_attention_head))
    query, key, value = fused.unbind(1)
    return key, value, *module.apply_rotary_emb(torch.stack([query, key]), cos, sin).unbind(0)


def _of_all_workers(module: nn.Module, heads: Tensor) -> Tensor:
    """[S, H, d] of one worker -> [H', S, d]: all heads, wherever they live."""
    whole = tensor_model_parallel_all_gather(heads.contiguous(), dim=1) if module.tp_size > 1 else heads
    return whole.transpose(0, 1)
