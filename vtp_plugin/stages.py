"""The four places where visual tokens can leave a model."""

from __future__ import annotations

from enum import Enum


class Stage(str, Enum):
    """In the order in which one image passes them."""

    PIXELS = "pixels"  # raw patches, before they are embedded
    VIT = "vit"  # patch embeddings, before the first block of the vision tower
    PROJECTOR = "projector"  # features on their way from the vision tower to the language model
    LLM = "llm"  # hidden states between two decoder layers

    @property
    def order(self) -> int:
        return _ORDER[self]


_ORDER = {stage: place for place, stage in enumerate(Stage)}
