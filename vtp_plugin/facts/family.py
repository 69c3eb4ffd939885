"""The facts of a model family that the machinery asks for, whichever family it is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, ClassVar

from torch import Tensor, nn

from vtp_plugin.errors import PruningError
from vtp_plugin.facts.conversation import framed
from vtp_plugin.facts.costs import Costs
from vtp_plugin.facts.image import Image
from vtp_plugin.facts.tower import SharedSpace, Tower
from vtp_plugin.stages import Stage


class Family:
    """What the machinery knows of one model. Attributes are the model's own parts; methods are facts about the family.

    `stages` maps every stage to "" if the family supports it, else to the reason why not.
    """

    family: ClassVar[str]
    models: ClassVar[str]  # what users know it as
    stages: ClassVar[Mapping[Stage, str]]
    overview: ClassVar[int] = 0  # the tile that shows the whole picture, where an image has several; -1: the last

    several_views: ClassVar[bool] = False  # whether it says how sub-images lie, `Image.views`, behind such a tile 0

    videos: ClassVar[bool] = False  # whether a video is one image of several frames, `Image.film`

    tiled: ClassVar[bool] = False  # whether an image is several tiles for the tower, each with a class token of its own
    tokenwise: bool = False  # where the host rearranges what the tower makes: the projector works token by token

    uniform: ClassVar[bool] = False  # whether every image has as many tokens as the tower has squares of patches

    tower: Tower
    projector: nn.Module
    language_model: nn.Module | None  # None: an encoder without a language model
    decoder_layers: Sequence[nn.Module]
    default_positions: str = "compact"  # of a shortened prompt, where neither the user nor the method says
    fixed_positions: str = ""  # why the prompt has no positions to choose from
    first_position: int = 0  # of the first token of a prompt
    every_logit: bool = False  # whether its prefill computes the logits of all columns, not only of the last
    first_cut: int = 1  # the first decoder layer that may see fewer tokens than the one before
    cannot_cut: str = ""  # what is in the way in front of it, where it is not 1

    def __init__(self, model: nn.Module, processor: Any = None) -> None:
        self.model, self.processor = model, processor

    @property
    def image_tokens(self) -> int | None:
        """The tokens of every image; None where images have unequal numbers."""
        rows, columns = self.tower.grid if self.uniform else (0, 0)
        return rows * columns // self.tower.block**2 if self.uniform else None

    def shared_space(self, checkpoint: str | None) -> SharedSpace:
        """CLIP's joint space, from `checkpoint` or the tower's own; PruningError if the tower has none."""
        raise PruningError(
            f"{self.family} has no CLIP text encoder that matches its vision tower: text_encoder=llm compares with the "
            f"language model's embeddings of the question instead"
        )

    def turns(self, attention: nn.Module) -> bool:
        """Whether a decoder layer's attention rotates queries and keys by their positions."""
        return True

    def units(self, entering: Tensor, kind: str, inputs: Mapping[str, Any]) -> Sequence[Tensor]:
        """What goes into a projector that merges patches, unit by unit: per image [n, m D], m patches side by side.

        `entering`: as the projector gets it, towers of one sequence in raster order. PruningError: nothing is merged.
        """
        raise PruningError(f"a token of {self.models} is one patch")

    # -- what FLOPs are counted from ------------------------------------------------------------------------------

    @cached_property
    def costs(self) -> Costs:
        """What the parts cost per token."""
        return Costs.of(self.tower, self.projectors, self.decoder_layers, self.head if self.decoder_layers else None)

    @property
    def head(self) -> nn.Module | None:
        """What makes logits of hidden states."""
        return self.model.get_output_embeddings()

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
        """The text of prompt ids, of special tokens only those that show whose turn it is."""
        if self.tokenizer is None:
            raise PruningError("this strategy reads the question: pass the model's processor (processor=...)")
        return framed(self.tokenizer, ids)

    def encode_text(self, text: str) -> list[int]:
        """The token ids of a text without special tokens; at least one."""
        if self.tokenizer is None:
            raise PruningError("this strategy reads the question: pass the model's processor (processor=...)")
        ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        if not ids:
            raise PruningError("text_encoder=llm: the prompt has images but no question")
        return ids
