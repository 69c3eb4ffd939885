"""The cuts inside a vLLM worker, made by the code that also serves transformers (`surgery.vision`).

vLLM's vision towers have the parts of transformers' ones, except that q, k and v come out of one matrix whose heads are
spread over the tensor-parallel workers. Every worker gathers the heads, so every worker makes the same decision.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from vllm.distributed import tensor_model_parallel_all_gather
from vllm.model_executor.models.clip import CLIPVisionModel
from vllm.model_executor.models.utils import maybe_prefix
from vllm.transformers_utils.processor import cached_image_processor_from_config

from vtp_plugin.adapter import Adapter
from vtp_plugin.adapters.clip import ClipSpace, checkpoint_of, clip_tower
from vtp_plugin.errors import PruningError
from vtp_plugin.facts.tower import SharedSpace, Tower
from vtp_plugin.hosts.vllm.plan import Plan
from vtp_plugin.hosts.vllm.processing import KEEP, QUESTION, as_text
from vtp_plugin.pruning import Pruned
from vtp_plugin.stages import Stage
from vtp_plugin.strategy import PruningStrategy
from vtp_plugin.surgery.call import Call, Image
from vtp_plugin.surgery.rows import RowsLate
from vtp_plugin.surgery.undo import Undo
from vtp_plugin.tokens import Selection, VisualTokens


class Part:
    """`q_proj`, `k_proj` or `v_proj` of an attention whose projections are fused: all heads, wherever they live."""

    def __init__(self, attention: nn.Module, fused: str, number: int) -> None:
        self.attention, self.fused, self.number = attention, fused, number

    def __call__(self, hidden: Tensor) -> Tensor:
        """[B, L, D] -> [B, L, H d]."""
        part = getattr(self.attention, self.fused)(hidden)[0].chunk(3, dim=-1)[self.number]
        return tensor_model_parallel_all_gather(part.contiguous()) if self.attention.tp_size > 1 else part


def separate(tower: Tower, fused: str = "qkv_proj") -> None:
    """Let the attention of a tower have `q_proj`, `k_proj` and `v_proj`, as it has in transformers."""
    for number in range(len(tower.blocks)):
        module = tower.attention_of(number)
        module.q_proj, module.k_proj, module.v_proj = (Part(module, fused, part) for part in range(3))


class Parts(Adapter):
    """A model inside vLLM: where its parts are."""

    family = "vllm"
    models = "a model inside vLLM"
    stages = {stage: "" if stage is not Stage.LLM else "the attention metadata is fixed before" for stage in Stage}
    language_model = None
    decoder_layers = ()
    packed = False  # whether images that keep unequal numbers pass the tower together

    def __init__(self, model: nn.Module, tower: Tower, projector: nn.Module, processor: Any) -> None:
        super().__init__(model, processor)
        self.tower, self.projector = tower, projector

    @classmethod
    def matches(cls, model: nn.Module) -> bool:
        """Never: vLLM's classes bring it themselves."""
        return False

    def install(self, pruned: Pruned, undo: Any) -> None:
        """Nothing to wrap: the model is a class of ours."""
        self.pruned = pruned

    @abstractmethod
    def images(self, inputs: Mapping[str, Any]) -> list[Image]:
        """The images of a call before the tower has run."""

    @abstractmethod
    def encode(self, call: Call, encode: Callable[..., Any], inputs: Mapping[str, list[Tensor]]) -> Iterable[Tensor]:
        """The rows that are left of every image in the tower."""


class ClipParts(Parts):
    """A model with a CLIP tower and images of one tile."""

    def __init__(self, model: nn.Module, tower: Tower, projector: nn.Module, processor: Any) -> None:
        super().__init__(model, tower, projector, processor)
        separate(tower)

    def images(self, inputs: Mapping[str, Any]) -> list[Image]:
        """[3, H, W] each."""
        rows, columns = self.tower.grid
        raster = torch.arange(rows * columns, device=inputs["pixel_values"][0].device)
        return [Image(total=len(raster), index=raster) for _ in inputs["pixel_values"]]

    def encode(self, call: Call, encode: Callable[..., Any], inputs: Mapping[str, list[Tensor]]) -> Iterable[Tensor]:
        """Hooks cut on the way."""
        return encode(pixel_values=torch.stack(inputs["pixel_values"]))

    def shared_space(self, checkpoint: str | None) -> SharedSpace:
        config, weight = self.model.config, self.tower.patch_embedding.weight
        checkpoint = checkpoint or getattr(config, "mm_vision_tower", None) or checkpoint_of(config.vision_config)
        return ClipSpace(checkpoint, config.vision_config.hidden_size, weight.device, weight.dtype)


class ServedLate(RowsLate):
    """Cuts rows of the prompt. vLLM may call the `forward` of a merger past its hooks."""

    def install(self, undo: Undo) -> None:
        if self.vision.at(Stage.PROJECTOR):
            self.forward = undo.override(self.family.projector, "forward", self._merging)

    def _merging(self, entering: Tensor, *args: Any, **kwargs: Any) -> Any:
        self._projecting(self.family.projector, (entering, *args), kwargs)
        return self.forward(entering, *args, **kwargs)


class Shipped(PruningStrategy):
    """What the processor decided from the raw pixels, before the first block of the tower."""

    stage = Stage.VIT
    paper = "none"
    budgeted = False

    def __init__(self, strategies: Sequence[PruningStrategy]) -> None:
        super().__init__()
        self.name = "+".join(s.name for s in strategies)
        self.keep: Iterator[Tensor] = iter(())  # [N] bool each, of the tiles in the tower

    def select(self, visual: VisualTokens) -> Selection:
        keep = torch.stack([next(self.keep) for _ in visual.index])
        return Selection(keep.to(visual.tokens.device).gather(1, visual.index))


class Served(Pruned):
    """The strategies on one worker's model."""

    def __init__(self, model: nn.Module, adapter: Parts, plan: Plan, room: int) -> None:
        self.shipped = Shipped(plan.decided) if plan.decided else None
        alone = plan.decided and not adapter.packed
        self.room = 0 if alone else room  # tokens per pass of the tower; a larger image goes alone
        super().__init__(model, adapter, [*([self.shipped] if self.shipped else []), *plan.late], measure=False)
        self.finished.clear()  # what was saved is counted where requests are, not on a worker

    def embed(
        self, encode: Callable[..., Any], inputs: Mapping[str, Any], keep: Any = None, questions: Any = None
    ) -> list[Tensor]:
        """Features of images as the language model gets them, per image [K, L]; `inputs` as vLLM encodes them."""
        features: list[Tensor] = []
        with self.calling() as call:
            call.images = self.adapter.images(inputs)
            texts = [""] * len(call.images) if questions is None else [as_text(question) for question in questions]
            for image, text in zip(call.images, texts, strict=True):
                image.question = text
            for batch in self._batches(call.images):
                if self.shipped is not None:
                    self.shipped.keep = iter([tile for number in batch for tile in torch.atleast_2d(keep[number])])
                with call.in_tower(batch):
                    chosen = {name: [values[number] for number in batch] for name, values in inputs.items()}
                    features.extend(self.adapter.encode(call, encode, chosen))
        return features

    def _batches(self, images: Sequence[Image]) -> Iterator[list[int]]:
        batch, tokens = [], 0
        for number, image in enumerate(images):
            size = image.total or image.patches
            if batch and tokens + size > self.room:
                yield batch
                batch, tokens = [], 0
            batch.append(number)
            tokens += size
        yield batch


class Around:
    """Mixed into a model class of vLLM: what it could do, but not with fewer tokens."""

    supports_tower_connector_lora = False  # its bookkeeping takes the tower's length from the prompt
    supports_encoder_cudagraph = False  # graphs of the tower go past `embed_multimodal`

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        if vllm_config.compilation_config.compile_mm_encoder:
            raise PruningError("compile_mm_encoder is not possible with pruning: compiled blocks are read by nobody")
        super().__init__(vllm_config=vllm_config, prefix=prefix)


class AroundClip(Around):
    """Mixed into a LLaVA of vLLM with a CLIP tower: attaches the strategies, and serves what they leave."""

    parts: type[ClipParts] = ClipParts

    def attach(self, vllm_config: Any, prefix: str, plan: Plan) -> None:
        """Called once the model has its modules, before its weights are loaded."""
        if not isinstance(self.vision_tower, CLIPVisionModel):
            return  # --limit-mm-per-prompt image=0: no tower, no picture
        layer = -1  # of a tower that ends with the projected block
        if plan.whole_tower:
            layer = self.config.vision_feature_layer
            with self._mark_tower_model(vllm_config, "image"):
                self.vision_tower = CLIPVisionModel(
                    self.config.vision_config,
                    quant_config=vllm_config.quant_config,
                    require_post_norm=True,
                    prefix=maybe_prefix(prefix, "vision_tower"),
                )
        self._select = [layer] if plan.whole_tower else None
        processor = cached_image_processor_from_config(vllm_config.model_config)
        tower = clip_tower(self.vision_tower, layer)
        parts = self.parts(self, tower, self.multi_modal_projector, processor)
        self.vtp = Served(self, parts, plan, vllm_config.scheduler_config.max_num_batched_tokens)

    def _image_pixels_to_features(self, vision_tower: Any, pixel_values: Tensor) -> Tensor:
        strategy = self.config.vision_feature_select_strategy
        return vision_tower(pixel_values, select_layers=self._select, feature_select_strategy=strategy)

    def embed_multimodal(self, **kwargs: Any) -> Any:
        keep, questions = kwargs.pop(KEEP, None), kwargs.pop(QUESTION, None)
        return self.vtp.embed(super().embed_multimodal, kwargs, keep, questions)
