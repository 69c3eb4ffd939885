"""`vtp check`: built-ins pass, and every broken promise is found and named."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

from vtp_plugin import PruningStrategy, Selection, Stage, VisualTokens, conformance, get_strategy, list_strategies


@dataclass(kw_only=True)
class Sound(PruningStrategy):
    """Keeps its promises."""

    name = "sound"
    stage = Stage.PROJECTOR
    paper = "test"

    def score(self, visual: VisualTokens) -> Tensor:
        return visual.tokens.float().sum(-1)


@dataclass(kw_only=True)
class Greedy(Sound):
    """One token too many."""

    def select(self, visual: VisualTokens) -> Selection:
        keep = torch.zeros_like(visual.index, dtype=torch.bool)
        keep[:, : self.wanted(visual) + 1] = True
        return Selection(keep)


@dataclass(kw_only=True)
class Moody(Sound):
    """Random without a seed."""

    def score(self, visual: VisualTokens) -> Tensor:
        return torch.rand(visual.index.shape)


@dataclass(kw_only=True)
class Coarse(Sound):
    """Computes in the precision of the model."""

    def score(self, visual: VisualTokens) -> Tensor:
        return (visual.tokens * visual.tokens).sum(-1).float().nan_to_num(posinf=0.0)


@dataclass(kw_only=True)
class Social(Sound):
    """Looks at other images."""

    def score(self, visual: VisualTokens) -> Tensor:
        return (visual.tokens.float() * visual.tokens.float().mean(0)).sum(-1)


@dataclass(kw_only=True)
class Placed(Sound):
    """Ranks by column instead of by raster position."""

    def score(self, visual: VisualTokens) -> Tensor:
        return torch.arange(visual.index.shape[1]).expand(visual.index.shape).float()


@dataclass(kw_only=True)
class Fragile(Sound):
    """Divides by zero."""

    def score(self, visual: VisualTokens) -> Tensor:
        return 1 / visual.tokens.float().norm(dim=-1)


@dataclass(kw_only=True)
class Idle(Sound):
    """Has a parameter that does nothing."""

    weight: float = 1.0


@dataclass(kw_only=True)
class Curious(Sound):
    """Needs what does not exist."""

    name = "curious"
    needs = ("gradients",)


class Bare(Sound):
    """Is no dataclass."""

    share: float = 0.5


@dataclass(kw_only=True)
class Nowhere(Sound):
    """Cuts at no layer."""

    stage = Stage.LLM


@dataclass(kw_only=True)
class Misplaced(Nowhere):
    """Needs what another stage gives."""

    name = "misplaced"
    needs = ("cls_attention",)
    decoder_layer = 2


@dataclass(kw_only=True)
class Restless(Sound):
    """Moves tokens when it should leave them."""

    def decide(self, visual: VisualTokens) -> Selection:
        return Selection(torch.ones_like(visual.index, dtype=torch.bool), source=tuple(visual.index.flip(1)))


def failures(cls: type[PruningStrategy]) -> dict[str, str]:
    return {outcome.name: outcome.remark for outcome in conformance.conforms(cls) if not outcome.passed}


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cost is the only slow check; it cannot fail."""
    checks = tuple(check for check in conformance.CHECKS if check is not conformance._cost)
    monkeypatch.setattr(conformance, "CHECKS", checks)
    monkeypatch.setattr(conformance, "SIZES", (1, 7, 36))


@pytest.mark.parametrize("name", list_strategies())
def test_built_ins_conform(name: str):
    assert failures(get_strategy(name)) == {}


def test_a_sound_strategy_passes():
    assert failures(Sound) == {}


@pytest.mark.parametrize(
    ("cls", "check", "reason"),
    [
        (Greedy, "keeps exactly", r"N = 7, K = 1: asked for 1, kept \[2, 2\]"),
        (Moody, "the same twice", "seed a generator from `fingerprint`"),
        (Coarse, "half-precision", "judged otherwise than the same values in fp32"),
        (Social, "in a batch as alone", "image 0 of three"),
        (Placed, "order of the tokens", "other tokens get it when they move"),
        (Fragile, "scores are finite", "zero tokens, N = 1"),
        (Idle, "every parameter", "no value of weight changes"),
        (
            Curious,
            "can be given to",
            "`curious`: needs gradients, which the projector stage does not give; it gives aligned",
        ),
        (Bare, "can be given to", r"test_conformance\.py:\d+: the class needs @dataclass"),
        (Nowhere, "can be given to", r"test_conformance\.py:\d+: an llm method says where it cuts"),
        (
            Misplaced,
            "can be given to",
            r"test_conformance\.py:\d+: `misplaced`: needs cls_attention, which the llm stage",
        ),
        (Restless, "keep_ratio=1", "dropped, moved or changed"),
    ],
)
def test_a_broken_promise_is_named(cls: type[PruningStrategy], check: str, reason: str):
    found = {name: remark for name, remark in failures(cls).items() if check in name}
    assert len(found) == 1
    assert re.search(reason, next(iter(found.values())))


def _run(*args: str) -> Any:
    from vtp_plugin.cli import app, vtp_register_commands

    if not app.registered_commands:
        vtp_register_commands(app)
    return CliRunner().invoke(app, ["check", *args])


def test_the_command_fails_with_a_broken_strategy(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(
        "from dataclasses import dataclass\nimport torch\nfrom vtp_plugin import PruningStrategy, Stage\n\n"
        "@dataclass(kw_only=True)\nclass Mine(PruningStrategy):\n    '''Bad.'''\n"
        "    name = 'mine'\n    stage = Stage.PROJECTOR\n    paper = 'none'\n"
        "    def score(self, visual):\n        return torch.rand(visual.index.shape)\n"
    )
    result = _run("mine", "--module", str(file))
    assert result.exit_code == 1
    assert "failed" in result.stdout
    assert "checks failed" in result.stdout


@pytest.mark.parametrize(
    ("content", "message"), [("x = 1", "unknown strategy 'mine' in"), ("import nothing_like_it", "cannot be imported")]
)
def test_a_file_without_the_strategy_is_refused(tmp_path, content: str, message: str):
    file = tmp_path / "mine.py"
    file.write_text(content)
    assert message in str(_run("mine", "--module", str(file)).exception)


def test_a_missing_file_is_refused():
    assert "file not found" in str(_run("mine", "--module", "nowhere.py").exception)
