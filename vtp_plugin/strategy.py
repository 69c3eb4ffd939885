"""The abstraction that every pruning method fills in: hyper-parameters as fields, a score or a selection."""

from __future__ import annotations

import dataclasses
from abc import ABC
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from vtp_plugin.errors import PruningError
from vtp_plugin.stages import Stage
from vtp_plugin.tokens import Selection, VisualTokens, best

BUDGET = ("keep_ratio", "keep_tokens")
POSITIONS = ("original", "compact")  # of the tokens that are left: as in the whole prompt, or counted anew
HUGE = 1e300  # a larger number is none: nothing can be computed with it
UNITS = ("per_image", "per_tile", "total")  # what a budget is counted over; total: all images of one prompt


@dataclass(kw_only=True)
class PruningStrategy(ABC):
    """One method. Its dataclass fields are its hyper-parameters, its YAML keys and its command line keys.

    A method that ranks tokens implements `score`; one that merges, diversifies or keeps a threshold's number
    implements `select`. It never learns which model it is in.
    """

    name: ClassVar[str]
    paper: ClassVar[str]  # citation with a link
    stage: ClassVar[Stage]
    needs: ClassVar[Collection[str]] = ()  # the fields of VisualTokens that it reads beside tokens, grid and index
    pictures: ClassVar[bool] = True  # False: it is for videos, and compares their frames
    budgeted: ClassVar[bool] = True  # False: the number kept follows from the data; keep_ratio does not apply
    merges: ClassVar[bool] = False  # True: survivors get new values, so no strategy may follow at the same stage
    default_keep_ratio: ClassVar[float] = 0.5
    default_positions: ClassVar[str | None] = None  # what the paper does; None: what the family or the stage does
    text_encoder: ClassVar[str] = "clip"  # where `text` and `aligned` come from; a field of QuestionStrategy
    segments: ClassVar[bool] = False  # True: `text` of a question too long for CLIP is a mean over pieces, not cut off
    proportional: ClassVar[bool] = False  # True: inside the tower, a token's key weighs as many as it was merged from
    cut_field: ClassVar[str] = "layer"  # llm stage: the hyper-parameter that says where it cuts
    nominal: ClassVar[bool] = False  # True: keep_ratio is the paper's label of a setting, not what is left at the end

    keep_ratio: float | None = None  # kept / all, in (0, 1]
    keep_tokens: int | None = None  # or an absolute number
    invert: bool = False  # the control: keep the lowest scores instead; only for methods that rank
    budget: str = "per_image"  # what either counts over: per_image, per_tile or total (all images of one prompt)
    positions: str | None = None  # original or compact, of the tokens that are left; None: default_positions

    def __post_init__(self) -> None:
        if not self.budgeted:
            self._refuse_budget()
        elif self.keep_ratio is not None and self.keep_tokens is not None:
            raise self.error("give keep_ratio or keep_tokens, not both")
        elif self.keep_ratio is None and self.keep_tokens is None:
            self.keep_ratio = self.default_keep_ratio
        if self.keep_ratio is not None:
            self.check("keep_ratio", 0 < _number(self.keep_ratio) <= 1, "must be in (0, 1]")
        if self.keep_tokens is not None:
            self.check("keep_tokens", _whole(self.keep_tokens) and self.keep_tokens >= 1, "must be a whole number >= 1")
        self.check_choice("invert", (True, False))
        self.check("invert", self.ranks() or not self.invert, "needs a method that ranks all tokens by one score")
        self.check_choice("budget", UNITS)
        self.check("positions", self.positions in (None, *POSITIONS), f"must be one of {', '.join(POSITIONS)}")
        self.validate()

    # -- what a method implements ---------------------------------------------------------------------------------

    def validate(self) -> None:
        """Check the hyper-parameters with `self.check`; called once, on construction."""

    def score(self, visual: VisualTokens) -> Tensor:
        """How much each token matters, [B, N], higher is kept."""
        raise NotImplementedError(f"{type(self).__name__} implements neither score() nor select()")

    def select(self, visual: VisualTokens) -> Selection:
        """Which tokens survive. By default the `count(N)` highest scores, ties by lower index, ascending order."""
        scores = self.score(visual)
        ranked = best(-scores if self.invert else scores, self.wanted(visual))
        finite = torch.isfinite(scores).all()
        if not finite.is_cuda:  # where nobody waits for the answer
            self.check_scores(bool(finite))
        return Selection.of(ranked, scores.shape[1], scores=scores, finite=finite)

    def check_scores(self, finite: bool) -> None:
        """Refuse scores that are no numbers."""
        if not finite:
            raise self.error("a score is not finite")

    def rounded(self, exact: float) -> int:
        """How keep_ratio * N becomes a whole number; int() unless the method's source says otherwise."""
        return int(exact)

    # -- what the machinery asks ----------------------------------------------------------------------------------

    @property
    def tower_layer(self) -> int | None:
        """The vision tower's block whose attention, keys and output are wanted; negative counts from the last.

        None: the block whose output is projected.
        """
        return None

    @property
    def shallow_layer(self) -> int:
        """Another, earlier block of the tower, of the signals that are named shallow."""
        return 0

    @property
    def clip_checkpoint(self) -> str | None:
        """The CLIP checkpoint behind `aligned` and `text`; None: the one that the vision tower comes from."""
        return None

    @property
    def decoder_layer(self) -> int | None:
        """llm stage: the first decoder layer (0-based) that does not see the dropped tokens."""
        return None

    def cut_blocks(self, depth: int) -> tuple[int, ...]:
        """vit stage: the blocks inside which it merges, between attention and MLP, of the `depth` that count.

        The last of them is the one whose output is projected. None: patch embeddings are cut before the first block.
        """
        return ()

    def cut_layers(self, depth: int) -> tuple[int, ...]:
        """llm stage: the same for every cut, ascending, in a model of `depth` layers; one cut by default."""
        return () if self.decoder_layer is None else (self.decoder_layer,)

    @property
    def keeps_everything(self) -> bool:
        """True when the configuration itself asks for no pruning."""
        return self.budgeted and self.keep_ratio == 1

    def count(self, n: int) -> int:
        """How many of n tokens survive, at least 1 and at most n."""
        if self.keep_tokens is not None:
            return min(self.keep_tokens, n)
        return max(1, min(n, self.rounded(self.keep_ratio * n + 1e-9)))

    def wanted(self, visual: VisualTokens) -> int:
        """How many tokens survive this cut; strategies that cut at several layers look at `visual.cut`."""
        return self.count(visual.tokens.shape[1])

    def decide(self, visual: VisualTokens) -> Selection:
        """`select`, except that a budget of all tokens leaves them untouched, bit for bit.

        The choice has no gradient; new values of survivors, where the method merges, have that of their parts.
        """
        if self.budgeted and self.wanted(visual) == visual.tokens.shape[1]:
            return Selection.everything(visual.index)
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.merges):
            return self.select(visual)

    @classmethod
    def fields(cls) -> list[str]:
        """The names of the hyper-parameters."""
        hidden = (() if cls.budgeted else (*BUDGET, "budget")) + (() if cls.ranks() else ("invert",))
        return [f.name for f in dataclasses.fields(cls) if f.name not in hidden]

    @classmethod
    def ranks(cls) -> bool:
        """Whether the method is a top-k of its scores, so that `invert` makes sense."""
        return cls.select is PruningStrategy.select

    def config(self) -> dict[str, Any]:
        """The full configuration, as it is written to the record."""
        return {name: getattr(self, name) for name in self.fields()}

    # -- errors ---------------------------------------------------------------------------------------------------

    def error(self, message: str) -> PruningError:
        return PruningError(f"{self.name}: {message}")

    def check(self, field: str, holds: bool, rule: str) -> None:
        """Refuse the value of a field in one sentence."""
        if not holds:
            raise self.error(f"{field} {rule}, got {getattr(self, field)!r}")

    def check_number(self, field: str, low: float = float("-inf"), high: float = float("inf")) -> None:
        """Refuse a field that is not a number in [low, high]."""
        self.check(field, low <= _number(getattr(self, field)) <= high, f"must be a number in [{low:g}, {high:g}]")

    def check_whole(self, field: str, low: int = 1) -> None:
        """Refuse a field that is not a whole number >= low."""
        value = getattr(self, field)
        self.check(field, _whole(value) and value >= low, f"must be a whole number >= {low}")

    def check_choice(self, field: str, options: Collection[Any]) -> None:
        """Refuse a field whose value is not one of the options."""
        value = getattr(self, field)
        known = any(type(value) is type(option) and value == option for option in options)  # True is not 1
        self.check(field, known, f"must be one of {', '.join(map(str, options))}")

    def check_layer(self, field: str, layer: int, first: int, last: int, why: str) -> None:
        """Refuse a layer that the model does not have, or that cannot be cut; `why` says what the model is like."""
        if not first <= layer <= last:
            raise self.error(f"{field} must be in {first} ... {last} for this model, got {layer}: {why}")

    def _refuse_budget(self) -> None:
        given = [name for name in BUDGET if getattr(self, name) is not None]
        if given:
            raise self.error(f"{given[0]} does not apply, its thresholds decide. Fields: {', '.join(self.fields())}")


@dataclass(kw_only=True)
class PlacedStrategy(PruningStrategy):
    """A method that can stand at several stages: `at` says at which."""

    places: ClassVar[Collection[str]] = ("vit", "projector", "llm")

    at: str = "projector"  # the stage
    layer: int = 2  # for at=llm: the first decoder layer that does not see the dropped tokens

    def validate(self) -> None:
        self.check_choice("at", self.places)
        self.check_whole("layer", 1)

    @property
    def stage(self) -> Stage:
        return Stage(self.at)

    @property
    def decoder_layer(self) -> int | None:
        return self.layer if self.stage is Stage.LLM else None


@dataclass(kw_only=True)
class ComparingStrategy(PruningStrategy):
    """A method that compares the features of tokens, or their norms, and which features on models that merge patches.

    judge=after: the rows that come out of the merger (pixel shuffle, pooling). judge=before: what goes into it, the
    patches of a token side by side (`units`). What is kept are the rows that come out, either way.
    """

    judge: str = "after"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_choice("judge", ("after", "before"))
        here = self.stage is Stage.PROJECTOR or self.judge == "after"
        self.check("judge", here, f"must be after at the {self.stage.value} stage")

    def reads(self, *after: str) -> tuple[str, ...]:
        """The signals that it compares tokens by: these, or what goes into the merger."""
        return ("units",) if self.judge == "before" else after

    def judged(self, visual: VisualTokens, after: Tensor) -> Tensor:
        """What it compares tokens by, [B, N, D]: this, or what goes into the merger."""
        return visual.units if self.judge == "before" else after


@dataclass(kw_only=True)
class QuestionStrategy(PruningStrategy):
    """A method that compares patches with the question (`aligned`, `text`), and in which space it does.

    text_encoder=clip: CLIP's text tower and the patches in CLIP's shared space, as the papers do.
    text_encoder=llm: for towers without such a text tower. The question is the mean of the language model's input
    embeddings of its tokens, a patch is what the projector makes of it; the layer of the tower plays no part.
    """

    text_encoder: str = "clip"
    clip: str | None = None  # CLIP checkpoint with the text tower; None: the vision tower's own

    def validate(self) -> None:
        self.check_choice("text_encoder", ("clip", "llm"))
        self.check("clip", self.clip is None or isinstance(self.clip, str), "must be the name of a checkpoint")
        self.check("clip", self.clip is None or self.text_encoder == "clip", "needs text_encoder=clip")

    @property
    def shallow_layer(self) -> int:
        """Another, earlier block of the tower, of the signals that are named shallow."""
        return 0

    @property
    def clip_checkpoint(self) -> str | None:
        return self.clip


def _number(value: Any) -> float:
    """The value as a float; nan (which fails every comparison) for anything that is not a number."""
    if not isinstance(value, (int, float)) or isinstance(value, bool) or abs(value) > HUGE:
        return float("nan")
    return float(value)


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**63


def layer_numbers(value: Any) -> tuple[int, ...] | None:
    """Layers as a number, a list or a text such as "8 16 24"; None if they are not ascending whole numbers >= 1."""
    parts = value.split() if isinstance(value, str) else value if isinstance(value, (list, tuple)) else [value]
    numbers = [int(part) if isinstance(part, str) and part.isdecimal() and len(part) < 19 else part for part in parts]
    rising = numbers and all(_whole(n) and n > m for m, n in zip([0, *numbers], numbers, strict=False))
    return tuple(numbers) if rising else None
