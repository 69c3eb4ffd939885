"""LLaVA-1.5 in the authors' package (`llava-torch`): CLIP tower, MLP projector, LLaMA.

One image is one placeholder id (-200) that `prepare_inputs_labels_for_multimodal` replaces by the image's features; it
follows the number of rows that `encode_images` returns. Batches are padded on the
left while a pruned model runs, because the package's default side is wrong for every row but the longest.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from vtp_plugin.adapter import Adapter, SharedSpace
from vtp_plugin.adapters.clip import ClipSpace, clip_tower
from vtp_plugin.adapters.llava_prompt import PLACEHOLDER, placeholders, plain, show, spread
from vtp_plugin.errors import PruningError
from vtp_plugin.hosts.llava import contract, frozen
from vtp_plugin.signals import reads_question
from vtp_plugin.stages import Stage
from vtp_plugin.surgery import answers, asking, cache, lengths, losses, masks, spoken, turns
from vtp_plugin.surgery.binding import bound
from vtp_plugin.surgery.call import Call, Image
from vtp_plugin.surgery.columns import Columns
from vtp_plugin.surgery.placeholders import Read
from vtp_plugin.surgery.positions import lookup
from vtp_plugin.surgery.question import question_of
from vtp_plugin.surgery.session import Session
from vtp_plugin.surgery.turns import Turn
from vtp_plugin.surgery.undo import Undo


class Llava(Adapter):
    """The authors' LLaVA-1.5."""

    family = "llava"
    touches = contract.MODEL
    models = "LLaVA-1.5 (llava-torch)"
    names = tuple(f"Llava{decoder}ForCausalLM" for decoder in ("Llama", "Mistral", "Mpt", "Qwen", "Mixtral", "Gemma"))
    stages = dict.fromkeys(Stage, "")
    every_logit = True
    uniform = True

    def __init__(self, model: nn.Module, processor: Any = None) -> None:
        super().__init__(model, processor)
        vision = model.get_vision_tower()
        self.tower = clip_tower(vision.vision_tower, vision.select_layer)
        self.projector = model.get_model().mm_projector
        self.language_model = model.get_model()
        self.decoder_layers = self.language_model.layers

    @classmethod
    def unlike(cls, model: nn.Module) -> str:
        if type(model).__name__ != "LlavaLlamaForCausalLM":
            return "of its language models only LLaMA is possible yet (LlavaLlamaForCausalLM)"
        if not hasattr(model, "prepare_inputs_labels_for_multimodal"):
            return "it has no prepare_inputs_labels_for_multimodal: it is not from llava-torch"
        vision, aspect = model.get_vision_tower(), getattr(model.config, "image_aspect_ratio", None) or ""
        if type(vision).__name__ != "CLIPVisionTower":
            return f"its vision tower is {type(vision).__name__}, only CLIPVisionTower is possible yet"
        if not vision.is_loaded:
            return "its vision tower is not loaded: call model.get_vision_tower().load_model() first"
        if vision.select_feature != "patch":
            return f"it projects mm_vision_select_feature={vision.select_feature!r}, only 'patch' is possible yet"
        if aspect.startswith(("anyres_", "highres", "crop_split")):
            return f"its image_aspect_ratio is {aspect!r}, only pad, square and anyres are possible yet"
        return ""

    @classmethod
    def tokens_in(cls, config: Mapping[str, Any]) -> int | None:
        return None if config.get("image_aspect_ratio") == "anyres" else super().tokens_in(config)

    def install(self, pruned: Session, undo: Undo) -> None:
        self.pruned = pruned
        model = self.model
        frozen.serve(model, undo)
        self.generate = undo.override(model, "generate", self._generate)
        self.forward = undo.override(model, "forward", self._forward)
        self.encode = undo.override(model, "encode_images", self._encode)
        self.merge = undo.override(model, "prepare_inputs_labels_for_multimodal", self._merge)

    @property
    def image_processor(self) -> Any:
        """The processor that was given, or the tower's own."""
        return super().image_processor or self.model.get_vision_tower().image_processor

    # -- the host's entry points ----------------------------------------------------------------------------------

    def _generate(self, *args: Any, **kwargs: Any) -> Any:
        if self.pruned.call is not None:
            return self.generate(*args, **kwargs)
        ids, images = args[0] if args else kwargs.get("inputs"), args[1] if args[1:] else kwargs.get("images")
        asking.check(self.pruned, kwargs | {"input_ids": ids}, images is not None, generating=True)
        with self.pruned.calling() as call, self._left_padding(), masks.translated(self.model, call):
            call.rows, self.by_column = 1 if ids is None else len(ids), False
            with lengths.of_the_whole_prompt(self.model, call), spoken.generating():
                return self.generate(*args, **kwargs)

    def _forward(self, *args: Any, **kwargs: Any) -> Any:
        call = self.pruned.call
        if call is not None:
            return self._pass(call, args, kwargs)
        with self.pruned.alone():
            inputs = bound(self.forward, args, kwargs)
            turn = turns.recall(inputs)
            if turn is not None:
                return self._continued(turn, inputs)
            asking.check(self.pruned, inputs, inputs.get("images") is not None, generating=False)
            if inputs.get("images") is None:
                return self.forward(**inputs)
            self.by_column = inputs.get("position_ids") is None
            with self.pruned.calling() as call:
                late = any(s.stage is Stage.LLM for s in self.pruned.strategies)
                with losses.translated(self.model, late and inputs.get("labels") is not None, partial(_narrowed, call)):
                    return self._remembered(call, self.forward(**inputs))

    def _pass(self, call: Call, args: Any, kwargs: dict[str, Any]) -> Any:
        """One pass inside of a `generate`: the prefill, behind it, or of a prompt of somebody else's (guidance)."""
        if torch.compiler.is_compiling() or not call.images:
            return self.forward(*args, **kwargs)
        inputs = bound(self.forward, args, kwargs)
        if inputs.get("inputs_embeds") is not None:
            return self._remembered(call, self.forward(**inputs))
        if turns.recall(inputs) is call.turn is not None:
            return self.forward(**inputs)
        with self.pruned.aside():
            return self.forward(**inputs)

    def _remembered(self, call: Call, output: Any) -> Any:
        """The output; its cache says what it holds. The package's columns are those of the merged prompt."""
        columns = Columns.whole(*call.valid.shape, call.valid.device)
        call.turn = Turn(self.pruned.number, columns.columns, call.valid, columns, None, untouched=True)
        call.turn.facts = {name: getattr(call, name) for name in ("images", "valid", "cuts", "positions")}
        if hasattr(output, "keys"):
            turns.remember(cache.of_output(output), call.turn)
        return output

    def _continued(self, turn: Turn, inputs: dict[str, Any]) -> Any:
        """A pass of the caller's own over a cache that holds a pruned prompt."""
        if turn.owner != self.pruned.number:
            raise PruningError(turns.OTHERWISE)
        if inputs.get("images") is not None and inputs["input_ids"].shape[1] > 1:
            asking.refuse_filled_cache(cache.given(inputs))
        queries = inputs["input_ids"].shape[1]
        left = turn.behind(len(inputs["input_ids"]), queries, turns.stored_length(cache.given(inputs)))
        if inputs.get("attention_mask") is not None:
            left.mask(inputs["attention_mask"], queries)
        with self.pruned.going_on(turn.call(len(inputs["input_ids"]))):
            return self.forward(**inputs)

    def _merge(
        self,
        input_ids: Tensor,
        position_ids: Tensor | None,
        attention_mask: Tensor | None,
        past_key_values: Any,
        labels: Tensor | None,
        images: Any,
        image_sizes: Any = None,
    ) -> tuple[Any, ...]:
        """The host's merge of text and features, with pruned features; remembers where they went."""
        call, rest = self.pruned.call, (position_ids, attention_mask, past_key_values, labels)
        if images is None or input_ids.shape[1] == 1:
            return self.merge(input_ids, *rest, images, image_sizes)
        if call is None:
            if self.pruned.strategies:
                raise PruningError(
                    "images were merged into a prompt by hand, where nothing is pruned: give them to the model"
                )
            return self.merge(input_ids, *rest, images, image_sizes)
        asking.refuse_filled_cache(past_key_values)
        real = torch.ones_like(input_ids, dtype=torch.bool) if attention_mask is None else attention_mask.bool()
        read = Read.of(input_ids, real, {})
        prompts = [row[mask] for row, mask in zip(read.ids, read.real, strict=True)]
        if attention_mask is None and self.uneven:
            rest = (position_ids, real, past_key_values, labels)
        merged = self._merged(call, prompts, (input_ids, *rest), images, image_sizes)
        self._place(call, prompts, merged[4].shape[1], self._sources(call))
        return merged

    @property
    def uneven(self) -> bool:
        """Whether equally long prompts may come out of the merge with unequal lengths."""
        return self.pruned.one_by_one

    def _merged(self, call: Call, prompts: Sequence[Tensor], text: Any, images: Any, sizes: Any) -> tuple[Any, ...]:
        """The host's merge of `text` (its first arguments) with pruned features; sets the images."""
        images = plain(images)
        raster = torch.arange(self.tower.grid[0] * self.tower.grid[1], device=images.device)
        owners, questions = self._owners(prompts, len(images)), self._questions(prompts)
        call.images = [Image(total=len(raster), index=raster, sample=row, question=questions[row]) for row in owners]
        return self.merge(*text, images, sizes)

    def _sources(self, call: Call) -> list[Tensor]:
        """Per image [n] long, which of the rows that the host makes each of its rows stands for, -1 for none."""
        return [image.index for image in call.images]

    def _encode(self, images: Tensor) -> Tensor | list[Tensor]:
        """Projected features of images [B, 3, H, W]: [B, K, D], or a list where the images keep unequal numbers."""
        call = self.pruned.call
        if call is None:
            return self.encode(images)
        features: list[Tensor] = []
        for part in images.split(1 if self.pruned.one_by_one else len(images)):
            with call.in_tower(range(len(features), len(features) + len(part))):
                features.extend(self.encode(part))
        return torch.stack(features) if len({len(rows) for rows in features}) == 1 else features

    # -- one image ------------------------------------------------------------------------------------------------

    def _owners(self, prompts: Sequence[Tensor], given: int) -> list[int]:
        """The prompt [L] of every image; one without a placeholder still consumes an image, as in the host."""
        owners = [row for row, ids in enumerate(prompts) for _ in range(max(1, placeholders(ids)))]
        if len(owners) != given:
            raise PruningError(f"the prompts ask for {len(owners)} images, {given} were given")
        return owners

    def _questions(self, prompts: Sequence[Tensor]) -> list[str]:
        """The question of every prompt [L]; empty texts where no strategy reads them."""
        if not reads_question(self.pruned.strategies):
            return [""] * len(prompts)
        return [question_of(self.decode(ids[ids != PLACEHOLDER])) for ids in prompts]

    def _place(self, call: Call, prompts: Sequence[Tensor], length: int, sources: Sequence[Tensor]) -> None:
        """Tell the call where the images are in the merged prompts [B, length]; `sources` are those of `_sources`."""
        left, device = getattr(self.model.config, "tokenizer_padding_side", "right") == "left", sources[0].device
        text, real = torch.zeros(2, len(prompts), length, dtype=torch.long)
        spans, wholes, starts, totals, longest = [], [], [], [], self._longest
        images = zip(call.images, map(len, sources), strict=True)
        for row, ids in enumerate(prompts):
            used = [next(images) for _ in range(max(1, placeholders(ids)))]
            own, found, whole = spread(ids, [(image.total, left_of) for image, left_of in used])
            total = min(len(own), length)
            start = length - total if left else 0
            real[row, start : start + total] = 1
            text[row, start : start + total] = own[:total]
            spans += [(row, start + min(a, total), start + min(b, total)) for a, b in found or [(0, 0)]]
            wholes.append(min(whole, longest or whole))
            totals.append(total)
            starts.append(whole + start * self.by_column)
        there = torch.cat([text, real, torch.tensor(starts)[:, None]], 1).to(device)  # one copy
        positions, valid, ends = there[:, :length].clone(), there[:, length:-1].bool(), there[:, -1]
        for (row, a, b), source in zip(spans, sources, strict=True):
            positions[row, a:b] += source[: b - a].clamp(min=0)
        columns = [torch.arange(a, b, device=device) for _, a, b in spans]
        call.place(valid, columns, [image.sample for image in call.images], totals)
        last = [length if left else total for total in totals]
        late = any(strategy.stage is Stage.LLM for strategy in self.pruned.strategies)
        for image, source, (row, _, end) in zip(call.images, sources, spans, strict=True):
            show(image, len(source), speaks=late and end == last[row])
        call.dropped = max(wholes) - length
        if self.pruned.positions.prompt == "original":
            self._keep_positions(call, positions, ends)

    @property
    def _longest(self) -> int | None:
        """Columns to which the host truncates a merged prompt, if it does."""
        return getattr(self.model.config, "tokenizer_model_max_length", None)

    def _keep_positions(self, call: Call, positions: Tensor, lengths: Tensor) -> None:
        """What the host counts: real tokens when generating, columns in a plain forward."""
        counted = torch.ones_like(call.valid) if self.by_column else call.valid
        if self.by_column:  # padding in front moves a row as a whole
            positions = positions + call.valid.long().argmax(1, keepdim=True)
        call.positions = lookup(positions, counted, lengths)

    @contextmanager
    def _left_padding(self) -> Iterator[None]:
        with Undo() as undo:
            config = self.model.config
            if not hasattr(config, "tokenizer_padding_side"):
                config.tokenizer_padding_side = "right"
                undo.callback(delattr, config, "tokenizer_padding_side")
            undo.override(config, "tokenizer_padding_side", "left")
            yield

    # -- facts ----------------------------------------------------------------------------------------------------

    def shared_space(self, checkpoint: str | None) -> SharedSpace:
        vision = self.model.get_vision_tower()
        checkpoint = checkpoint or self.model.config.mm_vision_tower
        return ClipSpace(checkpoint, vision.hidden_size, vision.device, vision.dtype)


def _narrowed(call: Call, logits: Tensor, arguments: dict[str, Any]) -> tuple[Tensor, dict[str, Any]]:
    """What the host's loss is asked about where the last layers see less than the merged prompt."""
    whole = Columns.whole(*call.valid.shape, logits.device)
    return logits, losses.narrowed(arguments, answers.seen(call, whole), 0, logits.shape[1])
