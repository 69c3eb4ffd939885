"""The tower of a Qwen-VL inside vLLM: it runs on the units that are left of images of any size.

A unit is a square of patches (2x2) that becomes one token. The tower's own tables (rotary angles, position embeddings,
ends of sequences) are narrowed to them; behind it, dropped units come out as zeros, until their rows are taken out.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from vllm.distributed import tensor_model_parallel_all_gather
from vllm.model_executor.layers.attention import MMEncoderAttention

from vtp_plugin.adapters.qwen import QwenVL
from vtp_plugin.adapters.qwen_tower import (
    PackedEarly,
    begin,
    every_patch,
    frames,
    packed_tower,
    put,
)
from vtp_plugin.hosts.vllm.worker import Parts, ServedLate
from vtp_plugin.signals import BlockView
from vtp_plugin.strategy import PruningStrategy
from vtp_plugin.surgery.call import Call, Image
from vtp_plugin.surgery.layout import Block, Layout, sequences_view
from vtp_plugin.surgery.passes import TowerPass

CHANNELS, BASE = 4, 128  # row and column as digits, which bf16 holds exactly
BY_PATCH = ("rotary_pos_emb_cos", "rotary_pos_emb_sin", "pos_embeds")  # the tower's tables, in its own order


class ServedEarly(PackedEarly):
    """Cuts in front of vLLM's tower; what is read in its blocks is put back into raster order."""

    def check(self, strategy: PruningStrategy) -> None:
        """Nothing is impossible: every image is one tile."""

    def _tower(self, x: Tensor, grid_thw: Any, **kwargs: Any) -> Tensor:
        """The tower's `forward` on patches [S, C] of images [B, 3]."""
        passing, visual = self.passing, self.tower.module
        if passing is None:
            return self.forward(x, grid_thw, **kwargs)
        begin(passing, torch.as_tensor(grid_thw), self._unit)
        passing.values = visual.input_norm(x.to(visual.device), visual.dtype)
        units = self._decided(passing)
        kept = torch.cat([own + start for own, start in zip(units, passing.offsets[:-1], strict=True)])
        order = self.family.order(passing)
        if len(kept) == passing.offsets[-1]:
            output = self.forward(x, grid_thw, **kwargs)
        else:
            output, order = self._narrowed(x, kept, order)
        self._put_back(passing, order.to(output.device))
        return output

    def _levels(self) -> Tensor | None:
        given = self.passing.inputs["pixel_values"]
        if given.dtype is torch.uint8:  # vLLM leaves it to the tower to normalise them
            return given.to(self.passing.values.device).unflatten(1, (3, -1, self.tower.patch_size))
        return super()._levels()

    def _narrowed(self, x: Tensor, kept: Tensor, order: Tensor) -> tuple[Tensor, Tensor]:
        """The tower on the kept units [K]: a row per unit [U, D], zero where it was dropped; and its order of those."""
        passing, unit, on_host = self.passing, self._unit, kept.cpu()
        alive = put(passing, torch.ones_like(on_host, dtype=torch.bool), on_host)
        passing.alive = alive.repeat_interleave(unit)
        there = alive[order]
        tables = self.family.tables(passing, there.repeat_interleave(unit).nonzero().flatten())
        order = order[there]
        tables |= self.family.ordered(torch.searchsorted(on_host, order).to(kept.device))
        values = x.unflatten(0, (-1, unit))[kept.to(x.device)].flatten(0, 1)
        output = self.forward(values, None, encoder_metadata=tables)
        return put(passing, output, kept.to(output.device)), order


class PackedParts(Parts):
    """A Qwen-VL inside vLLM: where its parts are."""

    default_positions = "original"
    tiled = True
    packed = True
    arrange, units, _image = QwenVL.arrange, QwenVL.units, QwenVL._image

    def __init__(self, model: nn.Module, processor: Any) -> None:
        visual = model.visual
        self.merge, self.tokens = visual.spatial_merge_size, {"image": model.config.image_token_id}
        tower = packed_tower(visual, visual.patch_embed.patch_size)
        super().__init__(model, tower, visual.merger, processor)
        self.layout = Layout(ServedEarly, ServedLate, self.read_block, every_patch, frames)

    def read_block(self, block: Block, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> BlockView:
        """A block of vLLM's tower, called with normed hidden states [S, 1, D]."""
        module = block.attention
        query, key, value = self.heads(module, args[0])
        tables = kwargs["rotary_pos_emb_cos"], kwargs["rotary_pos_emb_sin"]
        query, turned = module.apply_rotary_emb(torch.stack([query, key]), *tables).unbind(0)
        whole = partial(_of_all_workers, module)
        keys, lengths = whole(key), self.left(block.passing, self.lengths(block.passing, block.number))
        factor = keys.shape[-1] ** -0.5
        return sequences_view(whole(query), whole(turned), keys, lengths, factor, values=partial(whole, value))

    def heads(self, module: nn.Module, hidden: Tensor) -> tuple[Tensor, ...]:
        """Queries, keys and values of normed hidden states [S, 1, D]: the heads [S, H, d] of this worker."""
        return module.qkv(hidden)[0][:, 0].unflatten(-1, (3, -1, module.hidden_size_per_attention_head)).unbind(1)

    # -- which patches attend to each other -----------------------------------------------------------------------

    def order(self, passing: TowerPass) -> Tensor:
        """The units of the images in the tower [U], in the order in which its blocks see them."""
        return torch.arange(passing.offsets[-1])

    def lengths(self, passing: TowerPass, number: int) -> list[int]:
        """Of the sequences of whole images that attend to themselves in a block, in patches."""
        return self.frames(passing)

    def frames(self, passing: TowerPass) -> list[int]:
        """The same in blocks that see whole images."""
        return [rows * columns for frames, rows, columns in passing.grid.tolist() for _ in range(frames)]

    def left(self, passing: TowerPass, lengths: list[int]) -> list[int]:
        """What is left of sequences of whole images."""
        if passing.alive is None:
            return lengths
        there = passing.alive.unflatten(0, (-1, self.merge**2))[self.order(passing)].flatten()
        return [count for part in there.split(lengths) if (count := int(part.sum()))]

    def tables(self, passing: TowerPass, rows: Tensor) -> dict[str, Any]:
        """What vLLM's tower computes from whole images, for some of its patches [P], which it sees in this order."""
        tables = self.tower.module.prepare_encoder_metadata(passing.grid.tolist())
        narrowed = {name: tables[name][rows.to(tables[name].device)] for name in BY_PATCH if name in tables}
        return narrowed | self.sequences(passing)

    @abstractmethod
    def sequences(self, passing: TowerPass) -> dict[str, Any]:
        """The tower's arguments that say which of the patches that are left attend to each other."""

    def ordered(self, order: Tensor) -> dict[str, Tensor]:
        """Its arguments that say in which order [K] its blocks see the units that are left."""
        return {}

    # -- images -----------------------------------------------------------------------------------------------------

    def images(self, inputs: Mapping[str, Any]) -> list[Image]:
        grids = inputs["image_grid_thw"].tolist()
        return [self._image("image", *grid, inputs["pixel_values"][0].device) for grid in grids]

    def encode(self, call: Call, encode: Callable[..., Any], inputs: Mapping[str, list[Tensor]]) -> Iterator[Tensor]:
        """Encode and merge images as vLLM does, then take rows out; each with its place, [K, L + CHANNELS]."""
        values, grids = torch.cat(inputs["pixel_values"]), torch.stack(inputs["image_grid_thw"])
        call.tower.inputs = {"pixel_values": values, "image_grid_thw": grids}
        merged = encode(pixel_values=values, image_grid_thw=grids)
        width = self.model.config.get_text_config().hidden_size  # deepstack lies behind
        kept = self.pruned.vision.rows([rows[:, :width] for rows in merged])
        for (rows, left), whole, grid in zip(kept, merged, grids.tolist(), strict=True):
            deepstack = whole[left.source.clamp(min=0), width:]  # of a merged token, that of the one it is built on
            yield torch.cat([rows, deepstack, channels(left.source, grid[2] // self.merge).to(rows)], dim=1)


def spans(visual: nn.Module, lengths: Sequence[int]) -> tuple[Any, Any, Any]:
    """Sequences of so many patches as vLLM's attention takes them: ends, the longest, lengths."""
    ends = torch.tensor([0, *lengths]).cumsum(0).int().numpy()
    backend, device = visual.attn_backend, visual.device
    return (
        MMEncoderAttention.maybe_recompute_cu_seqlens(
            backend,
            ends,
            visual.hidden_size,
            visual.tp_size,
            device,
            fp8_padded_hidden_size=visual.fp8_padded_hidden_size,
        ),
        torch.tensor(MMEncoderAttention.compute_max_seqlen(backend, ends), dtype=torch.int32),
        MMEncoderAttention.maybe_compute_seq_lens(backend, ends, device),
    )


def channels(source: Tensor, columns: int) -> Tensor:
    """Row and column of units [K] of an image with so many columns, as digits [K, CHANNELS]; -1 counts as the first."""
    first = source.clamp(min=0)
    row, column = first // columns, first % columns
    return torch.stack([row // BASE, row % BASE, column // BASE, column % BASE], dim=1)


def places_of(digits: Tensor) -> Tensor:
    """The way back, [K, CHANNELS] -> [2, K]."""
    return digits[:, 0::2].T * BASE + digits[:, 1::2].T


def _of_all_workers(module: nn.Module, heads: Tensor) -> Tensor:
    """[S, H, d] of one worker -> [H', S, d]: all heads, wherever they live."""
    whole = tensor_model_parallel_all_gather(heads.contiguous(), dim=1) if module.tp_size > 1 else heads
    return whole.transpose(0, 1)
