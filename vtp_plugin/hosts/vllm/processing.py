"""The multi-modal processor of a pruned model, in the process that takes requests.

It puts one placeholder into the prompt for every token that will be kept, asks the strategies that look at raw pixels,
and ships their answers and the question as fields of the image. The configuration and, where a strategy reads it, the
question are part of the image's hash: neither the encoder cache nor the prefix cache mixes them up.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from vllm.multimodal.inputs import MultiModalFieldConfig
from vllm.multimodal.parse import DictEmbeddingItems, ImageEmbeddingItems
from vllm.multimodal.processing import PromptReplacement

from vtp_plugin.errors import PruningError
from vtp_plugin.hosts.vllm.plan import KEY, Plan
from vtp_plugin.surgery.pixels import Pixels, patches, watch
from vtp_plugin.surgery.question import framed, question_of

KEEP = "vtp_keep"  # [N] bool: the patches that pixel strategies leave
QUESTION = "vtp_question"  # in mm_processor_kwargs: text; as a field: its UTF-8 bytes


class CountsKept:
    """Mixed into a family's processing info, which has `plan`."""

    plan: Plan

    def get_num_image_tokens(self, **size: int) -> int:
        return self.plan.count(super().get_num_image_tokens(**size))

    def get_mm_max_tokens_per_item(self, seq_len: int, mm_counts: Mapping[str, int]) -> Mapping[str, int]:
        """An image of which pixel strategies leave everything; a blank one, which vLLM would try, loses most."""
        return {"image": self.get_max_image_tokens()}


class Decides:
    """Mixed into a family's multi-modal processor."""

    values = "pixel_values"  # field of an image

    def __init__(self, info: Any, dummy_inputs: Any, **kwargs: Any) -> None:
        super().__init__(info, dummy_inputs, **kwargs)
        self.plan: Plan = info.plan
        if self.plan.decided:
            self.pixels = self._pixels()

    def _pixels(self) -> Pixels:
        """The way back to raw pixels, of the image processor that is watched."""
        processor = self.info.get_hf_processor().image_processor
        pixels = Pixels.of(processor)
        watch(processor, lambda images, outputs, seconds: pixels.remember(outputs))  # for bf16, see Pixels
        return pixels

    def apply(self, inputs: Any, timing_ctx: Any) -> Any:
        """Put what the kept tokens depend on, beside the picture, into the arguments that are hashed with it."""
        if isinstance(inputs.mm_data_items.get("image"), (ImageEmbeddingItems, DictEmbeddingItems)):
            raise PruningError("image embeddings cannot be pruned: send the picture")
        said = {**inputs.hf_processor_mm_kwargs, KEY: self.plan.fingerprint}
        if self.plan.reads_question and QUESTION not in said:
            said[QUESTION] = question_of(framed(self.info.get_tokenizer(), inputs.prompt))
        return super().apply(replace(inputs, hf_processor_mm_kwargs=said), timing_ctx)

    def _apply_hf_processor_main(self, mm_items: Any, hf_kwargs: Mapping[str, object]) -> Any:
        outputs = super()._apply_hf_processor_main(mm_items, theirs(hf_kwargs))
        if self.values not in outputs:  # every picture was seen before
            return outputs
        if self.plan.decided:
            outputs[KEEP] = self._decisions(outputs)
        if self.plan.reads_question:
            outputs[QUESTION] = [as_bytes(str(hf_kwargs[QUESTION]))] * len(outputs[self.values])
        return outputs

    def _decisions(self, outputs: Any) -> Sequence[Tensor]:
        """What the pixel strategies leave of every image in the image processor's outputs, [N] or [tiles, N] bool."""
        images = self.pixels.images(outputs[self.values])
        return [self.plan.decide(patches(image[None], self.plan.patch)) for image in images]

    def _get_mm_fields_config(self, hf_inputs: Any, hf_processor_mm_kwargs: Any) -> Mapping[str, MultiModalFieldConfig]:
        ours = {name: MultiModalFieldConfig.batched("image", keep_on_cpu=True) for name in (KEEP, QUESTION)}
        return {**super()._get_mm_fields_config(hf_inputs, hf_processor_mm_kwargs), **ours}

    def _get_prompt_updates(self, mm_items: Any, hf_processor_mm_kwargs: Any, out_mm_kwargs: Any) -> Sequence[Any]:
        if not self.plan.decided:  # one number for every image: the processing info says it
            return super()._get_prompt_updates(mm_items, hf_processor_mm_kwargs, out_mm_kwargs)
        token = self.info.get_hf_config().image_token_index

        def placeholders(number: int) -> list[int]:
            keep = out_mm_kwargs["image"][number][KEEP].data
            return [token] * self.plan.count(int(keep.sum()))

        return [PromptReplacement(modality="image", target=[token], replacement=placeholders)]


def theirs(arguments: Mapping[str, object]) -> dict[str, object]:
    """What vLLM and transformers know among a processor's arguments."""
    return {name: value for name, value in arguments.items() if name not in (KEY, QUESTION)}


def as_bytes(text: str) -> Tensor:
    """A text as a field of an image, [bytes] uint8; one zero byte stands for an empty one."""
    return torch.tensor(list(text.encode() or b"\0"), dtype=torch.uint8)


def as_text(field: Tensor) -> str:
    """The way back."""
    return bytes(field.tolist()).strip(b"\0").decode()
