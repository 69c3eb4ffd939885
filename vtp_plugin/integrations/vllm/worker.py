"""The cuts inside a vLLM worker, made by the code that also serves transformers (`surgery.vision`).

vLLM's vision towers have the parts of transformers' ones, except that q, k and v come out of one matrix whose heads are
spread over the tensor-parallel workers. Every worker gathers the heads, so every worker makes the same decision.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from vllm.distributed import tensor_model_parallel_all_gather

from vtp_plugin.adapter import Adapter, SharedSpace, Tower
from vtp_plugin.adapters.clip import ClipSpace, checkpoint_of
from vtp_plugin.integrations.vllm.plan import Plan
from vtp_plugin.integrations.vllm.processing import as_text
from vtp_plugin.pruning import Pruned
from vtp_plugin.stages import Stage
from vtp_plugin.strategy import PruningStrategy
from vtp_plugin.surgery.call import Image
from vtp_plugin.tokens import Selection, VisualTokens


class Part:
    """`q_proj` or `k_proj` of an attention module whose projections are fused: all heads, wherever they live."""

    def __init__(self, attention: nn.Module, number: int) -> None:
        self.attention, self.number = attention, number

    def __call__(self, hidden: Tensor) -> Tensor:
        """[B, L, D] -> [B, L, H d]."""
        part = self.attention.qkv_proj(hidden)[0].chunk(3, dim=-1)[self.number]
        return tensor_model_parallel_all_gather(part) if self.attention.tp_size > 1 else part


class Parts(Adapter):
    """A model inside vLLM: where its parts are."""

    family = "vllm"
    models = "a model inside vLLM"
    stages = {stage: "" if stage is not Stage.LLM else "the attention metadata is fixed before" for stage in Stage}
    language_model = None
    decoder_layers = ()

    def __init__(self, model: nn.Module, tower: Tower, projector: nn.Module, processor: Any) -> None:
        super().__init__(model, processor)
        self.tower, self.projector = tower, projector
        for block in tower.blocks:
            fused = getattr(block, tower.attention)
            fused.q_proj, fused.k_proj = Part(fused, 0), Part(fused, 1)

    @classmethod
    def matches(cls, model: nn.Module) -> bool:
        """Never: vLLM's classes bring it themselves."""
        return False

    def install(self, pruned: Pruned, undo: Any) -> None:
        """Nothing to wrap: the model is a class of ours."""

    def shared_space(self, checkpoint: str | None) -> SharedSpace:
        config, weight = self.model.config, self.tower.patch_embedding.weight
        checkpoint = checkpoint or getattr(config, "mm_vision_tower", None) or checkpoint_of(config.vision_config)
        return ClipSpace(checkpoint, config.vision_config.hidden_size, weight.device, weight.dtype)


class Shipped(PruningStrategy):
    """What the processor decided from the raw pixels, before the first block of the tower."""

    stage = Stage.VIT
    paper = "none"
    budgeted = False

    def __init__(self, strategies: Sequence[PruningStrategy]) -> None:
        super().__init__()
        self.name = "+".join(s.name for s in strategies)
        self.keep: Tensor | None = None  # [B, N] bool, of the images in the tower

    def select(self, visual: VisualTokens) -> Selection:
        return Selection(self.keep.to(visual.tokens.device).gather(1, visual.index))


class Served(Pruned):
    """The strategies on one worker's model."""

    def __init__(self, model: nn.Module, adapter: Parts, plan: Plan, at_once: int) -> None:
        self.shipped = Shipped(plan.decided) if plan.decided else None
        self.at_once = 1 if plan.decided else at_once  # images per pass of the tower
        super().__init__(model, adapter, [*([self.shipped] if self.shipped else []), *plan.late], measure=False)

    @property
    def device(self) -> torch.device:
        """What the clock waits for: a server does not stop its GPU to time a selector."""
        return torch.device("cpu")

    def embed(
        self, encode: Callable[..., Any], pixels: Tensor, keep: Any = None, questions: Any = None
    ) -> list[Tensor]:
        """Features of images [B, 3, H, W] as the language model gets them, per image [K, L]."""
        rows, columns = self.adapter.tower.grid
        raster = torch.arange(rows * columns, device=pixels.device)
        texts = [""] * len(pixels) if questions is None else [as_text(question) for question in questions]
        features: list[Tensor] = []
        with self.calling() as call:
            call.images = [Image(total=len(raster), index=raster, question=text) for text in texts]
            for batch in self._batches(len(pixels)):
                if self.shipped is not None:
                    self.shipped.keep = torch.stack([keep[number] for number in batch])
                with call.in_tower(batch):
                    features.extend(encode(pixel_values=pixels[batch]))
        return features

    def _batches(self, images: int) -> Iterator[list[int]]:
        for first in range(0, images, self.at_once):
            yield list(range(images))[first : first + self.at_once]
