"""Signals are declared once: what is refused, sampled, documented and read follows from the declarations."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from itertools import product
from typing import Any

import families
import pytest
import torch
from family_runs import model_of
from matrix import FULL
from paths import ROOT
from torch import Tensor

import vtp_plugin as vtp
from vtp_plugin import PruningStrategy, Selection, Stage, VisualTokens, signal, signals
from vtp_plugin.errors import PruningError
from vtp_plugin.samples import run, sample
from vtp_plugin.signals import BlockView, LayerView, RowsView, Tap, declaration, table

PAGE = ROOT / "docs" / "add-a-strategy.md"


@dataclass(kw_only=True)
class Asking(PruningStrategy):
    """Asks for signals at a stage, keeps all but the last token and remembers what it saw."""

    name = "asking"
    paper = "none"
    at: str = "llm"
    needs: tuple[str, ...] = ()
    seen: list[VisualTokens] = field(default_factory=list)

    @property
    def stage(self) -> Stage:
        return Stage(self.at)

    @property
    def decoder_layer(self) -> int | None:
        return 3 if self.at == "llm" else None  # every family lets it be cut

    def select(self, visual: VisualTokens) -> Selection:
        self.seen.append(visual)
        keep = torch.ones_like(visual.index, dtype=torch.bool)
        keep[:, -1] = False
        return Selection(keep)


@pytest.mark.parametrize("family", families.FAMILIES)
@pytest.mark.parametrize("stage", Stage)
def test_every_wrong_asking_is_refused_in_one_sentence_when_attached(family: str, stage: Stage):
    model, given = model_of(family, "sdpa"), signals.given(stage)
    if stage.value not in families.FAMILIES[family].stages:
        return
    for name in [*sorted(signals.names() - given.keys()), "nonsense"]:
        with pytest.raises(PruningError) as error:
            vtp.prune(model, Asking(at=stage.value, needs=(name,)), processor=families.Processor())
        listed = ", ".join(sorted(given))
        expected = f"asking: needs {name}, which the {stage.value} stage does not give; it gives {listed}"
        assert str(error.value) == expected
        assert "_vtp_pruned" not in vars(model)


@pytest.mark.parametrize("family", families.FAMILIES)
@pytest.mark.parametrize("stage", Stage)
@torch.no_grad()
def test_every_right_asking_is_answered_or_refused_when_attached(family: str, stage: Stage):
    """Refused one by one; answered together, VTP_FULL_MATRIX=1: one by one, too."""
    one, model = families.FAMILIES[family], model_of(family, "sdpa")
    if stage.value not in one.stages:
        return
    inputs, refused, given = one.batch([one.sample(0, 2), one.sample(1, 1)]), {}, signals.given(stage)
    for name in given:
        try:
            vtp.prune(model, Asking(at=stage.value, needs=(name,)), processor=families.Processor()).detach()
        except PruningError as error:
            refused[name] = str(error)
    possible = tuple(name for name in given if name not in refused)
    for needs in [(name,) for name in possible] if FULL else [possible]:
        asking = Asking(at=stage.value, needs=needs)
        with vtp.prune(model, asking, processor=families.Processor()):
            model(**inputs)
        assert asking.seen
        for seen, name in product(asking.seen, needs):
            value, declared = getattr(seen, name), given[name]
            if value is None:
                assert "None" in declared.meaning
            elif isinstance(value, Tensor):
                assert value.ndim == len(declared.axes)
                assert len(value) == len(seen.tokens)
                if declared.per_token:
                    assert value.shape[declared.axes.index("N")] == seen.tokens.shape[1]
    assert all(re.search("class token|CLIP|one patch|frames of a video", reason) for reason in refused.values())
    assert refused.keys() <= {"class_query", "class_key", "aligned", "text", "words", "units", "film", "frame", "cell"}


def test_the_table_of_the_page_is_that_of_the_declarations():
    page = PAGE.read_text()
    assert table.written(page) == page, "run `python -m vtp_plugin.signals.table docs/add-a-strategy.md`"


# -- a signal of a stranger -------------------------------------------------------------------------------------------


@pytest.fixture
def strangers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Signals that no module of the package knows."""
    kept = {view: dict(known) for view, known in declaration._DECLARED.items()}
    monkeypatch.setattr(declaration, "_DECLARED", kept)

    @signal("key_lengths", Stage.PROJECTOR, "[B, N] fp32: L2 norms of the keys, mean over heads")
    def key_lengths(at: BlockView) -> Tensor:
        return at.keys.float().norm(dim=-1).mean(-2)

    @signal("sharpness", Stage.PROJECTOR, "[B, N, L]: projected rows minus their mean", taps=Tap.PROJECTED)
    def sharpness(at: RowsView) -> Tensor:
        return at.projected - at.projected.mean(1, keepdim=True)

    @signal("key_lengths", Stage.LLM, "[B, N] fp32: L1 norms of the keys", taps=Tap.LAYER)
    def norms(at: LayerView) -> Tensor:
        return at.reading.norms(at.sample)[at.image]

    return


@pytest.mark.usefixtures("strangers")
@pytest.mark.parametrize("family", ["llava_next", "qwen2_5_vl", "mistral3", "internvl"])
@torch.no_grad()
def test_a_stranger_declares_a_signal_and_reads_it(family: str):
    one, model = families.FAMILIES[family], model_of(family, "sdpa")
    inputs = one.batch([one.sample(0, 2)])
    for stage, name, known in (("projector", "key_lengths", "cls_attention"), ("llm", "key_lengths", "key_norms")):
        asking = Asking(at=stage, needs=(name, known))
        with vtp.prune(model, asking, processor=families.Processor()):
            model(**inputs)
        assert all(getattr(seen, name).shape == getattr(seen, known).shape for seen in asking.seen)
        assert all((getattr(seen, name) > 0).all() for seen in asking.seen)
    asking = Asking(at="projector", needs=("sharpness", "projected"))
    with vtp.prune(model, asking, processor=families.Processor()):
        model(**inputs)
    assert all(seen.sharpness.mean(1).abs().max() < 1e-4 for seen in asking.seen)


@pytest.mark.usefixtures("strangers")
def test_a_strangers_signal_is_sampled_documented_and_refused_as_the_others():
    asking = Asking(at="projector", needs=("key_lengths",))
    assert sample(asking, 36).key_lengths.shape == (2, 36)
    assert run(asking, sample(asking, 36))[0].counts == [35, 35]
    assert "`key_lengths`" in table.table()
    with pytest.raises(PruningError, match="needs key_lengths, which the vit stage does not give; it gives"):
        sample(Asking(at="vit", needs=("key_lengths",)), 36)
    tokens = {"tokens": torch.zeros(1, 4, 2), "grid": (2, 2), "index": torch.arange(4)[None]}
    assert VisualTokens(**tokens, key_lengths=torch.ones(1, 4)).key_lengths.sum() == 4
    assert VisualTokens(**tokens).key_lengths is None


@pytest.mark.usefixtures("strangers")
def test_declarations_that_cannot_be_are_refused():
    with pytest.raises(PruningError, match=r"two signals of one stage are named 'keys': .*keys and .*test_declared"):

        @signal("keys", Stage.PROJECTOR, "[B, N] fp32: others")
        def keys(at: BlockView) -> Tensor: ...

    with pytest.raises(PruningError, match="a reader at the llm stage takes LayerView, got BlockView"):

        @signal("mine", Stage.LLM, "[B, N] fp32: mine")
        def mine(at: BlockView) -> Tensor: ...

    with pytest.raises(PruningError, match="expected a name and a meaning like"):
        signal("mine", Stage.LLM, "one number per token")


@pytest.mark.usefixtures("strangers")
@torch.no_grad()
def test_a_signal_that_reads_what_is_not_kept_says_so():
    @signal("untapped", Stage.LLM, "[B, N] fp32: without its tap")
    def untapped(at: LayerView) -> Tensor:
        return at.reading.norms(at.sample)[at.image]

    one, model = families.FAMILIES["llava_next"], model_of("llava_next", "sdpa")
    with (
        vtp.prune(model, Asking(needs=("untapped",))),
        pytest.raises(PruningError, match=r"declare it with taps=Tap\.LAYER"),
    ):
        model(**one.batch([one.sample(0, 1)]))


def test_an_attribute_that_is_no_signal_names_those_that_are():
    seen = VisualTokens(torch.zeros(1, 4, 2), (2, 2), torch.arange(4)[None])
    assert seen.cls_attention is None
    with pytest.raises(AttributeError, match=r"no signal is named 'cls_atention'\. Signals: aligned"):
        _: Any = seen.cls_atention
    with pytest.raises(TypeError, match="VisualTokens has no signal 'cls_atention'"):
        VisualTokens(torch.zeros(1, 4, 2), (2, 2), torch.arange(4)[None], cls_atention=None)
