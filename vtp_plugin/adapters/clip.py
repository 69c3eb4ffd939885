"""CLIP: its vision tower's parts, and its joint space of patches and questions. Shared by the LLaVA families."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize, pad

from vtp_plugin.adapter import Tower
from vtp_plugin.errors import PruningError
from vtp_plugin.facts.costs import Layer

CHECKPOINTS = {  # (width, patch size, image size) of a vision tower -> the checkpoint that it was taken from
    (768, 32, 224): "openai/clip-vit-base-patch32",
    (768, 16, 224): "openai/clip-vit-base-patch16",
    (1024, 14, 224): "openai/clip-vit-large-patch14",
    (1024, 14, 336): "openai/clip-vit-large-patch14-336",
}


def clip_tower(module: nn.Module, projected: int) -> Tower:
    """The parts of a CLIPVisionModel. `projected` is the entry of its hidden states that is projected, e.g. -2."""
    inner = getattr(module, "vision_model", module)  # one level less since transformers 5.6
    side = inner.config.image_size // inner.config.patch_size
    return Tower(
        module=module,
        embeddings=inner.embeddings,
        patch_embedding=inner.embeddings.patch_embedding,
        blocks=inner.encoder.layers,
        post_layernorm=inner.post_layernorm,
        prefix=1,
        grid=(side, side),
        patch_size=inner.config.patch_size,
        projected=projected if projected < 0 else projected - 1,
        between=("layer_norm2", "mlp"),
    )


def checkpoint_of(config: Any) -> str:
    """The published CLIP checkpoint with a tower of this size."""
    key = (config.hidden_size, config.patch_size, config.image_size)
    if key not in CHECKPOINTS:
        raise PruningError(
            f"no CLIP checkpoint is known for a vision tower of width {key[0]}, patch {key[1]}, image {key[2]}: "
            f"name the one that it was taken from (atp.clip=PATH)"
        )
    return CHECKPOINTS[key]


def space_of(model: nn.Module, tower: Tower, checkpoint: str | None) -> ClipSpace:
    """The joint space of a transformers model with a CLIP tower, from the checkpoint or the one that fits its size."""
    config, weight = model.config.vision_config, tower.patch_embedding.weight
    checkpoint = checkpoint or getattr(model.config, "mm_vision_tower", None) or checkpoint_of(config)
    return ClipSpace(checkpoint, config.hidden_size, weight.device, model.dtype)


@contextmanager
def quietly() -> Iterator[None]:
    """Load something in transformers without its reports and progress bars."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


class ClipSpace:
    """The text tower and both projections of a CLIP checkpoint."""

    segments = False  # longer questions are truncated to the text tower's length; True: cut into pieces of it

    def __init__(self, checkpoint: str, width: int, device: torch.device, dtype: torch.dtype) -> None:
        from transformers import AutoTokenizer, CLIPModel

        try:
            with quietly():
                clip = CLIPModel.from_pretrained(checkpoint, dtype=dtype)
                self.tokenizer = AutoTokenizer.from_pretrained(checkpoint)
        except (OSError, ValueError) as error:
            reason = str(error).splitlines()[0]
            raise PruningError(f"cannot load the CLIP text tower from '{checkpoint}': {reason}") from None
        if clip.visual_projection.in_features != width:
            raise PruningError(
                f"the CLIP checkpoint '{checkpoint}' has a vision tower of width {clip.visual_projection.in_features}, "
                f"the model's has {width}; name the one that it was taken from (atp.clip=PATH)"
            )
        self.config = clip.config.text_config
        self.text_model = clip.text_model.eval().to(device)
        self.text_projection = clip.text_projection.to(device)
        self.visual_projection = clip.visual_projection.to(device)

    def text(self, questions: Sequence[str]) -> Tensor:
        """[B, E] fp32; each distinct question is encoded once. With `segments`: the mean of its unit pieces."""
        distinct = sorted(set(questions))
        if self.segments:
            pieces = [self._embedded(self._pieces(question)) for question in distinct]
            embedded = torch.stack([normalize(piece, dim=-1).mean(0) for piece in pieces])
        else:
            embedded = self._embedded(self._tokens(distinct))
        return torch.stack([embedded[distinct.index(question)] for question in questions])

    def _embedded(self, tokens: Mapping[str, Tensor]) -> Tensor:
        """[S, E] of ids and masks [S, L], padded behind; those of equal length together, so that nothing is masked."""
        ids, lengths = tokens["input_ids"].to(self.text_projection.weight.device), tokens["attention_mask"].sum(1)
        found: dict[int, Tensor] = {}
        for length in set(lengths.tolist()):
            rows = [row for row, of in enumerate(lengths.tolist()) if of == length]
            with torch.no_grad():
                pooled = self.text_model(torch.stack([ids[row, :length] for row in rows])).pooler_output
                found |= zip(rows, self.text_projection(pooled).float(), strict=True)
        return torch.stack([found[row] for row in range(len(ids))])

    def patches(self, normed: Tensor) -> Tensor:
        """[B, N, D] -> [B, N, E] fp32."""
        self._follow(normed.device)
        with torch.no_grad():
            return self.visual_projection(normed.to(self.visual_projection.weight)).float()

    def _follow(self, device: torch.device) -> None:
        """Next to the vision tower, should that have been moved."""
        if self.visual_projection.weight.device != device:
            for part in (self.text_model, self.text_projection, self.visual_projection):
                part.to(device)

    def text_macs(self, questions: Sequence[str]) -> int:
        distinct = sorted(set(questions))
        tokens = [self._pieces(question) for question in distinct] if self.segments else [self._tokens(distinct)]
        lengths = [length for each in tokens for length in each["attention_mask"].sum(1).tolist()]
        layers = [Layer.of(layer) for layer in self.text_model.encoder.layers]
        return sum(layer.macs(length) for length in lengths for layer in layers)

    def _tokens(self, questions: list[str]) -> Any:
        length = self.config.max_position_embeddings
        return self.tokenizer(questions, padding=True, truncation=True, max_length=length, return_tensors="pt")

    def _pieces(self, question: str) -> dict[str, Tensor]:
        """Ids and mask [S, L] of a question cut at the text tower's length L, the last piece filled up with zeros.

        Only the first piece has the start token, only the last the end token. A short question is one piece.
        """
        ids = torch.tensor(self.tokenizer(question, verbose=False)["input_ids"])
        length = min(len(ids), self.config.max_position_embeddings)
        missing = -len(ids) % length
        mask = pad(torch.ones_like(ids), (0, missing))
        return {"input_ids": pad(ids, (0, missing)).view(-1, length), "attention_mask": mask.view(-1, length)}
