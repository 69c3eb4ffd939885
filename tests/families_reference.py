"""A slow reference that knows nothing of the package's surgery: per sample, cache-free, explicit rows and positions.

Given which tokens were kept, it says what the model must answer. Tokens that were dropped inside the tower stay in the
sequence here, but nobody attends to them and their output is nan: the rows that come out without a nan are what is
left. Columns that were dropped between decoder layers stay in the sequence too, masked from that layer on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

IMAGE, VIDEO = 190, 191
ALIVE: list[Tensor] = []  # tower tokens that may be attended to: [T, L], or [S] for packed towers
CURSOR = [0]


def masked_attention(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Any:
    """Eager attention that does not see dropped tokens; packed towers call it window by window."""
    logits = query @ key.mT * kwargs["scaling"]
    alive = ALIVE[0]
    if alive.ndim == 1:
        start = CURSOR[0] % len(alive)
        CURSOR[0] += key.shape[2]
        alive = alive[None, start : start + key.shape[2]]
    logits = logits.masked_fill(~alive[:, None, None], -1e9)
    return (logits.softmax(-1) @ value).transpose(1, 2), None


AttentionInterface.register("families_reference", masked_attention)


@dataclass
class Kept:
    """Decisions about the images of one sample, one entry per image; None where the stage does not cut."""

    units: list[Tensor] | None = None  # pixels and vit: merge units of all tiles
    rows: list[Tensor] | None = None  # projector: rows that the host makes
    late: list[Tensor] | None = None  # llm: rows
    layer: int = 2
    shifted: bool = False  # every kept row has the values of the next one that may be dropped, as if it was merged
    positions: str = ""  # original or compact; else what the family does, and original between layers


class Reference:
    """What one sample must give."""

    def __init__(self, model: nn.Module, inputs: dict[str, Tensor], totals: list[int], kept: Kept) -> None:
        self.model, self.core, self.kept, self.totals = model, model.model, kept, totals
        self.inputs = inputs
        self.ids = inputs["input_ids"][0]
        self.tower = next(
            getattr(self.core, n) for n in ("vision_tower", "visual", "vision_model") if hasattr(self.core, n)
        )
        self.llm = getattr(self.core, "language_model", None) or self.core.text_model
        self.video = "pixel_values_videos" in inputs
        shared = "Glm4" in type(model).__name__  # one placeholder for both
        self.where = (self.ids == (VIDEO if self.video and not shared else IMAGE)).nonzero().flatten().split(totals)
        with torch.no_grad():
            self._assemble()

    # -- rows -----------------------------------------------------------------------------------------------------

    def _assemble(self) -> None:
        name = "get_video_features" if self.video else "get_image_features"
        names = ("pixel_values", "pixel_values_videos", "image_sizes", "image_grid_thw", "video_grid_thw")
        given = {k: self.inputs[k] for k in names if k in self.inputs}
        if self.video and "pixel_values" in signature(getattr(self.core, name)).parameters:  # transformers 5.17
            given["pixel_values"] = given.pop("pixel_values_videos")
        with self._poisoned():
            output = getattr(self.core, name)(**given, return_dict=True)
        rows = self._flat(output.pooler_output)
        newline = hasattr(self.core, "image_newline")
        if newline and len(rows) < sum(self.totals):  # a video of transformers 5.17 gets its newline later
            rows = torch.cat([rows, self.core.image_newline[None]])
        fixed = torch.zeros(len(rows), dtype=torch.bool)
        if newline:
            fixed = (rows == self.core.image_newline).all(-1)
        present = ~rows.isnan().any(-1)
        if self.kept.shifted:
            rows = self._shifted(rows, fixed)
        wanted = self._wanted(fixed.split(self.totals), present.split(self.totals))
        columns = torch.cat(self.where)
        keep = torch.ones_like(self.ids, dtype=torch.bool)
        keep[columns] = wanted
        embeds = self.model.get_input_embeddings()(torch.where(self.visual, 0, self.ids))
        embeds[columns] = rows.to(embeds)
        self.keep, self.embeds = keep, embeds[keep][None]
        self.deepstack = [self._flat(level)[wanted] for level in getattr(output, "deepstack_features", None) or []]
        self.columns = keep.nonzero().flatten()
        self.fixed = columns[fixed]

    def _shifted(self, rows: Tensor, fixed: Tensor) -> Tensor:
        """Rows [n, D] with the values of the next row that is not fixed, image by image."""
        shifted = rows.clone()
        for numbers, mask in zip(torch.arange(len(rows)).split(self.totals), fixed.split(self.totals), strict=True):
            judged = numbers[~mask]
            shifted[judged[:-1]] = rows[judged[1:]]
        return shifted

    @property
    def visual(self) -> Tensor:
        mask = torch.zeros_like(self.ids, dtype=torch.bool)
        mask[torch.cat(self.where)] = True
        return mask

    def _wanted(self, fixed: Any, present: Any) -> Tensor:
        if self.kept.rows is None:
            return torch.cat(present)
        chosen = [f.clone() for f in fixed]
        for mask, rows in zip(chosen, self.kept.rows, strict=True):
            mask[rows] = True
        return torch.cat(chosen)

    def _flat(self, rows: Any) -> Tensor:
        rows = torch.cat([r.flatten(0, -2) for r in rows]) if isinstance(rows, (list, tuple)) else rows
        return rows.flatten(0, -2)

    @contextmanager
    def _poisoned(self) -> Iterator[None]:
        if self.kept.units is None:
            yield
            return
        config, original = self.tower.config, self.tower.config._attn_implementation
        with ExitStack() as stack:
            config._attn_implementation = "families_reference"
            stack.callback(setattr, config, "_attn_implementation", original)
            stack.callback(ALIVE.clear)
            CURSOR[0] = 0
            hook = self._packed_tower() if hasattr(self.tower, "merger") else self._tiled_tower()
            for handle in hook:
                stack.callback(handle.remove)
            yield

    def _packed_tower(self) -> list[Any]:
        grid = self.inputs["video_grid_thw" if self.video else "image_grid_thw"]
        alive = torch.cat([_mask(units, total) for units, total in zip(self.kept.units, self.totals, strict=True)])
        if hasattr(self.tower, "window_size"):
            from transformers.vision_utils import get_vision_window_index

            order, _ = get_vision_window_index(grid, 2, self.tower.window_size, self.tower.patch_size)
            alive = alive[order]
        alive = alive.repeat_interleave(4)
        ALIVE.append(alive)
        poison = lambda module, args: (args[0].masked_fill(~alive[:, None], float("nan")),)  # noqa: E731
        if hasattr(self.tower, "downsample"):  # merges before the merger
            dead, last = ~alive[:, None], self.tower.post_layernorm
            return [last.register_forward_hook(lambda m, args, out: out.masked_fill(dead, float("nan")))]
        mergers = [self.tower.merger, *getattr(self.tower, "deepstack_merger_list", [])]
        return [merger.register_forward_pre_hook(poison) for merger in mergers]

    def _tiled_tower(self) -> list[Any]:
        block, prefix, side = self._geometry()
        squares = torch.arange(side * side).view(side // block, block, side // block, block).transpose(1, 2)
        squares = squares.reshape(-1, block * block)
        tiles = self._tiles()
        masks = [_mask(units, n * len(squares)).view(n, -1) for units, n in zip(self.kept.units, tiles, strict=True)]
        units = torch.cat(masks)
        alive = torch.zeros(len(units), side * side, dtype=torch.bool)
        for unit, patches in enumerate(squares):
            alive[:, patches] = units[:, unit, None]
        alive = torch.cat([torch.ones(len(alive), prefix, dtype=torch.bool), alive], 1)
        ALIVE.append(alive)

        def poison(module: nn.Module, args: Any, output: Any) -> None:
            dead = ~alive[..., None]
            output.last_hidden_state = output.last_hidden_state.masked_fill(dead, float("nan"))
            if output.hidden_states is not None:
                states = output.hidden_states
                output.hidden_states = tuple(h if h is None else h.masked_fill(dead, float("nan")) for h in states)

        return [self.tower.register_forward_hook(poison)]

    def _geometry(self) -> tuple[int, int, int]:
        name = type(self.model).__name__
        block = 2 if any(part in name for part in ("InternVL", "Gemma3", "AyaVision", "Cohere2Vision")) else 1
        config = self.tower.config
        size, patch = config.image_size, config.patch_size
        side = size[0] // patch[0] if isinstance(size, (list, tuple)) else size // patch
        return block, int("LlavaNext" in name or "InternVL" in name), side

    def _tiles(self) -> list[int]:
        if "image_sizes" in self.inputs:
            from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches

            pinpoints = self.model.config.image_grid_pinpoints
            return [image_size_to_num_patches(size, pinpoints, 16) for size in self.inputs["image_sizes"]]
        return [total * len(self.inputs["pixel_values"]) // sum(self.totals) for total in self.totals]

    # -- the language model ---------------------------------------------------------------------------------------

    def positions(self, new: int) -> Tensor | None:
        """Explicit positions of the kept columns and `new` more."""
        lost, flat = len(self.columns) < len(self.ids), not hasattr(self.core, "get_rope_index")
        if self.kept.positions == "original" and flat:
            return torch.cat([self.columns, torch.arange(new) + len(self.ids)])[None]
        if flat or (self.kept.positions == "compact" and lost):
            table = torch.arange(len(self.columns) + new)[None]
            return table if flat else table.expand(3, 1, -1)
        types = {
            k: self.inputs[k] for k in ("mm_token_type_ids", "image_grid_thw", "video_grid_thw") if k in self.inputs
        }
        table, delta = self.core.get_rope_index(self.ids[None], **types)
        later = (torch.arange(new) + len(self.ids) + delta[0]).expand(3, 1, -1)
        return torch.cat([table[:, :, self.columns], later], -1)

    def logits(self, new: list[int]) -> Tensor:
        """Logits of every column of the shortened prompt and the new tokens, [L, V], without a cache."""
        with torch.no_grad(), self._late_masks(len(new)), self._rotating(self.positions(len(new))):
            more = self.model.get_input_embeddings()(torch.tensor(new, dtype=torch.long))[None]
            embeds = torch.cat([self.embeds, more], 1)
            arguments = {"inputs_embeds": embeds, "position_ids": self._told(len(new)), "use_cache": False}
            if "token_type_ids" in self.inputs:
                types = self.inputs["token_type_ids"][:, self.keep]
                later = int("PaliGemma" in type(self.model).__name__)  # where 0 is the prompt, which attends both ways
                arguments["token_type_ids"] = torch.cat([types, types.new_full((1, len(new)), later)], 1)
                hidden = self.core(**arguments)[0]
            else:
                if self.deepstack:
                    seen = torch.cat([self.visual[self.keep], torch.zeros(len(new), dtype=torch.bool)])[None]
                    arguments |= {"visual_pos_masks": seen, "deepstack_visual_embeds": self.deepstack}
                hidden = self.llm(**arguments)[0]
            return self.model.lm_head(hidden)[0]

    def _told(self, new: int) -> Tensor:
        """What the host may hear: gaps in plain positions are packed sequences to it."""
        positions = self.positions(new)
        return positions if positions.ndim == 3 else torch.arange(positions.shape[1])[None]

    @contextmanager
    def _rotating(self, positions: Tensor) -> Iterator[None]:
        def hook(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
            where = {"position_ids": positions} if "position_ids" in kwargs else {}
            return (args if where else (args[0], positions, *args[2:])), {**kwargs, **where}

        handle = self.llm.rotary_emb.register_forward_pre_hook(hook, with_kwargs=True)
        yield
        handle.remove()

    @contextmanager
    def _late_masks(self, new: int) -> Iterator[None]:
        if self.kept.late is None:
            yield
            return
        hidden = torch.cat([self.hidden, torch.zeros(new, dtype=torch.bool)])
        anew = self.kept.positions == "compact" and bool(hidden.any())
        handles = [
            layer.register_forward_pre_hook(
                _hiding(hidden, self._tables(number, hidden) if anew else None), with_kwargs=True
            )
            for number, layer in enumerate(self.llm.layers)
            if number >= self.kept.layer
        ]
        yield
        for handle in handles:
            handle.remove()

    def _tables(self, number: int, hidden: Tensor) -> Any:
        """Rotary tables of a layer that counts from 0 what it sees."""
        counted = ((~hidden).cumsum(0) - 1).clamp(min=0)[None]
        types = getattr(self.llm.config, "layer_types", None) if "Gemma3" in type(self.model).__name__ else None
        if hasattr(self.llm.rotary_emb, "mrope_section"):
            counted = counted.expand(3, -1, -1)
        return self.llm.rotary_emb(torch.zeros(1), counted, *([types[number]] if types else []))

    @property
    def hidden(self) -> Tensor:
        """Columns of the shortened prompt that the last layers do not see."""
        if self.kept.late is None:
            return torch.zeros(len(self.columns), dtype=torch.bool)
        full = torch.zeros_like(self.ids, dtype=torch.bool)
        for where, rows in zip(self.where, self.kept.late, strict=True):
            full[where] = True
            full[where[rows]] = False
        full[self.fixed] = False
        return full[self.columns]


def _hiding(hidden: Tensor, tables: Any) -> Callable[..., Any]:
    """A hook that hides columns from everybody but themselves, and rotates by other tables if there are any."""

    def hook(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        kwargs["position_embeddings"] = tables or kwargs["position_embeddings"]
        length = len(hidden)
        mask = kwargs.get("attention_mask")
        if mask is None:
            seen = torch.ones(length, length, dtype=torch.bool).tril()[None, None]
        else:
            seen = mask if mask.dtype is torch.bool else mask > -1
        seen = seen & (~hidden | torch.eye(length, dtype=torch.bool))
        low = torch.finfo(torch.float32).min
        kwargs["attention_mask"] = torch.where(seen, 0.0, low)
        return args, kwargs

    return hook


def _mask(kept: Tensor, total: int) -> Tensor:
    return torch.zeros(total, dtype=torch.bool).index_fill_(0, kept, True)
