"""Models that look like the others and cannot be pruned, each with the reason. None of them has a stage."""

from __future__ import annotations

from vtp_plugin.adapter import Adapter, Session, Undo
from vtp_plugin.stages import Stage

CROSS = "its language model reads pictures through cross-attention, they are no tokens of the prompt"
NO_TOWER = "it has no vision tower, patches of the picture are projected straight into the prompt"
CODES = "a picture is words of its vocabulary to it (codes of a VQ-VAE), there are no features to judge"
ENCODED = "it is an encoder-decoder, pictures and prompt enter its encoder together and the decoder reads all of it"


class Refused(Adapter):
    """A family that is known, and refused."""

    def install(self, pruned: Session, undo: Undo) -> None:
        """Never called: `find_adapter` refuses the model."""
        raise NotImplementedError


class Mllama(Refused):
    """transformers' Llama 3.2 Vision."""

    family = "mllama"
    models = "Llama 3.2 Vision"
    names = ("MllamaForConditionalGeneration",)
    refused = CROSS
    stages = dict.fromkeys(Stage, CROSS)


class Fuyu(Refused):
    """transformers' Fuyu."""

    family = "fuyu"
    models = "Fuyu"
    names = ("FuyuForCausalLM",)
    refused = NO_TOWER
    stages = dict.fromkeys(Stage, NO_TOWER)


class Chameleon(Refused):
    """transformers' Chameleon."""

    family = "chameleon"
    models = "Chameleon"
    names = ("ChameleonForConditionalGeneration",)
    refused = CODES
    stages = dict.fromkeys(Stage, CODES)


class Florence2(Refused):
    """Florence-2, transformers' and the one with code of its own."""

    family = "florence2"
    models = "Florence-2"
    names = ("Florence2ForConditionalGeneration",)
    refused = ENCODED
    stages = dict.fromkeys(Stage, ENCODED)
