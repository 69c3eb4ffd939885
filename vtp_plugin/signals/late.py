"""The signals of the projector stage: read in the tower's blocks, or of the rows themselves."""

from __future__ import annotations

from collections.abc import Collection

from torch import Tensor

from vtp_plugin.facts.family import Family
from vtp_plugin.signals.declaration import Asking, Tap, signal
from vtp_plugin.signals.early import CONTENT
from vtp_plugin.signals.synthetic import attention_rows, fingerprints, head_count, peaked, places, view_numbers
from vtp_plugin.signals.views import BlockView, RowsView
from vtp_plugin.stages import Stage


def without_class_token(family: Family, strategy: Asking) -> str:
    """Why there is no class token of a whole image."""
    if not family.tower.prefix:
        return f"it needs a class token, the vision tower of {family.models} has none"
    return f"it needs one class token per image, {family.models} has one per tile" if family.tiled else ""


def without_text_tower(family: Family, strategy: Asking) -> str:
    """Why patches cannot be compared with questions."""
    if strategy.text_encoder == "llm" or type(family).shared_space is not Family.shared_space:
        return ""
    return (
        f"{family.models} has no CLIP text encoder that matches its vision tower; text_encoder=llm compares "
        f"with the language model's embeddings of the question instead"
    )


def without_rows(family: Family, strategy: Asking) -> str:
    """Why tokens cannot be projected one by one."""
    if family.projectors:
        return ""
    return (
        f"it needs what the projector makes of every token, the one of {family.models} answers with tokens of its own"
    )


def without_embeddings(family: Family, strategy: Asking) -> str:
    """Why the language model's embeddings of a question cannot be compared with patches."""
    if strategy.text_encoder != "llm":
        return "the words of a question are the language model's, not CLIP's: it has to say text_encoder=llm"
    reason = "" if family.projectors else family.stages[Stage.LLM]
    return f"it compares patches with the question's input embeddings, but {reason}" if reason else ""


def without_merger(family: Family, strategy: Asking) -> str:
    """Why nothing is merged into tokens."""
    if type(family).units is not Family.units:
        return ""
    return f"judge=before is for models that merge patches, a token of {family.models} is one patch"


def without_alignment(family: Family, strategy: Asking) -> str:
    """Why a patch has no place where questions are."""
    return without_rows(family, strategy) if strategy.text_encoder == "llm" else without_text_tower(family, strategy)


def behind_projector(strategy: Asking) -> Collection[Tap]:
    """With text_encoder=llm a patch is compared as what the projector makes of it."""
    return (Tap.PROJECTED,) if strategy.text_encoder == "llm" else (Tap.OUTPUT, Tap.SPACE)


# -- read where a block of the tower begins ---------------------------------------------------------------------------


@signal(
    "cls_attention",
    Stage.PROJECTOR,
    "[B, N] fp32: attention of the class token in block `tower_layer` (without one: received), mean over heads",
    sample=attention_rows,
)
def cls_attention(at: BlockView) -> Tensor:
    return at.attention


@signal(
    "first_attention",
    Stage.PROJECTOR,
    "[B, N] fp32: as `cls_attention`, of the tower's first block; None for an image of one view",
    block=0,
    several_views=True,
    sample=attention_rows,
)
def first_attention(at: BlockView) -> Tensor:
    return at.attention


@signal(
    "shallow_attention",
    Stage.PROJECTOR,
    "[B, N] fp32: as `cls_attention`, of block `shallow_layer`",
    block="shallow_layer",
    sample=attention_rows,
)
def shallow_attention(at: BlockView) -> Tensor:
    return at.attention


@signal(
    "received",
    Stage.PROJECTOR,
    "[B, N] fp32: attention that a patch receives in block `tower_layer`, mean over heads and all queries",
    sample=attention_rows,
)
def received(at: BlockView) -> Tensor:
    return at.received


@signal(
    "shallow_received",
    Stage.PROJECTOR,
    "[B, N] fp32: the same in block `shallow_layer`",
    block="shallow_layer",
    sample=attention_rows,
)
def shallow_received(at: BlockView) -> Tensor:
    return at.received


@signal("patch_values", Stage.PROJECTOR, "[B, N, d'] fp32: values of block `tower_layer`, heads side by side")
def patch_values(at: BlockView) -> Tensor:
    return at.values.transpose(-3, -2).flatten(-2)  # until it is asked for, as the tower computes: half the bytes


@signal("keys", Stage.PROJECTOR, "[B, N, d] fp32: keys of block `tower_layer`, mean over heads, bias included")
def keys(at: BlockView) -> Tensor:
    return at.keys.float().mean(-3)


@signal("raw_keys", Stage.PROJECTOR, "[B, N, d'] fp32: keys of block `tower_layer`, heads side by side")
def raw_keys(at: BlockView) -> Tensor:
    return at.keys.transpose(-3, -2).flatten(-2)


@signal(
    "class_query",
    Stage.PROJECTOR,
    "[B, d'] fp32: query of the class token in block `tower_layer`, heads side by side, unscaled",
    refuse=without_class_token,
    sample=peaked,
)
def class_query(at: BlockView) -> Tensor:
    return at.query.flatten(1).float()


@signal(
    "class_key",
    Stage.PROJECTOR,
    "[B, d'] fp32: key of the class token in block `tower_layer`, heads side by side",
    refuse=without_class_token,
    sample=peaked,
)
def class_key(at: BlockView) -> Tensor:
    return at.class_key.flatten(1).float()


# -- of the rows ------------------------------------------------------------------------------------------------------


@signal("heads", Stage.PROJECTOR, "[] number of attention heads of block `tower_layer`", sample=head_count)
def heads(at: RowsView) -> int:
    return at.tower.attention_of(at.block).num_heads


@signal(
    "cls",
    Stage.PROJECTOR,
    "[B, D]: class token of the projected block; None where there is none in the space of the tokens",
    taps=Tap.CLASS,
)
def cls(at: RowsView) -> Tensor | None:
    return at.class_feature


@signal(
    "aligned",
    Stage.PROJECTOR,
    "[B, N, E] fp32: output of block `tower_layer` in CLIP's shared space; text_encoder=llm: as `projected`",
    taps=behind_projector,
    refuse=without_alignment,
)
def aligned(at: RowsView) -> Tensor:
    if at.embedded:
        return at.projected
    return at.output("aligned", lambda hidden: at.space.patches(at.tower.post_layernorm(hidden)))


@signal(
    "text",
    Stage.PROJECTOR,
    "[B, E] fp32: the image's question in that space; a strategy with `segments`: mean of its unit pieces",
    taps=(Tap.QUESTION, Tap.SPACE),
    refuse=without_text_tower,
)
def text(at: RowsView) -> Tensor:
    return at.space.text(at.questions).to(at.device)


@signal(
    "words",
    Stage.PROJECTOR,
    "[B, T, L]: input embeddings of the question's tokens in the language model; zeros fill up shorter questions",
    taps=(Tap.QUESTION, Tap.SPACE),
    refuse=without_embeddings,
)
def words(at: RowsView) -> Tensor:
    return at.space.words(at.questions).to(at.device)


@signal(
    "projected",
    Stage.PROJECTOR,
    "[B, N, L]: what the projector makes of the tokens",
    taps=Tap.PROJECTED,
    refuse=without_rows,
)
def projected(at: RowsView) -> Tensor:
    return at.projected


@signal(
    "units",
    Stage.PROJECTOR,
    "[B, N, m D]: what goes into the merger for every token, its m patches side by side",
    refuse=without_merger,
)
def units(at: RowsView) -> Tensor:
    return at.units


@signal(
    "view",
    Stage.PROJECTOR,
    "[B, N] long: 0 for the picture of the whole image, 1 ... for its sub-images, row by row; None for one view",
    several_views=True,
    sample=view_numbers,
)
def view(at: RowsView) -> Tensor | None:
    return at.view


@signal(
    "place",
    Stage.PROJECTOR,
    "[B, N, 2] fp32: middle of the token in its view, down and across, in (0, 1); None for one view",
    several_views=True,
    sample=places,
)
def place(at: RowsView) -> Tensor | None:
    return at.place


@signal("fingerprint", Stage.PROJECTOR, CONTENT, taps=Tap.CONTENT, sample=fingerprints)
def rows_fingerprint(at: RowsView) -> tuple[int, ...]:
    return at.fingerprint
