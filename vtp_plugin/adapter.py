"""The abstraction that every model family fills in: where its parts are, and what one image is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from torch import Tensor, nn

from vtp_plugin.errors import PruningError
from vtp_plugin.metrics.flops import Costs
from vtp_plugin.stages import Stage

if TYPE_CHECKING:
    from vtp_plugin.pruning import Pruned
    from vtp_plugin.surgery.call import Image
    from vtp_plugin.surgery.undo import Undo
    from vtp_plugin.surgery.vision import VisionCuts


@dataclass(frozen=True)
class Tower:
    """The parts of a vision transformer."""

    module: nn.Module  # called once per batch of images
    embeddings: nn.Module  # pixel values -> [B, prefix + N, D], position embeddings added
    patch_embedding: nn.Module  # pixel values -> [B, D, rows, columns]
    blocks: Sequence[nn.Module]  # each with `self_attn` (q_proj, k_proj, head_dim)
    post_layernorm: nn.Module | None
    prefix: int  # tokens in front of the patches: 1 for a class token, 0 if there is none
    grid: tuple[int, int]
    patch_size: int
    projected: int  # block whose output is projected, negative counts from the last
    attention: str = "self_attn"  # where a block's attention is
    between: tuple[str, str] | None = None  # a block's norm behind its attention, and the MLP behind that norm
    block: int = 1  # side of the square of patches that becomes one token of the prompt: dropped as a whole


class SharedSpace(Protocol):
    """CLIP's joint space of patches and questions, from the checkpoint that the vision tower comes from."""

    segments: bool  # what becomes of questions above the text tower's length: mean over pieces, else truncated

    def text(self, questions: Sequence[str]) -> Tensor:
        """Text embeddings [B, E] fp32."""

    def patches(self, normed: Tensor) -> Tensor:
        """Visual projection of post-layer-normed patches, [B, N, D] -> [B, N, E] fp32."""

    def text_macs(self, questions: Sequence[str]) -> int:
        """Multiply-accumulates of the text tower for these questions."""


class Adapter(ABC):
    """One model family. Attributes are the model's own parts; methods are facts about the family.

    `stages` maps every stage to "" if the family supports it, else to the reason why not.
    """

    family: ClassVar[str]
    models: ClassVar[str]  # what users know it as
    names: ClassVar[tuple[str, ...]] = ()  # of the model classes
    facts: ClassVar[Mapping[str, Any]] = {}  # paths in the configuration -> the value, or the type, that is known here
    stages: ClassVar[Mapping[Stage, str]]
    overview: ClassVar[int] = 0  # the tile that shows the whole picture, where an image has several; -1: the last

    several_views: ClassVar[bool] = False  # whether it says how sub-images lie, `Image.views`, behind such a tile 0

    tower: Tower
    projector: nn.Module
    language_model: nn.Module | None  # None: an encoder without a language model
    decoder_layers: Sequence[nn.Module]
    default_positions: str = "compact"  # of a shortened prompt, where neither the user nor the method says
    fixed_positions: str = ""  # why the prompt has no positions to choose from
    every_logit: bool = False  # whether its prefill computes the logits of all columns, not only of the last
    first_cut: int = 1  # the first decoder layer that may see fewer tokens than the one before

    def __init__(self, model: nn.Module, processor: Any = None) -> None:
        self.model, self.processor = model, processor

    @classmethod
    def matches(cls, model: nn.Module) -> bool:
        """Whether this model is of the family. Must not import the family's package."""
        return type(model).__name__ in cls.names and not cls.unlike(model)

    @classmethod
    def unlike(cls, model: nn.Module) -> str:
        """How a model of one of the classes differs from what is known of the family; "" if it does not."""
        for path, known in cls.facts.items():
            found = getattr(model, "config", None)
            for part in path.split("."):
                found = getattr(found, part, None)
            if not (isinstance(found, known) if isinstance(known, type) else found == known):
                wanted = {int: "a whole number"}.get(known, repr(known))
                return f"its configuration has {path}={found!r}, only {wanted} is possible yet"
        return ""

    @abstractmethod
    def install(self, pruned: Pruned, undo: Undo) -> None:
        """Wrap the model's entry points, on the instance, so that every call becomes a `Call` of `pruned`."""

    def vision(self, pruned: Pruned) -> VisionCuts:
        """The cuts before, in and behind the vision tower."""
        from vtp_plugin.surgery.vision import VisionCuts

        return VisionCuts(pruned, self.tower, self.projector)

    def shared_space(self, checkpoint: str | None) -> SharedSpace:
        """CLIP's joint space, from `checkpoint` or the tower's own; PruningError if the tower has none."""
        raise PruningError(
            f"{self.family} has no CLIP text encoder that matches its vision tower: text_encoder=llm compares with the "
            f"language model's embeddings of the question instead"
        )

    # -- what FLOPs are counted from ------------------------------------------------------------------------------

    @cached_property
    def costs(self) -> Costs:
        """What the parts cost per token."""
        return Costs.of(self)

    @property
    def projectors(self) -> Sequence[nn.Module]:
        """The modules that make prompt rows of the tower's tokens, row by row."""
        return (self.projector,)

    def sequences(self, image: Image) -> Sequence[Sequence[int]]:
        """Per block of the tower, the lengths of the sequences that an unpruned image is for it."""
        length = (image.patches or image.total) // image.tiles + self.tower.prefix
        return [[length] * image.tiles] * len(self.tower.blocks)

    def pooling_macs(self, tokens: int) -> int:
        """MACs of what the tower does behind its blocks."""
        return 0

    def reading_macs(self, tokens: int) -> int:
        """MACs of a projector that reads an image's tokens with queries of its own."""
        return 0

    # -- facts for the record and for signals ---------------------------------------------------------------------

    @property
    def cls_attention(self) -> str:
        """What the signal of that name is in this family, for the record."""
        return "of the class token" if self.tower.prefix else "received, mean over queries (there is no class token)"

    @property
    def image_processor(self) -> Any:
        """What turns a picture into pixel values, or None."""
        return getattr(self.processor, "image_processor", self.processor)

    @property
    def visual_processors(self) -> list[Any]:
        """Whatever turns pictures and videos into pixel values."""
        found = (self.image_processor, getattr(self.processor, "video_processor", None))
        return [one for one in found if hasattr(one, "preprocess")]

    @property
    def tokenizer(self) -> Any:
        """What turns prompt ids back into text, or None."""
        return getattr(self.processor, "tokenizer", None)

    def decode(self, ids: Tensor) -> str:
        """The text of prompt ids without special tokens."""
        if self.tokenizer is None:
            raise PruningError("this strategy reads the question: pass the model's processor (processor=...)")
        return self.tokenizer.decode(ids, skip_special_tokens=True)

    def encode_text(self, text: str) -> list[int]:
        """The token ids of a text without special tokens; at least one."""
        if self.tokenizer is None:
            raise PruningError("this strategy reads the question: pass the model's processor (processor=...)")
        ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        if not ids:
            raise PruningError("text_encoder=llm: the prompt has images but no question")
        return ids


def find_adapter(
    model: nn.Module, processor: Any, adapters: Sequence[type[Adapter]], describe: Callable[[], str]
) -> Adapter:
    """The adapter of the model; the last registered is asked first."""
    for cls in reversed(adapters):
        if cls.matches(model):
            return cls(model, processor)
    name = type(model).__name__
    for cls in reversed(adapters):
        if name in cls.names and (difference := cls.unlike(model)):
            raise PruningError(f"this {name} is nearly what {cls.models} is known as, but {difference}")
    raise PruningError(f"no adapter knows the model {name}. Supported: {describe()}")
